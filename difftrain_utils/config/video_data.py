"""Videos and captions: where they are, and how they become training samples."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from difftrain_utils.config.captions import CaptionsConfig, CaptionsSource
from difftrain_utils.config.config import Require
from difftrain_utils.config.data import MAX_SIDE

MAX_FRAMES, MAX_FPS = 2**14, 1000.0  # more is a slip
HERE = "difftrain_utils/config/video_data.py"


@dataclass
class VideoSourceConfig(CaptionsSource):
    """One of several data sets, an item of `data.sources`."""

    mask_column: ClassVar[None] = None  # clips have no masks

    video_column: str = "video"
    """As data.video_column."""


@dataclass
class VideoDataConfig(CaptionsConfig):
    """Videos and captions, and how a clip of a video becomes a training sample."""

    SOURCE: ClassVar[type[CaptionsSource]] = VideoSourceConfig

    dataset: str | None = None
    """A folder of videos (`dog.mp4` and its caption `dog.txt`), of videos with a `metadata.jsonl`, of parquet, arrow or
    WebDataset tar files, a hub data set, or `builtin:moving-shapes` (needs no download). An image is a clip of one
    frame."""
    video_column: str = "video"
    """Column of the videos (a folder with a `metadata.jsonl` calls it `video`, tar files `mp4`)."""
    sources: list[VideoSourceConfig] | None = None
    """Several data sets instead of `dataset`: a list of {dataset: …, split: train, video_column: video, caption_column:
    text, default_caption: null, weight: null, loss_weight: 1.0}, the first five as the field of data of that name.
    `weight` is a source's share of the samples (for all sources or none; they are scaled to add up to 1); without
    weights every row comes once an epoch. `loss_weight` is a factor of the loss of its samples."""
    num_frames: int = 81
    """Frames of a clip; how many a model takes is its affair (Wan: 4 n + 1, LTX-Video: 8 n + 1). A video that has fewer
    of them at `fps` is a bad row, and so is an image (but see `buckets`)."""
    fps: float = 16.0
    """Frames a second of a clip, whatever the file has: a frame is the one that a player shows at its time."""
    height: int = 480
    """Of a clip in pixels; videos are scaled to cover height and width, and cropped."""
    width: int = 832
    """Of a clip in pixels."""
    window: Literal["random", "start", "middle", "all"] = "random"
    """Where in a video its clip begins: anywhere, another place each time; at the start; in the middle; or `all`: each
    clip that fits, one after another, is a row of its own."""
    center_crop: bool = False
    """Crop the centre instead of a random place. All frames of a clip have one place."""
    random_flip: bool = False
    """Mirror half of the samples (not for captions that tell left from right)."""
    image_interpolation: Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"] = "lanczos"
    """Pillow's filter for resizing."""
    buckets: list[list[int]] | None = None
    """Sizes [frames, height, width] to train at, of which each video gets one of the most frames that it has, of the
    nearest aspect ratio, and an image one of 1 frame; null: `num_frames`, `height` and `width` only. Each batch has
    one size. Held-out videos have theirs, too, and grids `num_frames`, `height` and `width`."""
    cache_latents: bool = False
    """Run the VAE on each clip once, before training, and keep its moments on the disk (needs center_crop, and a window
    that is not random)."""
    cache_text: bool = False
    """Run the text encoder on each caption once, before training, and keep its output on the disk."""

    def check(self, require: Require) -> None:
        super().check(require)
        rule = f"must be from 1 to {MAX_FRAMES} (MAX_FRAMES in {HERE})"
        require(1 <= self.num_frames <= MAX_FRAMES, "num_frames", rule)
        require(0 < self.fps <= MAX_FPS, "fps", f"must be above 0 and at most {MAX_FPS:.0f} (MAX_FPS in {HERE})")
        for name in ("height", "width"):
            rule = f"must be from 8 to {MAX_SIDE} (MAX_SIDE in difftrain_utils/config/data.py)"
            require(8 <= getattr(self, name) <= MAX_SIDE, name, rule)
        sizes = [[1, 8, 8]] if self.buckets is None else self.buckets
        are_sizes = all(len(size) == 3 and 1 <= size[0] <= MAX_FRAMES for size in sizes)
        are_sizes = are_sizes and all(8 <= side <= MAX_SIDE for size in sizes for side in size[1:])
        rule = f"must be sizes [frames, height, width], of 1 to {MAX_FRAMES} frames and sides from 8 to {MAX_SIDE}"
        require(len(sizes) > 0 and are_sizes, "buckets", rule)
        kinds = {(num_frames, height / width) for num_frames, height, width in sizes}
        require(len(kinds) == len(sizes), "buckets", "must have different frames or aspect ratios")
        rule = "cannot go with data.window all, whose clips have num_frames"
        require(self.buckets is None or self.window != "all", "buckets", rule)
        missing = [] if self.center_crop else ["data.center_crop"]
        missing += ["a data.window that is not random"] if self.window == "random" else []
        rule = f"needs {' and '.join(missing)} (one clip is kept)"
        require(not (self.cache_latents and missing), "cache_latents", rule)
        if self.streaming:
            require(self.window != "all", "window", "cannot go with data.streaming: how long videos are is not known")
            for name in ("buckets", "cache_latents", "cache_text"):
                require(not getattr(self, name), name, "cannot go with data.streaming")

    @property
    def fewest_frames(self) -> int:
        """Of a clip."""
        return self.num_frames if self.buckets is None else min(num_frames for num_frames, *_ in self.buckets)

    @property
    def are_stills(self) -> bool:
        """Whether all clips are of one frame."""
        return self.num_frames == 1 if self.buckets is None else all(size[0] == 1 for size in self.buckets)
