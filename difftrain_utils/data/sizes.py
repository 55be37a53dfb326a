"""The sizes of all images, by their headers alone."""

import io
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from difftrain_utils.config.data import DataConfig
from difftrain_utils.data.fingerprint import remembered
from difftrain_utils.data.rows import MappedRows, Row, map_in_threads, read_bytes
from difftrain_utils.errors import RowError
from difftrain_utils.media.image import open_image_header
from difftrain_utils.terminal import progress

ORIENTATION, SIDEWAYS = 0x0112, (5, 6, 7, 8)  # EXIF's tag, and its values that swap height and width


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
                return _upright(open_image_header(file, row.name), row.name)
        except OSError as error:
            raise RowError(f"{row.name}: {error.strerror}") from None
    return _upright(open_image_header(io.BytesIO(read_bytes(row.image, row.name)), row.name), row.name)


def _has_metadata_at_the_end(file: BinaryIO) -> bool:
    """Whether a PNG has EXIF or text after its first chunk of pixels; leaves the file where it was."""
    position, kinds = file.tell(), []
    file.seek(8)  # past the signature
    while len(head := file.read(8)) == 8 and head[4:] != b"IEND":
        kinds.append(head[4:])
        file.seek(int.from_bytes(head[:4], "big") + 4, io.SEEK_CUR)
    file.seek(position)
    after_pixels = kinds[kinds.index(b"IDAT") :] if b"IDAT" in kinds else []
    return not {b"eXIf", b"tEXt", b"zTXt", b"iTXt"}.isdisjoint(after_pixels)


def _upright(image: Image.Image, name: str) -> tuple[int, int]:
    try:
        # a PNG's getexif() decodes the image where it found no EXIF before, because it may come last: seldom the case
        headers_do = image.format == "PNG" and "exif" not in image.info and not _has_metadata_at_the_end(image.fp)
        exif = Image.Image.getexif(image) if headers_do else image.getexif()
        sideways = exif.get(ORIENTATION, 1) in SIDEWAYS
    except Exception as error:
        raise RowError(f"{name}: cannot read the image's header: {error}") from None
    return (image.width, image.height) if sideways else (image.height, image.width)
