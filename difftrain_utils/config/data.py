"""Images and captions: where they are, and how they become training samples."""

import math
from dataclasses import dataclass
from typing import Literal

from difftrain_utils.config.config import Require, refuse_null
from difftrain_utils.errors import InputError

MAX_SIDE, MAX_WORKERS = 16384, 256  # more is a slip, and takes the machine's memory before it is noticed
HERE = "difftrain_utils/config/data.py"
OF_A_SOURCE = (
    "split",
    "image_column",
    "caption_column",
    "default_caption",
    "mask_column",
)  # what data and each source have


@dataclass
class SourceConfig:
    """One of several data sets, an item of `data.sources`."""

    dataset: str
    """As data.dataset."""
    split: str = "train"
    """As data.split."""
    image_column: str = "image"
    """As data.image_column."""
    caption_column: str | list[str] = "text"
    """As data.caption_column."""
    default_caption: str | None = None
    """As data.default_caption."""
    mask_column: str | None = None
    """As data.mask_column."""
    weight: float | None = None
    """Share of the samples that are of this source."""
    loss_weight: float = 1.0
    """Factor of the loss of this source's samples."""

    def check(self, field: str) -> None:
        """`field` is how errors call this source: data.sources[0], say."""
        refuse_null(self, field)
        for name in ("dataset", "caption_column", "mask_column"):
            if getattr(self, name) in ("", []):
                raise InputError(f"{field}.{name}: must not be empty, got {getattr(self, name)!r}")
        if self.weight is not None and not 0 < self.weight < math.inf:
            raise InputError(f"{field}.weight: must be above 0 and finite, or null, got {self.weight}")
        if not 0 <= self.loss_weight < math.inf:
            raise InputError(f"{field}.loss_weight: must be 0 or more and finite, got {self.loss_weight}")


@dataclass
class DataConfig:
    """Images and captions, and how an image becomes a training sample."""

    dataset: str | None = None
    """A folder of photos (`cat.jpg` and its caption `cat.txt`), of images with a `metadata.jsonl`, of parquet, arrow or
    WebDataset tar files, a hub data set, or `builtin:shapes` or `builtin:placed-shapes` (need no download)."""
    split: str = "train"
    """The split of the data set to train on."""
    streaming: bool = False
    """Read the data set as a stream, for one that does not fit on the disk (also from a folder of tar files)."""
    shuffle_buffer: int = 1000
    """Rows of a stream's lane that are shuffled among each other; as many of each lane are kept in memory."""
    lanes: int | None = None
    """Lanes of a stream, which are read side by side; each batch has as many rows of each. About the largest number of
    processes x num_workers that the run may have: fewer lanes are read by several of them, more take more memory. It
    must divide train.batch_size; null: the largest number up to 8 that does."""
    lanes_fixed: bool = False
    """A lane has the same files in each epoch, in another order: a machine finds them in its cache again. Otherwise all
    files are dealt anew."""
    stream_cache_gb: float = 10.0
    """Up to how much of what a stream reads from other machines (`hf://`, `s3://`, `https://`) is kept in `cache_dir`,
    for all processes of a machine together; 0: nothing."""
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
    text, default_caption: null, mask_column: null, weight: null, loss_weight: 1.0}, the first six as the field of data
    of that name. `weight` is a source's share of the samples (for all sources or none; they are scaled to add up to 1);
    without weights every row comes once an epoch. `loss_weight` is a factor of the loss of its samples."""
    epochs: float | None = None
    """How often the data is gone through, 2.5 times, say: `train.max_steps` in other words, which is then left out."""
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
    validation_split: float = 0.0
    """Share of the images to hold out for the validation loss, chosen by their file names."""
    validation_dataset: str | None = None
    """Another data set (a folder or a hub name) for the validation loss, instead of a share of this one. It is read
    with `split`, `image_column`, `caption_column`, `default_caption` and `mask_column`, too, also where there are
    `sources`."""
    on_bad_row: Literal["stop", "skip"] = "stop"
    """What to do about a row whose image or caption cannot be read: stop, or take another row in its place and count it
    (`skipped_rows` in metrics.jsonl)."""
    buckets: Literal["auto"] | list[list[int]] | None = None
    """Sizes [height, width] to train at, of which each image gets that of the nearest aspect ratio; `auto`: sizes of
    about resolution² pixels; null: squares only. Each batch has one size."""
    cache_latents: bool = False
    """Run the VAE on each image once, before training, and keep its moments on the disk (needs center_crop)."""
    cache_text: bool = False
    """Run the text encoder on each caption once, before training, and keep its output on the disk."""
    cache_dir: str | None = None
    """Folder of these caches, and of other things that were computed about the data; null: `difftrain` in the cache of
    datasets."""
    num_workers: int = 0
    """Processes that load images, for each training process; 0: the training process does it."""

    def check(self, require: Require) -> None:
        self.check_sources(require)
        require(8 <= self.resolution <= MAX_SIDE, "resolution", f"must be from 8 to {MAX_SIDE} (MAX_SIDE in {HERE})")
        require(0 <= self.caption_dropout <= 1, "caption_dropout", "must be between 0 and 1")
        require(0 <= self.validation_split < 1, "validation_split", "must be at least 0 and below 1")
        require(0 <= self.tag_dropout <= 1, "tag_dropout", "must be between 0 and 1")
        require(self.keep_tags >= 0, "keep_tags", "must be at least 0")
        require(self.tag_separator.strip() != "", "tag_separator", "must not be empty")
        for name in ("keep_tags", "tag_separator"):
            is_default = getattr(self, name) == getattr(DataConfig, name)
            require(is_default or self.changes_tags, name, "goes with data.shuffle_tags or data.tag_dropout")
        rule = "cannot go with data.shuffle_tags and data.tag_dropout, which make other captions each time"
        require(not (self.cache_text and self.changes_tags), "cache_text", rule)
        both = self.validation_split and self.validation_dataset
        require(not both, "validation_dataset", "cannot go with validation_split")
        require(self.epochs is None or self.epochs > 0, "epochs", "must be above 0, or null")
        require(self.shuffle_buffer >= 1, "shuffle_buffer", "must be at least 1")
        require(self.lanes is None or self.lanes >= 1, "lanes", "must be at least 1, or null")
        require(self.stream_cache_gb >= 0, "stream_cache_gb", "must be 0 or more")
        for name in ("lanes", "lanes_fixed"):
            require(not getattr(self, name) or self.streaming, name, "goes with data.streaming")
        has_one_crop = not self.cache_latents or self.center_crop
        require(has_one_crop, "cache_latents", "needs data.center_crop (one crop is kept)")
        sizes = self.buckets if isinstance(self.buckets, list) else [[8, 8]]
        are_sizes = all(len(size) == 2 and min(size) >= 8 and max(size) <= MAX_SIDE for size in sizes)
        rule = f"must be sizes [height, width] from 8 to {MAX_SIDE}, or auto"
        require(len(sizes) > 0 and are_sizes, "buckets", rule)
        ratios = [size[0] / size[1] for size in sizes]
        require(len(set(ratios)) == len(ratios), "buckets", "must have different aspect ratios")
        rule = f"must be from 0 to {MAX_WORKERS} (MAX_WORKERS in {HERE})"
        require(0 <= self.num_workers <= MAX_WORKERS, "num_workers", rule)
        if self.streaming:
            require(not self.validation_split, "validation_split", "cannot go with streaming (validation_dataset can)")
            for source in [self, *(self.sources or [])]:
                is_builtin = source.dataset is not None and source.dataset.startswith("builtin:")
                field = "dataset" if source is self else "sources"
                require(not is_builtin, field, "streaming is for folders and the hub")
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

    def check_sources(self, require: Require) -> None:
        """The rules of `dataset`, `sources` and their columns."""
        require(self.dataset != "", "dataset", "must not be empty")
        require(self.cache_dir != "", "cache_dir", "must not be empty")
        require(self.dataset is None or self.sources is None, "dataset", "cannot go with data.sources")
        require(self.dataset is not None or self.sources is not None, "dataset", "needed, or else data.sources")
        require(self.sources != [], "sources", "must have at least one source")
        require(self.caption_column not in ("", []), "caption_column", "must not be empty")
        require(self.mask_column != "", "mask_column", "must not be empty")
        weights = [source.weight for source in self.sources or []]
        for i, source in enumerate(self.sources or []):
            source.check(f"data.sources[{i}]")
            if (source.weight is None) != (weights[0] is None):
                rule = "either all sources have a weight or none has"
                raise InputError(f"data.sources[{i}].weight: {rule}, got {weights}")
        if self.sources is not None and self.validation_dataset is None:  # these would have no effect
            for name in OF_A_SOURCE:
                is_default = getattr(self, name) == getattr(DataConfig, name)
                require(is_default, name, "goes with data.dataset; each of data.sources has its own")
