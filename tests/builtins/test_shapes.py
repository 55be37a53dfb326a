import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from difftrain_utils.builtins.shapes import (
    COLORS,
    PLACED,
    PROMPTS,
    SHAPES,
    SIDES,
    count_preferred,
    count_right,
    draw_pair,
    draw_shape,
    judge,
)
from difftrain_utils.builtins.tiny.parts import shapes_vae
from difftrain_utils.commands import draw_shapes
from difftrain_utils.errors import InputError
from difftrain_utils.media.image import to_pixel_values

HERE = Path(__file__).parent


def test_there_are_enough_colours_and_shapes():
    assert len(COLORS) >= 6 and len(SHAPES) >= 3
    assert len(set(PROMPTS)) == len(COLORS) * len(SHAPES)


@pytest.mark.parametrize(("image_size", "count"), [(24, 36), (32, 180), (64, 36), (128, 36)])
def test_the_judge_names_what_was_drawn(image_size, count):
    for index in range(count):
        image, caption = draw_shape(index, image_size, seed=5)
        assert "a {} {}".format(*judge(image)) == caption


def test_the_judge_names_the_side():
    images, captions = zip(*(draw_shape(index, 32, captions=PLACED) for index in range(72)), strict=True)
    assert count_right(images, captions) == 72
    mirrored = [image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for image in images]
    assert count_right(mirrored, captions) == 0
    anywhere = [draw_shape(index, 32)[0] for index in range(72)]
    for side in SIDES:  # by chance
        assert count_right(anywhere, [f"{prompt} on the {side}" for prompt in PROMPTS * 4]) < 28


def test_the_judge_prefers_what_the_pairs_do():
    chosen, rejected, captions = zip(*(draw_pair(index, 32) for index in range(36)), strict=True)
    assert count_right(chosen, captions) == count_right(rejected, captions) == 36
    assert (count_preferred(chosen, captions), count_preferred(rejected, captions)) == (36, 0)
    for side, number in (("left", 36), ("right", 0)):  # what a prompt asks for counts, too
        assert count_preferred(chosen, [f"{caption} on the {side}" for caption in captions]) == number


@pytest.mark.parametrize("caption", ["hello world", "a purple elephant", "a red circle on the top", "A red circle"])
def test_what_the_judge_does_not_know_is_refused(caption):
    with pytest.raises(ValueError, match=f"'{caption}' is no caption of builtin:shapes or builtin:placed-shapes"):
        count_right([draw_shape(0, 32)[0]], [caption])


def test_the_judge_bears_a_little_blur_and_noise():
    rng = np.random.default_rng(0)
    drawn = [draw_shape(index, 32) for index in range(90)]
    spoiled = []
    for image, _ in drawn:
        pixels = np.asarray(image.filter(ImageFilter.GaussianBlur(0.6))) + rng.normal(0, 8, (32, 32, 3))
        spoiled.append(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)))
    assert count_right(spoiled, [caption for _, caption in drawn]) >= 0.97 * len(drawn)


def test_the_judge_sees_nothing_in_noise_and_blanks():
    rng = np.random.default_rng(0)
    for _ in range(50):
        assert judge(Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))) == (None, None)
    for color in [(0, 0, 0), (128, 128, 128), (255, 255, 255), *COLORS.values()]:
        assert judge(Image.new("RGB", (32, 32), color)) == (None, None)


def test_the_judge_does_not_name_a_shape_or_colour_that_is_not_one_of_them():
    stripe = Image.new("RGB", (32, 32))
    stripe.paste(COLORS["red"], (4, 14, 28, 18))
    assert judge(stripe) == ("red", None)
    half = Image.new("RGB", (32, 32))
    half.paste(COLORS["red"], (8, 8, 16, 24))
    half.paste(COLORS["magenta"], (16, 8, 24, 24))
    assert judge(half) == (None, "square")


def verdicts(images: list[Image.Image], prompts: list[str]) -> np.ndarray:
    return np.array([count_right([image], [prompt]) == 1 for image, prompt in zip(images, prompts, strict=True)])


def test_the_judge_is_as_strict_as_an_eye():
    """On what Stable Diffusion and DiT drew when they had learned more or less: a row of the sheet has the 18 prompts,
    and labelled.txt an x for each image that an eye, which had not seen the judge's verdict, found right."""
    sheet = Image.open(HERE / "labelled.webp").convert("RGB")
    labels = [mark == "x" for line in (HERE / "labelled.txt").read_text().split() for mark in line]
    boxes = [(x, y, x + 32, y + 32) for y in range(0, sheet.height, 32) for x in range(0, sheet.width, 32)]
    prompts = PROMPTS * (len(boxes) // len(PROMPTS))
    found = verdicts([sheet.crop(box) for box in boxes], prompts)
    assert len(labels) == 324 and (found == labels).mean() >= 0.95
    assert abs(int(found.sum()) - sum(labels)) <= 5, "not stricter or milder as a whole"


def test_the_judge_passes_what_the_vae_makes_of_the_data():
    vae, images, prompts = shapes_vae(), *zip(*(draw_shape(index, 32, seed=3) for index in range(108)), strict=True)
    pixels = torch.stack([to_pixel_values(image) for image in images])
    with torch.no_grad():
        decoded = vae.decode(vae.encode(pixels).latent_dist.mode()).sample
    decoded = ((decoded.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    assert verdicts([Image.fromarray(image) for image in decoded], prompts).mean() >= 0.99


def spoil_color(image: Image.Image) -> Image.Image:
    """The figure's left half has another hue."""
    figure = image.convert("HSV").getchannel("S").point(lambda saturation: 255 * (saturation > 100)).getbbox()
    left, top, right, bottom = figure
    half = (left, top, (left + right) // 2, bottom)
    red, green, blue = image.crop(half).split()
    image = image.copy()
    image.paste(Image.merge("RGB", (green, blue, red)), half)
    return image


def stain(image: Image.Image) -> Image.Image:
    """Light patches in all corners; a figure hides three at most."""
    image = image.copy()
    for x, y in ((0, 0), (28, 0), (0, 28), (28, 28)):
        image.paste((120, 120, 120), (x, y, x + 4, y + 4))
    return image


def pierce(image: Image.Image) -> Image.Image:
    """A hole of the ground's colour, of 2 × 2 pixels, in the middle of the figure."""
    image, pixels = image.copy(), np.asarray(image.convert("HSV"))[..., 1] > 100
    rows, columns = np.nonzero(pixels)
    y, x = round(rows.mean()), round(columns.mean())
    image.paste((30, 30, 30), (x - 1, y - 1, x + 1, y + 1))
    return image


@pytest.mark.parametrize(
    "spoil",
    [
        lambda image: Image.merge("RGB", (image.split()[1], image.split()[2], image.split()[0])),
        spoil_color,
        stain,
        pierce,
        lambda image: image.filter(ImageFilter.GaussianBlur(3)),
        lambda image: image.point(lambda value: value // 2),
    ],
    ids=["recoloured", "half recoloured", "stained", "pierced", "blurred", "dark"],
)
def test_the_judge_fails_what_is_spoiled(spoil):
    images, prompts = zip(*(draw_shape(index, 32) for index in range(90)), strict=True)
    assert verdicts([spoil(image) for image in images], prompts).mean() <= 0.02


def test_wrong_images_are_not_counted():
    images = [draw_shape(index, 32)[0] for index in range(18)]
    assert count_right(images, PROMPTS) == 18
    assert count_right(images, PROMPTS[1:] + PROMPTS[:1]) == 0


def test_an_image_is_a_function_of_seed_and_index():
    assert draw_shape(7, 32, seed=1)[0].tobytes() == draw_shape(7, 32, seed=1)[0].tobytes()
    assert draw_shape(7, 32, seed=1)[0].tobytes() != draw_shape(7, 32, seed=2)[0].tobytes()
    assert draw_shape(7, 32)[0].tobytes() != draw_shape(7 + 18, 32)[0].tobytes()


def test_the_folder_holds_what_is_drawn(tmp_path):
    draw_shapes.main(["--output-dir", str(tmp_path / "out"), "--num-images", "20", "--image-size", "24"])
    rows = [json.loads(line) for line in (tmp_path / "out/metadata.jsonl").read_text().splitlines()]
    assert len(rows) == 20
    for index, row in enumerate(rows):
        image, caption = draw_shape(index, 24)
        assert row["text"] == caption
        assert Image.open(tmp_path / "out" / row["file_name"]).tobytes() == image.tobytes()
    with pytest.raises(InputError, match="not empty"):
        draw_shapes.main(["--output-dir", str(tmp_path / "out")])
