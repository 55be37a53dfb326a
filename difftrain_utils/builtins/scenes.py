"""The built-in data set of scenes, `builtin:scenes`: captions whose words belong together, and a judge of each task.

A miniature of GenEval (Ghosh et al. 2023, arXiv:2310.11513) with the shapes of `builtin:shapes`: six tasks, an exact
judge instead of a detector, and captions that are never trained on, of which all parts are in others.
"""

import itertools
import re
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from difftrain_utils.builtins.shapes import COLORS, SHAPES, SUPERSAMPLING, draw_figure, is_clean, widen
from difftrain_utils.builtins.shapes import judge as judge_figure
from difftrain_utils.keyed_random import generator_for

NUM_IMAGES = 6000
NUMBERS = {"two": 2, "three": 3, "four": 4}
RELATIONS = {"left of": (1, 0), "right of": (-1, 0), "above": (0, 1), "below": (0, -1)}
"""Where from the first object the second one lies, (x, y), y downwards."""
CANVAS = 128  # px, that images are looked at
REACH = CANVAS // 20  # px around a figure that are of its edge
_OBJECT = rf"a (?:({'|'.join(COLORS)}) )?({'|'.join(SHAPES)})"
_SEVERAL = re.compile(rf"({'|'.join(NUMBERS)}) (?:({'|'.join(COLORS)}) )?({'|'.join(SHAPES)})s")
_ONE_OR_TWO = re.compile(rf"{_OBJECT}(?: (and|{'|'.join(RELATIONS)}) {_OBJECT})?")


class Scene(NamedTuple):
    """What a caption asks for: so many objects, each a (color, shape), the colour None where any will do; and where the
    second one lies, None where that is free."""

    objects: tuple[tuple[str | None, str], ...]
    relation: str | None = None


def parse(caption: str) -> Scene:
    """The scene of a caption such as "three green triangles" or "a red circle left of a blue square". Raises
    ValueError if it is none."""
    if found := _SEVERAL.fullmatch(caption):
        number, color, shape = found.groups()
        return Scene(((color, shape),) * NUMBERS[number])
    if not (found := _ONE_OR_TWO.fullmatch(caption)):
        raise ValueError(f"{caption!r:.80} is no caption of builtin:scenes")
    color, shape, word, *second = found.groups()
    return Scene(((color, shape), *([tuple(second)] if word else [])), None if word == "and" else word)


def task_of(caption: str) -> str:
    """The task in `TASKS` that a caption is of. Raises ValueError if it is none."""
    scene = parse(caption)
    if len(scene.objects) == 1:
        return "single" if scene.objects[0][0] is None else "color"
    if len(set(scene.objects)) == 1:
        return "count"
    return "position" if scene.relation else "two" if scene.objects[0][0] is None else "binding"


def _pairs(word: str) -> list[str]:
    """Two objects of other colours and shapes, in either order."""
    objects = itertools.permutations(itertools.product(COLORS, SHAPES), 2)
    return [f"a {c} {s} {word} a {c2} {s2}" for (c, s), (c2, s2) in objects if c != c2 and s != s2]


TASKS = {
    "single": [f"a {shape}" for shape in SHAPES],
    "color": [f"a {color} {shape}" for color in COLORS for shape in SHAPES],
    "two": [f"a {shape} and a {other}" for shape, other in itertools.permutations(SHAPES, 2)],
    "count": [f"{n} {color} {shape}s" for n in NUMBERS for color in COLORS for shape in SHAPES],
    "binding": _pairs("and"),
    "position": [caption for relation in RELATIONS for caption in _pairs(relation)],
}
"""All captions of each task."""


def is_held_out(caption: str) -> bool:
    """Whether images never have this caption: about one in five of those that name colours, by the sum of the numbers
    of its words. So a pair of objects is held out from "binding" and "position" alike, in either order."""
    objects = parse(caption).objects
    named = set(objects)
    if any(color is None for color, _ in named):
        return False
    numbers = [list(COLORS).index(color) + SHAPES.index(shape) for color, shape in named]
    return (sum(numbers) + len(objects) - len(named)) % 5 == 0


TRAINED = {task: [caption for caption in captions if not is_held_out(caption)] for task, captions in TASKS.items()}


def grid_prompts(number: int) -> list[str]:
    """So many prompts of each task, of the tasks that hold captions out half of them such; always the same ones."""
    prompts = []
    for task, captions in TASKS.items():
        new = [caption for caption in captions if is_held_out(caption)]
        num_new = number // 2 if new else 0
        for choice, count in ((TRAINED[task], number - num_new), (new, num_new)):
            order = generator_for(0, f"prompts of {task}", count).permutation(len(choice))
            prompts += [choice[order[i % len(choice)]] for i in range(count)]
    return prompts


# ── Drawing ──────────────────────────────────────────────────────────────────────────────────────────────────
def draw_scene(index: int, image_size: int, seed: int = 0) -> tuple[Image.Image, str]:
    """Image `index` of the data set (RGB, image_size × image_size) and its caption. The tasks take turns; all else
    comes from (seed, index)."""
    task, random = list(TASKS)[index % len(TASKS)], generator_for(seed, "scene", index)
    caption = TRAINED[task][random.integers(len(TRAINED[task]))]
    return draw(caption, image_size, random), caption


def draw(caption: str, image_size: int, random: np.random.Generator) -> Image.Image:
    """An image (RGB, image_size × image_size) of a caption, all that it leaves open drawn at random.

    A single object fills 45 to 70 % of the width, one of several 34 to 42 %, and none comes closer to another than 6 %.
    """
    scene = parse(caption)
    ground = int(random.integers(16, 64))
    # Drawn large and averaged down, so that edges are smooth and places are not bound to pixels.
    large = Image.new("RGB", (image_size * SUPERSAMPLING,) * 2, (ground,) * 3)
    for (color, shape), (left, top, size) in zip(scene.objects, _places(scene, random), strict=True):
        color = color or list(COLORS)[random.integers(len(COLORS))]
        box = [large.width * edge for edge in (left, top, left + size, top + size)]
        draw_figure(ImageDraw.Draw(large), color, shape, box)
    return large.reduce(SUPERSAMPLING)


def _places(scene: Scene, random: np.random.Generator) -> list[tuple[float, float, float]]:
    """(left, top, size) of each object, as shares of the width."""
    number, gap = len(scene.objects), 0.06
    if number == 1:
        size = random.uniform(0.45, 0.7)
        return [(*random.uniform(0, 1 - size, 2), size)]
    sizes = random.uniform(0.34, 0.42, number)
    if len(set(scene.objects)) == 1:  # several of a kind: each in a quarter of its own
        quarters, edge = random.permutation(4)[:number], gap / 2
        free = random.uniform(edge, 0.5 - edge - sizes[:, None], (number, 2))
        corners = np.stack(np.divmod(quarters, 2), axis=1) / 2 + free
        return [(*corner, size) for corner, size in zip(corners, sizes, strict=True)]
    direction = RELATIONS[scene.relation or list(RELATIONS)[random.integers(len(RELATIONS))]]
    while True:
        corners = random.uniform(0, 1, (2, 2)) * (1 - sizes[:, None])
        along, across = _apart(*(corners + sizes[:, None] / 2), direction)
        if along >= sizes.mean() + gap and across <= 0.6 * along:
            return [(*corner, size) for corner, size in zip(corners, sizes, strict=True)]


def _apart(first: np.ndarray, second: np.ndarray, direction: tuple[int, int]) -> tuple[float, float]:
    """How far the second place lies from the first in this direction, and how far to a side of it."""
    x, y = second - first
    return (x * direction[0], abs(y)) if direction[0] else (y * direction[1], abs(x))


# ── Judging ──────────────────────────────────────────────────────────────────────────────────────────────────
class Figure(NamedTuple):
    """What an image shows: its colour and shape, None where it is not clear, and its middle, as shares of the width."""

    color: str | None
    shape: str | None
    middle: tuple[float, float]


def is_right(image: Image.Image, caption: str) -> bool:
    """Whether a square image shows what the caption asks for and nothing else: so many figures, each as clear as the
    judge of `builtin:shapes` asks for, of these colours and shapes, and the second one further in the direction asked
    for than to a side of it. Raises ValueError for a caption that is none."""
    scene = parse(caption)
    figures = find_figures(image, len(scene.objects))
    return figures is not None and any(map(partial(_matches, scene), itertools.permutations(figures)))


def _matches(scene: Scene, figures: Sequence[Figure]) -> bool:
    wanted = zip(figures, scene.objects, strict=True)
    if not all(figure.shape == shape and color in (None, figure.color) for figure, (color, shape) in wanted):
        return False
    if scene.relation is None:
        return True
    along, across = _apart(*(np.array(figure.middle) for figure in figures), RELATIONS[scene.relation])
    return along > across


def find_figures(image: Image.Image, number: int) -> list[Figure] | None:
    """The coloured figures of a square image; None where there are not so many, or the ground between them is not of
    one dark grey. They are counted first: to look at each of many specks takes seconds."""
    image = image.convert("RGB").resize((CANVAS, CANVAS), Image.Resampling.BICUBIC)
    pixels = np.asarray(image, dtype=np.float64) / 255
    coloured = pixels.max(axis=2) - pixels.min(axis=2) > 0.3
    if not is_clean(ground := pixels[~widen(coloured, REACH)]):
        return None
    parts, grey = label_parts(coloured), np.median(ground, axis=0)
    numbers = np.unique(parts[coloured])
    return [_look_at(pixels, parts == part, grey) for part in numbers] if len(numbers) == number else None


def _look_at(pixels: np.ndarray, figure: np.ndarray, grey: np.ndarray) -> Figure:
    """A figure by itself, in the middle of a square of ground twice as wide."""
    rows, columns = np.nonzero(figure)
    top, left, bottom, right = rows.min(), columns.min(), rows.max() + 1, columns.max() + 1
    alone = np.where(widen(figure, REACH)[..., None], pixels, grey)
    width = 2 * max(bottom - top, right - left)
    y, x = (top + bottom - width) // 2, (left + right - width) // 2
    padded = np.full((width, width, 3), grey)
    inside = alone[max(y, 0) : y + width, max(x, 0) : x + width]
    padded[max(-y, 0) :, max(-x, 0) :][: inside.shape[0], : inside.shape[1]] = inside
    color, shape = judge_figure(Image.fromarray((255 * padded).round().astype(np.uint8)))
    return Figure(color, shape, ((left + right) / 2 / CANVAS, (top + bottom) / 2 / CANVAS))


def label_parts(mask: np.ndarray) -> np.ndarray:
    """Connected parts of a mask, each place with a number of its part, 0 outside: of those in its part the largest."""
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        padded = np.pad(labels, 1)
        around = [padded[1:-1, 1:-1], padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]]
        spread = np.where(mask, np.maximum.reduce(around), 0)
        if np.array_equal(spread, labels):
            return labels
        labels = spread


def share_right(images: Sequence[Image.Image], prompts: Sequence[str]) -> dict[str, float]:
    """How many of the images are right: "scenes_right" the mean over the tasks, "scenes_TASK" of each task that there
    are prompts of, and "scenes_new" of the captions that are held out, if there are any. Raises ValueError for a prompt
    that is no caption of a scene."""
    right = np.array([is_right(image, prompt) for image, prompt in zip(images, prompts, strict=True)])
    tasks, new = np.array([*map(task_of, prompts)]), np.array([*map(is_held_out, prompts)])
    shares = {f"scenes_{task}": float(right[tasks == task].mean()) for task in TASKS if task in tasks}
    shares = {"scenes_right": float(np.mean([*shares.values()]))} | shares
    return shares | ({"scenes_new": float(right[new].mean())} if new.any() else {})
