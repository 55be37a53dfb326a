"""Images laid out in a grid or a table, each with its label."""

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

MARGIN = 6  # pixels between images


def labelled_grid(images: list[Image.Image], labels: list[str], least: int = 128) -> Image.Image:
    """All images with their labels underneath, about square; small ones are shown at `least` pixels or more."""
    width, height, font, line = _cell(images[0], least)
    columns = min(len(images), math.ceil(math.sqrt(1.6 * len(images))))  # wider than high
    rows = -(-len(images) // columns)
    grid = Image.new("RGB", (columns * (width + MARGIN) + MARGIN, rows * (height + line + MARGIN) + MARGIN), "white")
    draw = ImageDraw.Draw(grid)
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        left, top = MARGIN + i % columns * (width + MARGIN), MARGIN + i // columns * (height + line + MARGIN)
        grid.paste(image.resize((width, height), Image.Resampling.NEAREST), (left, top))
        draw.text((left, top + height + 2), _shorten(label, font, width), fill="black", font=font)
    return grid


def _cell(image: Image.Image, least: int = 128) -> tuple[int, int, ImageFont.FreeTypeFont, int]:
    """Width and height that an image is shown at, the font of its label, and the height of a line of that."""
    scale = max(1, -(-least // image.width))
    font = ImageFont.load_default(size=max(12, image.width * scale // 24))
    return image.width * scale, image.height * scale, font, int(font.size * 1.6)


def labelled_table(images: Sequence[Sequence[Image.Image]], rows: Sequence[str], columns: Sequence[str]) -> Image.Image:
    """Rows of images, each below its label, and the columns' labels above all; all images are of one size."""
    width, height, font, line = _cell(images[0][0])
    size = len(columns) * (width + MARGIN) + MARGIN, len(rows) * (line + height + MARGIN) + line + MARGIN
    table = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(table)
    lefts = [MARGIN + number * (width + MARGIN) for number in range(len(columns))]
    for left, label in zip(lefts, columns, strict=True):
        draw.text((left, MARGIN), _shorten(label, font, width), fill="black", font=font)
    top = MARGIN + line
    for label, row in zip(rows, images, strict=True):
        draw.text((MARGIN, top), _shorten(label, font, size[0] - 2 * MARGIN), fill="black", font=font)
        for left, image in zip(lefts, row, strict=True):
            table.paste(image.resize((width, height), Image.Resampling.NEAREST), (left, top + line))
        top += line + height + MARGIN
    return table


def _shorten(label: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    if font.getlength(label) <= width:
        return label
    while label and font.getlength(label + "…") > width:
        label = label[:-1]
    return label + "…"
