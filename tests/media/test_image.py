import numpy as np
import pytest
import torch
from helpers import encode
from PIL import Image

from difftrain_utils.config.data import DataConfig
from difftrain_utils.errors import InputError, RowError
from difftrain_utils.media.image import MIDDLE, Row, crop_of, open_image, read, resize_and_crop, to_pixel_values


class TestOpenImage:
    def pixels(self, image: Image.Image, format: str = "PNG", **options) -> np.ndarray:
        opened = open_image(encode(image, format, **options), "test")
        assert opened.mode == "RGB"
        return np.asarray(opened)

    def test_transparency_shows_white(self):
        image = Image.new("RGBA", (4, 4), (255, 0, 0, 255))
        image.putpixel((0, 0), (0, 0, 0, 0))
        image.putpixel((1, 0), (0, 0, 0, 128))
        pixels = self.pixels(image)
        assert pixels[0, 0].tolist() == [255, 255, 255] and pixels[3, 3].tolist() == [255, 0, 0]
        assert abs(int(pixels[0, 1, 0]) - 127) <= 1

    def test_a_palette_is_looked_up_with_its_transparent_colour(self):
        image = Image.new("P", (4, 4), 0)
        image.putpalette([0, 0, 255, 0, 255, 0])
        image.putpixel((0, 0), 1)
        assert self.pixels(image)[0, 0].tolist() == [0, 255, 0]
        pixels = self.pixels(image, transparency=1)
        assert pixels[0, 0].tolist() == [255, 255, 255] and pixels[3, 3].tolist() == [0, 0, 255]

    def test_greyscale_has_three_equal_channels(self):
        assert self.pixels(Image.new("L", (4, 4), 77))[2, 2].tolist() == [77, 77, 77]
        grey = Image.new("LA", (4, 4), (77, 0))
        assert self.pixels(grey)[2, 2].tolist() == [255, 255, 255]

    def test_sixteen_bits_are_scaled(self):
        ramp = np.linspace(0, 65535, 16).astype(np.uint16).reshape(4, 4)
        pixels = self.pixels(Image.fromarray(ramp))
        assert np.abs(pixels[..., 0].ravel().astype(float) - np.linspace(0, 255, 16)).max() <= 1

    def test_an_image_is_turned_upright(self):
        image = Image.new("RGB", (8, 4), "blue")
        image.paste("red", (0, 0, 4, 4))
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned by 90 degrees clockwise
        pixels = self.pixels(image, exif=exif)
        assert pixels.shape == (8, 4, 3)
        assert pixels[0, 0].tolist() == [255, 0, 0] and pixels[7, 0].tolist() == [0, 0, 255]

    def test_cmyk(self):
        assert np.abs(self.pixels(Image.new("CMYK", (8, 8)), "JPEG").astype(int) - 255).max() <= 2

    @pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
    @pytest.mark.parametrize("edge", [11, 15])  # Pillow warns of the first and refuses the second
    def test_what_is_above_pillows_limit_is_refused(self, monkeypatch, edge):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        assert self.pixels(Image.new("L", (10, 10))).shape == (10, 10, 3)
        with pytest.raises(RowError, match=rf"cat.png: an image of {edge**2} pixels; the limit is 100 "):
            open_image(encode(Image.new("L", (edge, edge))), "cat.png")

    def test_what_is_no_image_is_refused_by_name(self):
        with pytest.raises(InputError, match=r"cat.png: not an image"):
            open_image(b"no image", "cat.png")
        rng = np.random.default_rng(0)
        content = encode(Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)))
        with pytest.raises(InputError, match=r"cat.png: cannot decode"):
            open_image(content[: len(content) // 2], "cat.png")


@pytest.mark.parametrize("target", [(64, 64), (48, 96), (96, 40)])
@pytest.mark.parametrize("size", [(300, 200), (200, 300), (250, 250)])
def test_nothing_is_squeezed(target, size):
    """Steps of x and y are of the same length, in an image whose red grows to the right and whose green grows
    downwards."""
    width, height = size
    x, y = np.meshgrid(np.arange(width) * 255 / 300, np.arange(height) * 255 / 300)
    image = Image.fromarray(np.stack([x, y, 0 * x], -1).round().astype(np.uint8))
    config = DataConfig("memory", image_interpolation="bilinear")
    red, green, _ = resize_and_crop(image, crop_of(image, target), config)
    across = (red[:, -3] - red[:, 2]).mean() / (target[1] - 5)
    down = (green[-3] - green[2]).mean() / (target[0] - 5)
    scale = max(target[0] / height, target[1] / width)
    assert across.item() == pytest.approx(down.item(), rel=0.03)
    assert across.item() == pytest.approx(2 / 300 / scale, rel=0.03)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(
    ("size", "across", "down", "covering", "left", "top"),
    [
        ((19, 16), 0.0, 0.0, (19, 16), 0, 0),
        ((19, 16), 0.5, 0.5, (19, 16), 2, 0),
        ((19, 16), 0.999, 0.999, (19, 16), 3, 0),
        ((32, 44), 0.999, 0.25, (16, 22), 0, 1),
        ((8, 8), 0.999, 0.999, (16, 16), 0, 0),
    ],
)
def test_a_crop_says_where_it_is(size, across, down, covering, left, top, flip):
    crop = crop_of(Image.new("RGB", size), (16, 16), across, down, flip)
    seen_left = covering[0] - 16 - left if flip else left
    assert crop == (covering, left, top, (size[1], size[0], top, seen_left, 16, 16))


def test_an_evaluation_sees_the_middle():
    ramp = np.tile(np.arange(20, dtype=np.uint8)[None, :, None], (16, 1, 3))
    row = Row("ramp", {"bytes": encode(Image.fromarray(ramp)), "path": None}, "")
    sample = read(row, MIDDLE, (16, 16), DataConfig("memory"))
    assert torch.equal(sample["pixel_values"], to_pixel_values(Image.fromarray(ramp[:, 2:18])))
    assert sample["sizes"].tolist() == [16, 20, 0, 2, 16, 16]
