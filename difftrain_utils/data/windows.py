"""Windows of sounds, one after another, as rows of their own."""

import numpy as np
from accelerate import Accelerator

from difftrain_utils.config.audio_data import AudioDataConfig
from difftrain_utils.data.clips import spread
from difftrain_utils.data.rows import MappedRows
from difftrain_utils.data.sizes import remembered_sizes
from difftrain_utils.files import text_digest
from difftrain_utils.media.audio import Row, library_versions, read_header


def sound_lengths(rows: MappedRows, config: AudioDataConfig) -> np.ndarray:
    """int64 of shape (len(rows),): the samples of each sound at `data.sampling_rate`. Remembered on the disk while no
    file changes. In a run of several processes call it on the main one first.

    0 stands for a sound that cannot be trained on, where `data.on_bad_row` is skip.

    Raises:
        RowError: a sound cannot be trained on, and `data.on_bad_row` is stop.
    """

    def length(row: Row) -> tuple[int]:
        return (read_header(row, config).length_at(config.sampling_rate),)

    reader = text_digest(f"{library_versions()}")[:8]  # another one may read what this one cannot
    name = f"sounds-{config.sampling_rate}-{config.min_length_in_s:g}-{reader}.npy"
    return remembered_sizes(name, rows, length, 1, "Reading the sounds' lengths", config)[:, 0]


def spread_windows(accelerator: Accelerator, rows: MappedRows, config: AudioDataConfig) -> MappedRows:
    """Each window of the sounds, one after another, as a row of its own (`data.window` all). A sound that is shorter
    than one stays one row, and so does what cannot be read, which is skipped. Prints what is left out. In a run of
    several processes call it on the main one first. Raises RowError: see `sound_lengths`."""
    return spread(accelerator, rows, sound_lengths(rows, config), config.waveform_length, "sounds")
