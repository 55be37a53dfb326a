"""What all videos are by their headers alone: which size each is trained at, and their clips, one after another, as
rows of their own."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import PIL
from accelerate import Accelerator

from difftrain_utils.config.config import Config
from difftrain_utils.config.video_data import VideoDataConfig
from difftrain_utils.data.buckets import cropped_share
from difftrain_utils.data.rows import MappedRows
from difftrain_utils.data.sizes import remembered_sizes
from difftrain_utils.errors import InputError, RowError
from difftrain_utils.files import text_digest
from difftrain_utils.media.recordings import remedy_for
from difftrain_utils.media.video import Row, library_versions, read_header
from difftrain_utils.processes import main_process_first


def video_sizes(rows: MappedRows, config: VideoDataConfig) -> np.ndarray:
    """int64 of shape (len(rows), 3): (frames at `data.fps`, height, width) of each video as it is shown; an image has
    one frame. Remembered on the disk while no file changes. In a run of several processes call it on the main one
    first.

    Zeros stand for a video that cannot be read, where `data.on_bad_row` is skip.

    Raises:
        RowError: a video cannot be read, and `data.on_bad_row` is stop.
    """

    def size(row: Row) -> tuple[int, int, int]:
        header = read_header(row)
        return header.num_frames(config.fps), header.height, header.width

    readers = text_digest(f"{library_versions()} {PIL.__version__}")[:8]  # another one may read what this one cannot
    name = f"videos-{float(config.fps)!r}-{readers}.npy"
    return remembered_sizes(name, rows, size, 3, "Reading the videos' lengths", config)


def refuse_short(rows: MappedRows, sizes: np.ndarray, config: VideoDataConfig) -> None:
    """Raise RowError for the first video that has fewer frames than a clip, unless such rows are skipped."""
    short = np.flatnonzero(sizes[:, 0] < config.fewest_frames) if config.on_bad_row == "stop" else ()
    for index in short[:1]:
        frames = f"{sizes[index, 0]} frames at {config.fps:g} a second"
        raise RowError(f"{rows[int(index)].name}: {frames}, too short for {config.fewest_frames}{remedy_for(config)}")


def tell_skipped(accelerator: Accelerator, rows: MappedRows, noun: str, config: VideoDataConfig) -> None:
    """Print how many rows are skipped (`count_short`). In a run of several processes call it on the main one first.
    Raises InputError if all are, which would else show when the first is due: of held-out ones after hours."""
    if skipped := count_short(rows, config):
        why = f"unreadable or too short for {config.num_frames} frames at {config.fps:g} a second"
        told = f"data.on_bad_row: {skipped} of {len(rows)} {noun} are skipped, {why}"
        if skipped == len(rows):
            raise InputError(f"{told}; none is left")
        accelerator.print(told)


def count_short(rows: MappedRows, config: VideoDataConfig) -> int:
    """How many rows are skipped because their video cannot be read or has fewer frames than a clip. In a run of several
    processes call it on the main one first."""
    if config.on_bad_row == "stop":
        return 0
    return int((video_sizes(rows, config)[:, 0] < config.fewest_frames).sum())


# ── Clips one after another ──────────────────────────────────────────────────────────────────────────────────
def spread_clips(accelerator: Accelerator, rows: MappedRows, config: VideoDataConfig) -> MappedRows:
    """Each clip of the videos, one after another, as a row of its own (`data.window` all). A video that cannot be read,
    or has none, stays one row, which is skipped. Prints what is left out. In a run of several processes call it on the
    main one first.

    Raises:
        RowError: a video cannot be read, or is too short for a clip, and `data.on_bad_row` is stop.
    """
    sizes = video_sizes(rows, config)
    refuse_short(rows, sizes, config)
    return spread(accelerator, rows, sizes[:, 0], config.num_frames, "videos")


def spread(accelerator: Accelerator, rows: MappedRows, lengths: np.ndarray, window: int, noun: str) -> MappedRows:
    """Each window of the rows, which have these lengths, (len(rows),), as a row of its own; of one that is too short
    for a window the row as it is."""
    counts, parts, end = np.maximum(lengths // window, 1), [], 0
    left_out = np.maximum(lengths - counts * window, 0).sum() / max(lengths.sum(), 1)
    accelerator.print(
        f"data.window all: {counts.sum()} windows of {len(rows)} {noun}; {left_out:.0%} of their length is left out, "
        "the rests after the last windows"
    )
    for part in rows.parts:
        start, end = end, end + len(part)
        indices = np.arange(len(part)) if part.indices is None else part.indices
        windows = np.concatenate([np.arange(count) for count in counts[start:end]])
        parts.append(dataclasses.replace(part, indices=np.repeat(indices, counts[start:end]), windows=windows))
    return MappedRows(parts)


# ── Buckets of frames and sizes ──────────────────────────────────────────────────────────────────────────────
class ClipBuckets:
    """The size (frames, height, width) that each video is trained at: of those of the most frames that it has, that of
    the nearest aspect ratio. So images go to buckets of one frame.

    A bucket with fewer videos than a batch is left out, the smallest first, of equals the longest, and its videos go to
    others. `sizes` (n, 3) are the videos' (frames, height, width); -1 stands for no bucket, of one that is too short or
    cannot be read.
    """

    def __init__(self, sizes: np.ndarray, buckets: Sequence[tuple[int, int, int]], batch_size: int):
        self.sizes = sorted(tuple(size) for size in buckets)
        is_readable = sizes[:, 0] > 0
        ratios = np.log(np.where(is_readable, sizes[:, 2], 1) / np.where(is_readable, sizes[:, 1], 1))
        while True:
            frames, heights, widths = np.array(self.sizes).T
            fits = sizes[:, :1] >= frames
            is_longest = fits & (frames == np.where(fits, frames, -1).max(axis=1, keepdims=True))
            distances = np.where(is_longest, np.abs(ratios[:, None] - np.log(widths / heights)), np.inf)
            self.of_row = np.where(fits.any(axis=1), distances.argmin(axis=1), -1).astype(np.int16)
            self.counts = np.bincount(self.of_row[self.of_row >= 0], minlength=len(self.sizes))
            if len(self.sizes) == 1 or self.counts.min() >= batch_size:
                break
            self.sizes.pop(np.flatnonzero(self.counts == self.counts.min())[-1])
        is_in = self.of_row >= 0
        self.cropped = cropped_share(sizes[is_in, 1:], np.array(self.sizes)[self.of_row[is_in], 1:])
        self.remainder = int((self.counts % batch_size).sum())

    def size_of(self, row: int) -> tuple[int, int, int]:
        """(frames, height, width) of a row's bucket."""
        return self.sizes[self.of_row[row]]

    def describe_sizes(self) -> str:
        """In words, the sizes, and of several how many videos each has."""
        named = [f"{f} frame{'s' * (f > 1)} of {h}x{w}" for f, h, w in self.sizes]
        if len(named) == 1:
            return f"in 1 size: {named[0]}"
        of_each = [f"{number} of {size}" for number, size in zip(self.counts, named, strict=True)]
        return f"in {len(named)} sizes: {', '.join(of_each)}"

    def describe(self) -> str:
        """In words: how many videos each has, what cropping cuts off, what an epoch leaves out."""
        counts = ", ".join(f"{f}x{h}x{w}: {n}" for (f, h, w), n in zip(self.sizes, self.counts, strict=True))
        return (
            f"Buckets (frames x height x width: videos): {counts}; cropping cuts {self.cropped.mean():.1%} of a frame "
            f"(at most {self.cropped.max():.1%}); an epoch leaves out {self.remainder} videos, others each time"
        )


def check_buckets(family, config: VideoDataConfig) -> None:
    """Raise InputError if one of `data.buckets` is none that the model can take."""
    for num_frames, height, width in config.buckets:
        family.check_frames(num_frames, "data.buckets")
        family.check_size(height, width, "data.buckets")


def fit_clips(accelerator: Accelerator, family, rows: MappedRows, config: Config) -> tuple[MappedRows, ClipBuckets]:
    """The rows that have a bucket of `data.buckets`, and these. Prints what is made of the videos.

    Raises:
        InputError: a size is none that the model can take.
        RowError: a video cannot be read, or is too short for all buckets, and `data.on_bad_row` is stop.
    """
    data = config.data
    check_buckets(family, data)
    with main_process_first(accelerator):
        sizes = video_sizes(rows, data)
    refuse_short(rows, sizes, data)
    buckets = ClipBuckets(sizes, data.buckets, config.train.batch_size)
    is_kept = buckets.of_row >= 0
    if not is_kept.all():
        why = "too short, unreadable, or too few of their size for a batch"
        accelerator.print(f"data.buckets: {len(sizes) - is_kept.sum()} of {len(sizes)} videos are left out, {why}")
        rows, buckets.of_row = rows.take(np.flatnonzero(is_kept)), buckets.of_row[is_kept]
    accelerator.print(buckets.describe())
    return rows, buckets


def fit_held_out(
    accelerator: Accelerator, rows: MappedRows, buckets: ClipBuckets, config: VideoDataConfig
) -> MappedRows:
    """The held-out rows that have one of the sizes that are trained at, `buckets`, each to be evaluated at its own.

    Raises:
        InputError: there is none.
        RowError: a video cannot be read, or is too short for all sizes, and `data.on_bad_row` is stop.
    """
    with main_process_first(accelerator):
        sizes = video_sizes(rows, config)
    refuse_short(rows, sizes, config)
    fewest = min(num_frames for num_frames, *_ in buckets.sizes)
    is_kept = sizes[:, 0] >= fewest
    if not is_kept.any():
        raise InputError(f"data.buckets: no held-out video has {fewest} frames, the fewest that are trained at")
    if not is_kept.all():
        left_out = f"{len(sizes) - is_kept.sum()} of {len(sizes)} held-out videos are left out"
        accelerator.print(f"data.buckets: {left_out}, unreadable or of fewer than {fewest} frames")
    rows = rows.take(np.flatnonzero(is_kept))
    rows.buckets = ClipBuckets(sizes[is_kept], buckets.sizes, batch_size=1)  # none is too small
    return rows
