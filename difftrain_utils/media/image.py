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
        raise RowError(f"{name}: not an image that Pillow knows") from None
    except Exception as error:
        raise RowError(f"{name}: cannot read the image's header: {one_line(error)}") from None
    if limit is not None and pixels > limit:
        raise RowError(f"{name}: an image of {pixels} pixels; the limit is {limit} (Pillow's MAX_IMAGE_PIXELS)")
    return image


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
    image = image.resize(crop.covering, Image.Resampling[config.image_interpolation.upper()])
    height, width = crop.sizes[4:]
    image = image.crop((crop.left, crop.top, crop.left + width, crop.top + height))
    return to_pixel_values(ImageOps.mirror(image) if flip else image)


def to_square(image: Image.Image, config: DataConfig) -> tuple[torch.Tensor, Crop]:
    """The middle of an image at `data.resolution`, as evaluations see it, and its crop."""
    crop = crop_of(image, (config.resolution, config.resolution))
    return resize_and_crop(image, crop, config), crop


def to_pixel_values(image: Image.Image) -> torch.Tensor:
    """An RGB image as float32 of shape (3, height, width) in [-1, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).to(torch.float32).div_(127.5).sub_(1)
