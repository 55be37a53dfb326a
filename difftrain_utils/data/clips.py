"""The clips of all videos, one after another, as rows of their own, by the videos' headers alone."""

import dataclasses
import io

import numpy as np

from difftrain_utils.config.video_data import VideoDataConfig
from difftrain_utils.data.fingerprint import remembered
from difftrain_utils.data.rows import MappedRows, map_in_threads
from difftrain_utils.errors import RowError
from difftrain_utils.media.video import check_length, read_header
from difftrain_utils.terminal import progress


def spread_clips(rows: MappedRows, config: VideoDataConfig) -> MappedRows:
    """Each clip of the videos, one after another, as a row of its own (`data.window` all). Raises RowError: see
    `clip_counts`."""
    counts, parts, end = clip_counts(rows, config), [], 0
    for part in rows.parts:
        start, end = end, end + len(part)
        indices = np.arange(len(part)) if part.indices is None else part.indices
        windows = np.concatenate([np.arange(count) for count in counts[start:end]])
        parts.append(dataclasses.replace(part, indices=np.repeat(indices, counts[start:end]), windows=windows))
    return MappedRows(parts)


def clip_counts(rows: MappedRows, config: VideoDataConfig) -> np.ndarray:
    """int32 of shape (len(rows),): how many clips each video has one after another, by its header; 1 of one that cannot
    be read, or has none, where `data.on_bad_row` is skip. Remembered on the disk while no file changes. In a run of
    several processes call it on the main one first.

    Raises:
        RowError: a video cannot be read, or is too short for a clip, and `data.on_bad_row` is stop.
    """

    def count(index: int) -> int:
        row = rows[index]
        try:
            return max(check_length(read_header(row), row.name, config) // config.num_frames, 1)
        except RowError:
            if config.on_bad_row == "stop":
                raise
            return 1

    def compute() -> bytes:
        found = progress(map_in_threads(count, range(len(rows))), len(rows), "Reading the videos' lengths")
        buffer = io.BytesIO()
        np.save(buffer, np.fromiter(found, np.int32, len(rows)))
        return buffer.getvalue()

    name = f"clips-{config.num_frames}-{config.fps:g}.npy"
    content = remembered(name, compute, lambda: rows.identity(config), config)
    return np.load(io.BytesIO(content), allow_pickle=False)
