"""The built-in captioned data set: one coloured shape on a dark ground, and a judge that names both."""

import math

import numpy as np
from PIL import Image, ImageDraw

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
PROMPTS = [f"a {color} {shape}" for color in COLORS for shape in SHAPES]
SUPERSAMPLING = 8


def draw_shape(index: int, image_size: int, seed: int = 0) -> tuple[Image.Image, str]:
    """Image `index` of the data set (RGB, image_size × image_size) and its caption, e.g. "a red circle".

    The 18 captions take turns; size, place and ground come from (seed, index).
    """
    caption = PROMPTS[index % len(PROMPTS)]
    _, color, shape = caption.split()
    scale, x, y, ground = generator_for(seed, "shape", index).random(4).tolist()
    size = (0.45 + 0.25 * scale) * image_size
    left, top = x * (image_size - size), y * (image_size - size)
    ground = int(16 + 48 * ground)
    # Drawn large and averaged down, so that edges are smooth and places are not bound to pixels.
    large = Image.new("RGB", (image_size * SUPERSAMPLING,) * 2, (ground,) * 3)
    box = [SUPERSAMPLING * edge for edge in (left, top, left + size, top + size)]
    draw = ImageDraw.Draw(large)
    if shape == "circle":
        draw.ellipse(box, fill=COLORS[color])
    elif shape == "square":
        draw.rectangle(box, fill=COLORS[color])
    else:
        draw.polygon([(box[0], box[3]), (box[2], box[3]), ((box[0] + box[2]) / 2, box[1])], fill=COLORS[color])
    return large.reduce(SUPERSAMPLING), caption


def judge(image: Image.Image) -> tuple[str | None, str | None]:
    """Name the (color, shape) that an image shows; None for what it does not clearly show.

    The coloured pixels are the figure. Its colour is the nearest hue, if its pixels agree on one;
    its shape is the best of three templates laid over its bounding box, if the overlap
    (intersection over union) is at least 0.75.
    """
    image = image.convert("RGB")
    if min(image.size) < 96:  # edges between pixels count, too
        image = image.resize((96, 96), Image.Resampling.BICUBIC)
    pixels = np.asarray(image, dtype=np.float64) / 255
    chroma = pixels.max(axis=2) - pixels.min(axis=2)
    figure = chroma > 0.3
    if not 0.04 < figure.mean() < 0.7:
        return None, None
    return _judge_color(pixels[figure]), _judge_shape(figure)


def _judge_color(pixels: np.ndarray) -> str | None:
    mean = np.exp(1j * _hue(pixels)).mean()
    if abs(mean) < 0.85:
        return None
    distance = {name: abs(np.angle(mean / np.exp(1j * _hue(np.array(color))))) for name, color in COLORS.items()}
    nearest = min(distance, key=distance.get)
    return nearest if distance[nearest] < math.radians(28) else None


def _hue(pixels: np.ndarray) -> np.ndarray:
    """The angle around the grey axis, in radians, of colours of shape (…, 3)."""
    red, green, blue = np.moveaxis(pixels, -1, 0)
    return np.arctan2(math.sqrt(3) * (green - blue), 2 * red - green - blue)


def _judge_shape(figure: np.ndarray) -> str | None:
    # A row or column with one or two stray pixels does not belong to the bounding box.
    rows, columns = (np.flatnonzero(figure.sum(axis=axis) > 1) for axis in (1, 0))
    if len(rows) < 5 or len(columns) < 5:
        return None
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    if not 0.7 < (bottom - top) / (right - left) < 1.4:
        return None
    y, x = np.mgrid[0 : figure.shape[0], 0 : figure.shape[1]] + 0.5
    y, x = (y - top) / (bottom - top), (x - left) / (right - left)  # 0 … 1 within the box
    box = (x > 0) & (x < 1) & (y > 0) & (y < 1)
    templates = {
        "circle": (x - 0.5) ** 2 + (y - 0.5) ** 2 <= 0.25,
        "square": box,
        "triangle": box & (np.abs(x - 0.5) <= 0.5 * y),
    }
    overlap = {name: (figure & t).sum() / (figure | t).sum() for name, t in templates.items()}
    best = max(overlap, key=overlap.get)
    return best if overlap[best] >= 0.75 else None


def count_right(images: list[Image.Image], prompts: list[str]) -> int:
    """How many images show the colour and the shape that their prompts ("a red circle") ask for."""
    return sum(
        " ".join(["a", *map(str, judge(image))]) == prompt for image, prompt in zip(images, prompts, strict=True)
    )
