"""The sizes of all images, by their headers alone."""

import io
from pathlib import Path

import numpy as np

from difftrain_utils.config.data import DataConfig
from difftrain_utils.data.fingerprint import remembered
from difftrain_utils.data.rows import MappedRows, map_in_threads
from difftrain_utils.errors import RowError
from difftrain_utils.media.image import Row, open_image_header, read_bytes, upright_size
from difftrain_utils.terminal import progress


def image_sizes(rows: MappedRows, config: DataConfig) -> np.ndarray:
    """int32 of shape (len(rows), 2): (height, width) of each image as `open_image` gives it, upright; nothing is
    decoded. Remembered on the disk while no file changes. In a run of several processes call it on the main one first.

    (0, 0) stands for an image that cannot be read, where `data.on_bad_row` is skip.

    Raises:
        RowError: an image is missing, too large, or none that Pillow knows, and `data.on_bad_row` is stop.
    """

    def size(index: int) -> tuple[int, int]:
        try:
            return _size(rows[index])
        except RowError:
            if config.on_bad_row == "stop":
                raise
            return 0, 0

    def compute() -> bytes:
        sizes = np.zeros((len(rows), 2), np.int32)
        found = progress(map_in_threads(size, range(len(rows))), len(rows), "Reading the images' sizes")
        for index, of_image in enumerate(found):
            sizes[index] = of_image
        buffer = io.BytesIO()
        np.save(buffer, sizes)
        return buffer.getvalue()

    return np.load(
        io.BytesIO(remembered("sizes.npy", compute, lambda: rows.identity(config), config)), allow_pickle=False
    )


def _size(row: Row) -> tuple[int, int]:
    if row.image is not None and row.image["bytes"] is None and row.image["path"] is not None:
        try:
            with Path(row.image["path"]).open("rb") as file:  # Pillow reads the file's beginning alone
                return upright_size(open_image_header(file, row.name), row.name)
        except OSError as error:
            raise RowError(f"{row.name}: {error.strerror}") from None
    return upright_size(open_image_header(io.BytesIO(read_bytes(row.image, row.name)), row.name), row.name)
