"""How large, or long, all images, videos or sounds are, by their headers alone."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np

from difftrain_utils.config.audio_data import AudioDataConfig
from difftrain_utils.config.data import DataConfig
from difftrain_utils.config.video_data import VideoDataConfig
from difftrain_utils.data.fingerprint import remembered
from difftrain_utils.data.rows import MappedRows, map_in_threads
from difftrain_utils.errors import RowError
from difftrain_utils.media.image import Row, open_image_header, read_bytes, upright_size
from difftrain_utils.terminal import progress


def image_sizes(rows: MappedRows, config: DataConfig) -> np.ndarray:
    """int64 of shape (len(rows), 2): (height, width) of each image as `open_image` gives it, upright; nothing is
    decoded. Remembered on the disk while no file changes. In a run of several processes call it on the main one first.

    (0, 0) stands for an image that cannot be read, where `data.on_bad_row` is skip.

    Raises:
        RowError: an image is missing, too large, or none that Pillow knows, and `data.on_bad_row` is stop.
    """

    return remembered_sizes("sizes.npy", rows, _size, 2, "Reading the images' sizes", config)


def remembered_sizes(
    name: str,
    rows: MappedRows,
    size_of: Callable[[Row], tuple[int, ...]],
    length: int,
    what: str,
    config: DataConfig | VideoDataConfig | AudioDataConfig,
) -> np.ndarray:
    """int64 of shape (len(rows), length): `size_of` each row, or zeros of one that cannot be read, where
    `data.on_bad_row` is skip. Remembered on the disk under this name while no file changes. `what` a progress bar says
    is done."""

    def size(index: int) -> tuple[int, ...]:
        try:
            return size_of(rows[index])
        except RowError:
            if config.on_bad_row == "stop":
                raise
            return (0,) * length

    def compute() -> bytes:
        sizes = np.zeros((len(rows), length), np.int64)
        for index, of_row in enumerate(progress(map_in_threads(size, range(len(rows))), len(rows), what)):
            sizes[index] = of_row
        buffer = io.BytesIO()
        np.save(buffer, sizes)
        return buffer.getvalue()

    content = remembered(name, compute, lambda: rows.identity(config), config)
    return np.load(io.BytesIO(content), allow_pickle=False)


def _size(row: Row) -> tuple[int, int]:
    if row.image is not None and row.image["bytes"] is None and row.image["path"] is not None:
        try:
            with Path(row.image["path"]).open("rb") as file:  # Pillow reads the file's beginning alone
                return upright_size(open_image_header(file, row.name), row.name)
        except OSError as error:
            raise RowError(f"{row.name}: {error.strerror}") from None
    return upright_size(open_image_header(io.BytesIO(read_bytes(row.image, row.name)), row.name), row.name)
