"""The built-in captioned data sets: one coloured shape on a dark ground, and a judge that names both."""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from difftrain_utils.keyed_random import generator_for

COLORS = {
    "red": (225, 40, 40),
    "yellow": (230, 215, 40),
    "green": (40, 190, 60),
    "cyan": (40, 205, 215),
    "blue": (50, 70, 230),
    "magenta": (215, 50, 205),
}
SHAPES = ("circle", "square", "triangle")
SIDES = ("left", "right")
PROMPTS = [f"a {color} {shape}" for color in COLORS for shape in SHAPES]
PLACED = [f"{prompt} on the {side}" for prompt in PROMPTS for side in SIDES]
SHAPE_SETS = {"builtin:shapes": PROMPTS, "builtin:placed-shapes": PLACED}
"""The captions of each data set. A model that has learned the first has something new in the second: where."""
SUPERSAMPLING = 8
CANVAS = 128  # px, that images are judged at
NEEDED = {"circle": (0.935, 0.05, 1.15), "square": (0.9, 0.05, 1.2), "triangle": (0.84, 0.12, 1.3)}
"""Of each shape: the least overlap with it, how much more that is than with another, and how far it may be stretched.
Set on generated images that were labelled by eye (tests/builtins/labelled.webp)."""


def draw_shape(
    index: int, image_size: int, seed: int = 0, captions: Sequence[str] = PROMPTS
) -> tuple[Image.Image, str]:
    """Image `index` of the data set (RGB, image_size × image_size) and its caption, e.g. "a red circle".

    The captions take turns; size, place and ground come from (seed, index), but for the side that a caption names, on
    which the shape has at most a tenth of the free width.
    """
    caption = captions[index % len(captions)]
    _, color, shape, *place = caption.split()
    scale, x, y, ground = generator_for(seed, "shape", index).random(4).tolist()
    if place:
        x = 0.1 * x if place[-1] == "left" else 1 - 0.1 * x
    size = (0.45 + 0.25 * scale) * image_size
    left, top = x * (image_size - size), y * (image_size - size)
    ground = int(16 + 48 * ground)
    # Drawn large and averaged down, so that edges are smooth and places are not bound to pixels.
    large = Image.new("RGB", (image_size * SUPERSAMPLING,) * 2, (ground,) * 3)
    box = [SUPERSAMPLING * edge for edge in (left, top, left + size, top + size)]
    draw_figure(ImageDraw.Draw(large), shape, box, COLORS[color])
    return large.reduce(SUPERSAMPLING), caption


def draw_figure(draw: ImageDraw.ImageDraw, shape: str, box: list[float], color: tuple[int, int, int]) -> None:
    """A shape in its box, (left, top, right, bottom)."""
    if shape == "circle":
        draw.ellipse(box, fill=color)
    elif shape == "square":
        draw.rectangle(box, fill=color)
    else:
        draw.polygon([(box[0], box[3]), (box[2], box[3]), ((box[0] + box[2]) / 2, box[1])], fill=color)


def judge(image: Image.Image) -> tuple[str | None, str | None]:
    """Name the (color, shape) that a square image shows as clearly as an eye asks for; None for what it does not.

    The coloured pixels are the figure. It has a colour if nearly all of its pixels have that hue, and a shape if it
    covers one of the three shapes, laid over its centre in its size, well, and clearly better than the other two. A
    figure with a blurred edge, or on a ground that is not clean, has neither.
    """
    image = image.convert("RGB").resize((CANVAS, CANVAS), Image.Resampling.BICUBIC)  # edges between pixels count, too
    pixels = np.asarray(image, dtype=np.float64) / 255
    chroma = pixels.max(axis=2) - pixels.min(axis=2)
    figure = chroma > 0.3
    if not 0.04 < figure.mean() < 0.7 or not _is_clear(pixels, chroma, figure):
        return None, None
    return _judge_color(pixels[figure]), _judge_shape(figure)


def _is_clear(pixels: np.ndarray, chroma: np.ndarray, figure: np.ndarray) -> bool:
    """Whether the figure ends within a seventh of its size, on a dark ground of one grey."""
    full = np.median(chroma[figure])
    edge = (chroma > 0.2 * full) & (chroma < 0.8 * full)
    around = Image.fromarray(figure).convert("L").filter(ImageFilter.MaxFilter(2 * (CANVAS // 16) + 1))
    ground = pixels[np.asarray(around) == 0]
    if not len(ground):
        return False
    grey = np.median(ground, axis=0)
    stains = np.abs(ground - grey).max(axis=1) > 0.12
    # An edge's pixels over its length, about four times the figure's size, are its width.
    return edge.sum() < 4 * figure.sum() / 7 and grey.max() < 0.4 and stains.mean() < 0.002


def _judge_color(pixels: np.ndarray) -> str | None:
    """Hues, because at the edge of a figure the ground's grey is mixed in, which leaves them as they are."""
    for name, color in COLORS.items():
        color = np.array(color) / 255
        has_hue = np.abs(np.angle(np.exp(1j * (_hue(pixels) - _hue(color))))) < math.radians(18)
        if has_hue.mean() >= 0.97 and np.abs(np.median(pixels, axis=0) - color).max() < 0.25:
            return name
    return None


def _hue(pixels: np.ndarray) -> np.ndarray:
    """The angle around the grey axis, in radians, of colours of shape (…, 3)."""
    red, green, blue = np.moveaxis(pixels, -1, 0)
    return np.arctan2(math.sqrt(3) * (green - blue), 2 * red - green - blue)


def _judge_shape(figure: np.ndarray) -> str | None:
    """By the overlap (intersection over union) with the three shapes, laid over the figure's centre of mass and as wide
    and as high as it: their standard deviations along x and y are those of the figure."""
    rows, columns = np.nonzero(figure)
    height, width = rows.std(), columns.std()
    y, x = np.mgrid[0 : figure.shape[0], 0 : figure.shape[1]]
    y, x = (y - rows.mean()) / height, (x - columns.mean()) / width
    shapes = _shapes(y, x)
    overlap = {name: (figure & shape).sum() / (figure | shape).sum() for name, shape in shapes.items()}
    _, second, best = sorted(overlap, key=overlap.get)
    min_overlap, min_margin, max_stretch = NEEDED[best]
    is_clear = overlap[best] >= min_overlap and overlap[best] - overlap[second] >= min_margin
    stretch = width / height / (math.sqrt(3 / 4) if best == "triangle" else 1)
    has_no_hole = figure[_shapes(y / 0.7, x / 0.7)[best]].mean() > 0.99
    return best if is_clear and has_no_hole and 1 / max_stretch <= stretch <= max_stretch else None


def _shapes(y: np.ndarray, x: np.ndarray) -> dict[str, np.ndarray]:
    """Whether points lie in the three shapes, of mean 0 and standard deviation 1 along both axes."""
    return {
        "circle": x**2 + y**2 <= 4,
        "square": np.maximum(np.abs(x), np.abs(y)) <= math.sqrt(3),
        "triangle": (y <= math.sqrt(2)) & (math.sqrt(3) * np.abs(x) <= y + math.sqrt(8)),
    }


def judge_side(image: Image.Image) -> str | None:
    """Name the side ("left") that the figure of an image is on: it has at most a quarter of the free width there."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float64) / 255
    columns = np.nonzero((pixels.max(axis=2) - pixels.min(axis=2) > 0.3).any(axis=0))[0]
    if not len(columns):
        return None
    left, right = columns[0], image.width - 1 - columns[-1]
    free = left + right
    return "left" if left <= free / 4 and left < right else "right" if right <= free / 4 and right < left else None


def count_right(images: list[Image.Image], prompts: list[str]) -> int:
    """How many images show the colour and the shape, and on which side, that their prompts ("a red circle", "a red
    circle on the left") ask for."""
    right = 0
    for image, prompt in zip(images, prompts, strict=True):
        what, _, side = prompt.partition(" on the ")
        is_there = not side or judge_side(image) == side
        right += is_there and " ".join(["a", *map(str, judge(image))]) == what
    return right
