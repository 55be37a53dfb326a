"""Images and captions: where they are, and how they become training samples."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from difftrain_utils.config.config import Require
from difftrain_utils.config.rows import RowsConfig, RowsSource

MAX_SIDE = 16384  # more is a slip, and takes the machine's memory before it is noticed
HERE = "difftrain_utils/config/data.py"


@dataclass
class SourceConfig(RowsSource):
    """One of several data sets, an item of `data.sources`."""

    image_column: str = "image"
    """As data.image_column."""
    caption_column: str | list[str] = "text"
    """As data.caption_column."""
    default_caption: str | None = None
    """As data.default_caption."""
    mask_column: str | None = None
    """As data.mask_column."""


@dataclass
class DataConfig(RowsConfig):
    """Images and captions, and how an image becomes a training sample."""

    SOURCE: ClassVar[type[RowsSource]] = SourceConfig

    dataset: str | None = None
    """A folder of photos (`cat.jpg` and its caption `cat.txt`), of images with a `metadata.jsonl`, of parquet, arrow or
    WebDataset tar files, a hub data set, or `builtin:shapes` or `builtin:placed-shapes` (need no download)."""
    image_column: str = "image"
    """Column of the images (an image folder calls it `image`, tar files `jpg`, `png`, …)."""
    caption_column: str | list[str] = "text"
    """Column of the captions: a string, or a list of strings of which one is drawn. `json.caption` is the field caption
    of a column json. A list of columns: of all their captions that are not null one is drawn. Integers are captions as
    text, and class labels (`datasets.ClassLabel`) by their names. A folder of photos has `text`, the files of captions
    beside them, and `file_name`, their own names."""
    default_caption: str | None = None
    """The caption of images that have none."""
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
    caption_dropout: float = 0.0
    """Probability that a sample has no caption, which classifier-free guidance needs (0.1 is usual)."""
    caption_prefix: str = ""
    """What each caption begins with, literally: no space is added. A dropped caption has neither prefix nor suffix."""
    caption_suffix: str = ""
    """What each caption ends with, literally."""
    shuffle_tags: bool = False
    """Put the tags of a caption into another order for each sample, before prefix and suffix come to it. Validation
    sees captions as they are."""
    tag_dropout: float = 0.0
    """Probability that a tag is left out of a sample's caption."""
    keep_tags: int = 0
    """Number of tags, the first ones of a caption, that stay in their places."""
    tag_separator: str = ","
    """What stands between tags. Spaces around tags do not count: those that are left are put together with this and a
    space."""
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
        require(0 <= self.caption_dropout <= 1, "caption_dropout", "must be between 0 and 1")
        require(0 <= self.tag_dropout <= 1, "tag_dropout", "must be between 0 and 1")
        require(self.keep_tags >= 0, "keep_tags", "must be at least 0")
        require(self.tag_separator.strip() != "", "tag_separator", "must not be empty")
        for name in ("keep_tags", "tag_separator"):
            is_default = getattr(self, name) == getattr(DataConfig, name)
            require(is_default or self.changes_tags, name, "goes with data.shuffle_tags or data.tag_dropout")
        rule = "cannot go with data.shuffle_tags and data.tag_dropout, which make other captions each time"
        require(not (self.cache_text and self.changes_tags), "cache_text", rule)
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

    @property
    def changes_tags(self) -> bool:
        """Whether samples have other tags than their captions."""
        return self.shuffle_tags or self.tag_dropout > 0

    @property
    def has_captions(self) -> bool:
        """Whether the model is told any."""
        return self.caption_dropout < 1
