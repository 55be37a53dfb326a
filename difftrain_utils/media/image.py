"""Images: recognised, decoded as a viewer shows them, and brought to the size that is trained on."""

import hashlib
import io
import itertools
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import fsspec
import numpy as np
import pyarrow.compute as pc
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from difftrain_utils.config.data import DataConfig, SourceConfig
from difftrain_utils.errors import RowError, counted, one_line
from difftrain_utils.files import local_path, new_file
from difftrain_utils.keyed_random import generator_for
from difftrain_utils.media.captions import captions_in, captions_of, find_caption_problems
from difftrain_utils.media.grids import labelled_grid

ORIENTATION, SIDEWAYS = 0x0112, (5, 6, 7, 8)  # EXIF's tag, and its values that swap height and width
HALF_WHITE = 128

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # it is an error here: open_image_header


# ── What is asked of a medium (media.py) ─────────────────────────────────────────────────────────────────────
NOUN, HAS_CAPTIONS = "images", True


class Row(NamedTuple):
    """A row as it is stored: how errors call it, the undecoded `datasets.Image`, its captions, and where its source has
    masks that of its mask, too."""

    name: str
    image: dict[str, Any] | None
    captions: Any
    mask: dict[str, Any] | None = None


def file_columns(source: SourceConfig) -> list[tuple[str, str]]:
    columns = [(source.image_column, "image_column"), (source.mask_column, "mask_column")]
    return [(column, field) for column, field in columns if column]


def text_columns(source: SourceConfig) -> list[tuple[str, str]]:
    columns = [source.caption_column] if isinstance(source.caption_column, str) else source.caption_column
    return [(column, "caption_column") for column in columns]


def row_of(content: dict[str, Any], name: str, source: SourceConfig, texts: list[tuple[list[str], Any]]) -> Row:
    """A row out of its columns; an image that is a file is called by its path."""
    image = content[source.image_column]
    return Row(path_of(image) or name, image, captions_in(content, texts, source), mask_in(content, source))


def files(part) -> Iterator[tuple[list[str | None], np.ndarray]]:
    """The paths of images and masks, and whether they are files that hold them."""
    masks = paths_in(part, part.source.mask_column) if part.source.mask_column else ()
    return itertools.chain(paths_in(part, part.source.image_column), masks)


def limits(config: DataConfig) -> tuple[Any, ...]:
    return (Image.MAX_IMAGE_PIXELS,)


def lasting_names(part) -> Iterator[list[str]]:
    """The images' file names without their folders."""
    return file_names(part, part.source.image_column)


def check(row: Row, index: int, config: DataConfig) -> list[Any]:
    """What tells a row from others, having looked at its headers: the file's name, so that a moved folder keeps its
    fingerprint, the captions, and the digests of image and mask; null for what is not there.

    Raises:
        RowError: an image that Pillow does not know, a caption that is no string, or a mask of another size, unless
            `data.on_bad_row` is skip.
    """
    content, mask, captions = None, None, [row.captions] if isinstance(row.captions, str) else row.captions
    try:
        content = read_bytes(row.image, row.name)
        captions_of(captions, row.name)
        image = open_image_header(io.BytesIO(content), row.name)
        if row.mask is not None:
            mask = read_bytes(row.mask, mask_name(row))
            header = open_image_header(io.BytesIO(mask), mask_name(row))
            check_opaque(header, row)
            check_mask_size(upright_size(header, mask_name(row)), upright_size(image, row.name), row)
    except RowError:
        if config.on_bad_row == "stop":
            raise
    contents = [content] if row.mask is None else [content, mask]
    digests = [each if each is None else hashlib.sha256(each).hexdigest() for each in contents]
    return [file_name(path_of(row.image), index), captions, *digests]


class Place(NamedTuple):
    """Which part of an image a sample has: so far across and down, in [0, 1), and whether it is mirrored."""

    across: float = 0.5
    down: float = 0.5
    flip: bool = False


MIDDLE = Place()


def place(config: DataConfig, seed: int, k: int) -> Place:
    """Sample k's."""
    flip = config.random_flip and generator_for(seed, "flip", k).random() < 0.5
    if config.center_crop:
        return MIDDLE._replace(flip=flip)
    return Place(*generator_for(seed, "crop", k).random(2).tolist(), flip)


def size_of(config: DataConfig) -> tuple[int, int]:
    """(height, width) of what is trained on where there are no buckets."""
    return config.resolution, config.resolution


def describe(number: int, config: DataConfig) -> str:
    return counted(number, NOUN)


def describe_size(config: DataConfig) -> str:
    return f"{config.resolution}x{config.resolution} pixels"


def read(row: Row, place: Place, size: tuple[int, int], config: DataConfig, has_masks: bool = False) -> dict[str, Any]:
    """The place in a row's image as a sample of `size` (height, width) has it: "pixel_values", (3, height, width)
    float32 in [-1, 1], the "sizes" of its crop, and where there are masks "mask", (1, height, width) in [0, 1].

    Raises:
        RowError: the image or the mask is missing, damaged, too large or of another size.
    """
    image = read_image(row)
    crop = crop_of(image, size, *place)
    sample = {"pixel_values": resize_and_crop(image, crop, config, place.flip), "sizes": torch.tensor(crop.sizes)}
    if has_masks:
        sample["mask"] = resize_and_crop_mask(read_mask(row, image), crop, config, place.flip)
    return sample


def find_problems(row: Row, config: DataConfig) -> tuple[list[str], list[tuple[str, str]], None]:
    """The captions as the model is told them, and ("error" or "warning", message) for what is wrong with a row, whose
    image is decoded for that."""
    problems = image_problems(row, config)
    captions, of_captions = find_caption_problems(row.captions, row.name, config)
    return captions, problems + of_captions, None


def token_problems(name: str, texts: list[str], tokenizer, config: DataConfig) -> Iterator[tuple[str, str]]:
    """The same of captions that have more tokens than the model takes."""
    limit = tokenizer.model_max_length
    for caption in texts:
        if (number := len(tokenizer(caption, verbose=False).input_ids)) > limit:
            yield "warning", f"{name}: a caption of {number} tokens, which is cut off after {limit}"


def save(made: list[Image.Image], labels: list[str], path: Path) -> None:
    """Write images with their labels as one PNG file, `path` with that ending. Raises RunError if it cannot."""
    with new_file(path.with_suffix(".png")) as partial:
        labelled_grid(made, labels).save(partial, "PNG")


# ── Files of images ──────────────────────────────────────────────────────────────────────────────────────────
def path_of(value: dict[str, Any] | None) -> str | None:
    """The path of an undecoded `datasets.Image`, or `Video`, where it has one."""
    return (value or {}).get("path")


def file_name(path: str | None, index: int) -> str:
    """A file's name without its folders; of what has none, its row."""
    return os.path.basename(path or f"row {index}")


def image_problems(row: Row, config: DataConfig) -> list[tuple[str, str]]:
    """What `find_problems` says of the image and its mask."""
    problems = []
    try:
        image = read_image(row)
        if (brightest := read_mask(row, image).getextrema()[1]) < HALF_WHITE:
            problems.append(
                ("warning", f"{mask_name(row)}: no part counts for much, the brightest is {brightest} of 255")
            )
        width, height = image.size
        if min(width, height) < config.resolution and not (config.no_upscale and config.buckets):
            fate = "left out, for it is smaller than" if config.no_upscale else "to be enlarged to"
            problems.append(("warning", f"{row.name}: {width} × {height} pixels, {fate} {config.resolution}"))
    except RowError as error:
        problems.append(("error", str(error)))
    return problems


def mask_in(row: dict[str, Any], source: SourceConfig) -> dict[str, Any] | None:
    """A row's undecoded mask, which may be one that is not there; None where its source has no masks."""
    if source.mask_column is None:
        return None
    return row[source.mask_column] or {"bytes": None, "path": None}


def file_names(part, column: str) -> Iterator[list[str]]:
    """The file names in a column of images or videos, some rows at a time."""
    index = 0
    for paths, _ in paths_in(part, column):
        yield [file_name(path, index + i) for i, path in enumerate(paths)]
        index += len(paths)


def paths_in(part, column: str) -> Iterator[tuple[list[str | None], np.ndarray]]:
    """The paths in a column of images or videos, and whether they are files that hold these, some rows at a time."""
    for images, rows in part.batches(column):
        # the paths alone, not the bytes, which lie in the same column
        paths, content = (pc.struct_field(images, field) for field in ("path", "bytes"))
        is_file = pc.and_(pc.is_valid(paths), pc.is_null(content))
        yield paths.take(rows).to_pylist(), is_file.take(rows).to_numpy(zero_copy_only=False)


def read_image_file(name: str) -> Image.Image:
    """The image in a file of this name. Raises RowError if there is none."""
    return open_image(read_bytes({"bytes": None, "path": str(local_path(name))}, name), name)


def read_bytes(value: dict[str, Any] | None, name: str) -> bytes:
    """The content of an undecoded `datasets.Image`, which is in the row, in a file or (of a stream) at a URL.

    Raises:
        RowError: there is none, or its file cannot be read.
    """
    if value is None or (value["bytes"] is None and value["path"] is None):
        raise RowError(f"{name}: no image")
    if value["bytes"] is not None:
        return value["bytes"]
    try:
        if "://" not in value["path"]:
            return Path(value["path"]).read_bytes()
        with fsspec.open(value["path"], "rb") as file:
            return file.read()
    except OSError as error:
        raise RowError(f"{name}: {error.strerror or one_line(error)}") from None


def read_image(row: Row) -> Image.Image:
    """The decoded image of a row. Raises RowError if it is missing, damaged or too large."""
    return open_image(read_bytes(row.image, row.name), row.name)


def read_mask(row: Row, image: Image.Image) -> Image.Image:
    """The decoded mask of a row's image, greyscale and of its size; all white where its source has no masks.

    Raises:
        RowError: the mask is missing, damaged, transparent or of another size.
    """
    if row.mask is None:
        return Image.new("L", image.size, 255)
    content = read_bytes(row.mask, mask_name(row))
    check_opaque(open_image_header(io.BytesIO(content), mask_name(row)), row)
    mask = open_image(content, mask_name(row)).convert("L")
    check_mask_size(mask.size[::-1], image.size[::-1], row)
    return mask


def mask_name(row: Row) -> str:
    """How errors call a row's mask."""
    return f"{row.name}: mask {row.mask['path'] or ''}".rstrip()


def check_opaque(header: Image.Image, row: Row) -> None:
    """Raise RowError of a mask with transparency: on white, as images are laid, all of it would count."""
    if header.has_transparency_data:
        raise RowError(f"{mask_name(row)}: must be greyscale, white where the image counts, and has transparency")


def check_mask_size(mask: tuple[int, int], image: tuple[int, int], row: Row) -> None:
    """Raise RowError unless a row's mask is as large, (height, width), as its image."""
    if mask != image:
        sizes = [f"{width} × {height}" for height, width in (image, mask)]
        raise RowError(f"{mask_name(row)}: must have the image's {sizes[0]} pixels, got {sizes[1]}")


def open_image_header(file: BinaryIO, name: str) -> Image.Image:
    """Recognise an image without decoding it, reading no more of the file than that takes.

    Raises:
        RowError: it is no image, or one that Pillow would warn of as a decompression bomb.
    """
    limit = Image.MAX_IMAGE_PIXELS
    try:
        image = Image.open(file)
        pixels = image.width * image.height
    except Image.DecompressionBombError as error:  # of twice the limit; the error says the size first
        pixels = int(re.search(r"\d+", str(error))[0])
    except UnidentifiedImageError:
        convert = " (make it a JPEG or PNG)" if name.lower().endswith((".heic", ".heif", ".jxl")) else ""
        raise RowError(f"{name}: not an image that Pillow knows{convert}") from None
    except Exception as error:
        raise RowError(f"{name}: cannot read the image's header: {one_line(error)}") from None
    if limit is not None and pixels > limit:
        raise RowError(f"{name}: an image of {pixels} pixels; the limit is {limit} (Pillow's MAX_IMAGE_PIXELS)")
    return image


def upright_size(image: Image.Image, name: str) -> tuple[int, int]:
    """(height, width) of an image of `open_image_header` as `open_image` gives it. Raises RowError if its header cannot
    be read."""
    try:
        # a PNG's getexif() decodes the image where it found no EXIF before, because it may come last: seldom the case
        headers_do = image.format == "PNG" and "exif" not in image.info and not _has_metadata_at_the_end(image.fp)
        exif = Image.Image.getexif(image) if headers_do else image.getexif()
        sideways = exif.get(ORIENTATION, 1) in SIDEWAYS
    except Exception as error:
        raise RowError(f"{name}: cannot read the image's header: {error}") from None
    return (image.width, image.height) if sideways else (image.height, image.width)


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


def open_image(content: bytes, name: str) -> Image.Image:
    """Decode an image to RGB as a viewer shows it: upright, transparency on white, 16 bits scaled to 8.

    Raises:
        RowError: it cannot be decoded.
    """
    image = open_image_header(io.BytesIO(content), name)
    try:
        image = ImageOps.exif_transpose(image)
        if image.mode == "F" and not np.isfinite(np.asarray(image)).all():
            raise ValueError("it has pixels that are infinite or no number")
        if image.mode.startswith("I"):  # 16-bit greyscale, which convert() would clip to white
            return Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8)).convert("RGB")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
        return image.convert("RGB")
    except MemoryError:  # not the image's fault
        raise
    except Exception as error:  # Pillow's decoders raise all kinds on damaged bytes
        raise RowError(f"{name}: cannot decode the image: {one_line(error)}") from None


class Crop(NamedTuple):
    """How an image becomes one of another size: scaled to `covering` (width, height), of which the box from (left, top)
    on is cut out. `sizes` are six integers: height and width of the image as it was, top and left of the box in the
    scaled (and mirrored) image, height and width of the box."""

    covering: tuple[int, int]
    left: int
    top: int
    sizes: tuple[int, int, int, int, int, int]


def crop_of(
    image: Image.Image, size: tuple[int, int], across: float = 0.5, down: float = 0.5, flip: bool = False
) -> Crop:
    """The crop of an image to `size` (height, width): as small as covers it, `across` and `down` in [0, 1) of the way,
    by default its middle. `flip`: the image will be mirrored."""
    height, width = size
    scale = max(width / image.width, height / image.height)
    covering = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    # each of the possible places is as likely as any other
    left, top = int(across * (covering[0] - width + 1)), int(down * (covering[1] - height + 1))
    seen_left = covering[0] - width - left if flip else left
    return Crop(covering, left, top, (image.height, image.width, top, seen_left, height, width))


def resize_and_crop(image: Image.Image, crop: Crop, config: DataConfig, flip: bool = False) -> torch.Tensor:
    """The pixel values of an image's crop, mirrored if `flip`: float32 of shape (3, height, width) in [-1, 1]."""
    return to_pixel_values(cut_out(image, crop, config, flip))


def resize_and_crop_mask(mask: Image.Image, crop: Crop, config: DataConfig, flip: bool = False) -> torch.Tensor:
    """The same of a greyscale mask: float32 of shape (1, height, width) in [0, 1], 1 where it is white."""
    return torch.from_numpy(np.array(cut_out(mask, crop, config, flip)))[None].to(torch.float32).div_(255)


def cut_out(image: Image.Image, crop: Crop, config: DataConfig, flip: bool) -> Image.Image:
    """An image's crop, mirrored if `flip`."""
    image = image.resize(crop.covering, Image.Resampling[config.image_interpolation.upper()])
    height, width = crop.sizes[4:]
    image = image.crop((crop.left, crop.top, crop.left + width, crop.top + height))
    return ImageOps.mirror(image) if flip else image


def to_pixel_values(image: Image.Image) -> torch.Tensor:
    """An RGB image as float32 of shape (3, height, width) in [-1, 1]."""
    return scale_bytes(to_bytes(image))


def to_bytes(image: Image.Image) -> torch.Tensor:
    """An RGB image as uint8 of shape (3, height, width)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def scale_bytes(values: torch.Tensor) -> torch.Tensor:
    """uint8 from 0 to 255 as float32 in [-1, 1], the same to the bit on each device: by a plain number, GPUs would
    multiply with its reciprocal."""
    return values.to(torch.float32).div_(torch.tensor(127.5, device=values.device)).sub_(1)
