"""Images: recognised, decoded as a viewer shows them, and brought to the size that is trained on."""

import io
import re
import warnings
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from difftrain_utils.config.data import DataConfig
from difftrain_utils.errors import RowError, one_line

ORIENTATION, SIDEWAYS = 0x0112, (5, 6, 7, 8)  # EXIF's tag, and its values that swap height and width

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # it is an error here: open_image_header


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
    return to_pixel_values(_cut_out(image, crop, config, flip))


def resize_and_crop_mask(mask: Image.Image, crop: Crop, config: DataConfig, flip: bool = False) -> torch.Tensor:
    """The same of a greyscale mask: float32 of shape (1, height, width) in [0, 1], 1 where it is white."""
    return torch.from_numpy(np.array(_cut_out(mask, crop, config, flip)))[None].to(torch.float32).div_(255)


def _cut_out(image: Image.Image, crop: Crop, config: DataConfig, flip: bool) -> Image.Image:
    image = image.resize(crop.covering, Image.Resampling[config.image_interpolation.upper()])
    height, width = crop.sizes[4:]
    image = image.crop((crop.left, crop.top, crop.left + width, crop.top + height))
    return ImageOps.mirror(image) if flip else image


def to_square(image: Image.Image, config: DataConfig) -> tuple[torch.Tensor, Crop]:
    """The middle of an image at `data.resolution`, as evaluations see it, and its crop."""
    crop = crop_of(image, (config.resolution, config.resolution))
    return resize_and_crop(image, crop, config), crop


def to_pixel_values(image: Image.Image) -> torch.Tensor:
    """An RGB image as float32 of shape (3, height, width) in [-1, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).to(torch.float32).div_(127.5).sub_(1)
