"""Windows of sounds, one after another, as rows of their own."""

import io

import numpy as np

from difftrain_utils.config.audio_data import AudioDataConfig
from difftrain_utils.data.clips import spread
from difftrain_utils.data.fingerprint import remembered
from difftrain_utils.data.rows import MappedRows, map_in_threads
from difftrain_utils.errors import RowError
from difftrain_utils.media.audio import read_header
from difftrain_utils.terminal import progress


def sound_lengths(rows: MappedRows, config: AudioDataConfig) -> np.ndarray:
    """int64 of shape (len(rows),): the samples of each sound at `data.sampling_rate`. Remembered on the disk while no
    file changes. In a run of several processes call it on the main one first.

    0 stands for a sound that cannot be trained on, where `data.on_bad_row` is skip.

    Raises:
        RowError: a sound cannot be trained on, and `data.on_bad_row` is stop.
    """

    def length(index: int) -> int:
        try:
            return read_header(rows[index], config).length_at(config.sampling_rate)
        except RowError:
            if config.on_bad_row == "stop":
                raise
            return 0

    def compute() -> bytes:
        found = progress(map_in_threads(length, range(len(rows))), len(rows), "Reading the sounds' lengths")
        buffer = io.BytesIO()
        np.save(buffer, np.fromiter(found, np.int64, len(rows)))
        return buffer.getvalue()

    name = f"sounds-{config.sampling_rate}-{config.min_length_in_s:g}.npy"
    content = remembered(name, compute, lambda: rows.identity(config), config)
    return np.load(io.BytesIO(content), allow_pickle=False)


def spread_windows(rows: MappedRows, config: AudioDataConfig) -> MappedRows:
    """Each window of the sounds, one after another, as a row of its own (`data.window` all). A sound that is shorter
    than one stays one row, and so does what cannot be read, which is skipped. In a run of several processes call it on
    the main one first. Raises RowError: see `sound_lengths`."""
    return spread(rows, np.maximum(sound_lengths(rows, config) // config.waveform_length, 1))
