"""Images and captions: where they are, and how they become training samples."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from difftrain_utils.config.captions import CaptionsConfig, CaptionsSource
from difftrain_utils.config.config import Require

MAX_SIDE = 16384  # more is a slip, and takes the machine's memory before it is noticed
HERE = "difftrain_utils/config/data.py"


@dataclass
class SourceConfig(CaptionsSource):
    """One of several data sets, an item of `data.sources`."""

    image_column: str = "image"
    """As data.image_column."""
    mask_column: str | None = None
    """As data.mask_column."""


@dataclass
class DataConfig(CaptionsConfig):
    """Images and captions, and how an image becomes a training sample."""

    SOURCE: ClassVar[type[CaptionsSource]] = SourceConfig

    dataset: str | None = None
    """A folder of photos (`cat.jpg` and its caption `cat.txt`), of images with a `metadata.jsonl`, of parquet, arrow or
    WebDataset tar files, a hub data set, or `builtin:shapes`, `builtin:placed-shapes` or `builtin:scenes` (need no
    download)."""
    image_column: str = "image"
    """Column of the images (an image folder calls it `image`, tar files `jpg`, `png`, …)."""
    mask_column: str | None = None
    """Column of masks, images of the same size of which white counts in the loss and black does not (a folder of photos
    has `mask` of `cat-masklabel.png` beside `cat.jpg`, metadata.jsonl `mask` of its `mask_file_name`)."""
    sources: list[SourceConfig] | None = None
    """Several data sets instead of `dataset`: a list of {dataset: …, split: train, image_column: image, caption_column:
    text, default_caption: null, mask_column: null, weight_column: null, weight: null, loss_weight: 1.0}, all but the
    last two as the field of data of that name. `weight` is a source's share of the samples (for all sources or none;
    they are scaled to add up to 1); without weights every row comes once an epoch. `loss_weight` is a factor of the
    loss of its samples."""
    resolution: int = 512
    """Side of the square training image in pixels; the image's shorter side is resized to it."""
    no_upscale: bool = False
    """Enlarge no image: leave out those that are smaller than `resolution`, or with `buckets: auto` train them at a
    smaller size of their shape."""
    center_crop: bool = False
    """Crop the centre instead of a random place."""
    random_flip: bool = False
    """Mirror half of the samples."""
    image_interpolation: Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"] = "lanczos"
    """Pillow's filter for resizing."""
    buckets: Literal["auto"] | list[list[int]] | None = None
    """Sizes [height, width] to train at, of which each image gets that of the nearest aspect ratio; `auto`: sizes of
    about resolution² pixels; null: squares only. Each batch has one size."""
    cache_latents: bool = False
    """Run the VAE on each image once, before training, and keep its moments on the disk (needs center_crop)."""
    cache_text: bool = False
    """Run the text encoder on each caption once, before training, and keep its output on the disk."""

    def check(self, require: Require) -> None:
        super().check(require)
        require(8 <= self.resolution <= MAX_SIDE, "resolution", f"must be from 8 to {MAX_SIDE} (MAX_SIDE in {HERE})")
        has_one_crop = not self.cache_latents or self.center_crop
        require(has_one_crop, "cache_latents", "needs data.center_crop (one crop is kept)")
        sizes = self.buckets if isinstance(self.buckets, list) else [[8, 8]]
        are_sizes = all(len(size) == 2 and min(size) >= 8 and max(size) <= MAX_SIDE for size in sizes)
        rule = f"must be sizes [height, width] from 8 to {MAX_SIDE}, or auto"
        require(len(sizes) > 0 and are_sizes, "buckets", rule)
        ratios = [size[0] / size[1] for size in sizes]
        require(len(set(ratios)) == len(ratios), "buckets", "must have different aspect ratios")
        if self.streaming:
            for name in ("buckets", "no_upscale", "cache_latents", "cache_text"):
                require(not getattr(self, name), name, "cannot go with data.streaming")
