"""`builtin:moving-shapes`: clips of one coloured shape that moves over a dark ground, and a judge that names colour,
shape and direction."""

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from difftrain_utils.builtins.shapes import PROMPTS, SUPERSAMPLING, draw_figure, judge
from difftrain_utils.keyed_random import generator_for
from difftrain_utils.media.video import LOSSLESS, Clip, write_video

DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
MOVING = [f"{prompt} moving {direction}" for prompt in PROMPTS for direction in DIRECTIONS]
"""The captions."""
LONGER = 1.25  # a clip of the data than those that are trained on, so that its windows differ
NEEDED = 0.75  # of a clip's frames that have to show the colour and the shape
LEAST_WAY, MOST_ASIDE = 0.08, 0.5  # of the image's side, and of the way


def draw_clip(index: int, image_size: int, num_frames: int, seed: int = 0) -> tuple[list[Image.Image], str]:
    """The frames of clip `index` of the data set (RGB, image_size × image_size) and its caption, e.g. "a red circle
    moving left".

    The captions take turns; size, place, ground and speed come from (seed, index). The shape crosses 0.7 to all of the
    free way at an even pace, the same to both sides of the middle.
    """
    caption = MOVING[index % len(MOVING)]
    _, color, shape, _, direction = caption.split()
    scale, aside, ground, speed = generator_for(seed, "moving_shape", index).random(4).tolist()
    size = (0.4 + 0.15 * scale) * image_size
    free, ground, (right, down) = image_size - size, int(16 + 48 * ground), DIRECTIONS[direction]
    frames = []
    for number in range(num_frames):
        way = (0.7 + 0.3 * speed) * (number / max(num_frames - 1, 1) - 0.5)
        left, top = (free * (0.5 + way * step if step else aside) for step in (right, down))
        large = Image.new("RGB", (image_size * SUPERSAMPLING,) * 2, (ground,) * 3)
        box = [SUPERSAMPLING * edge for edge in (left, top, left + size, top + size)]
        draw_figure(ImageDraw.Draw(large), color, shape, box)
        frames.append(large.reduce(SUPERSAMPLING))
    return frames, caption


def encode_clip(index: int, image_size: int, num_frames: int, fps: float) -> tuple[bytes, str]:
    """A clip that is `LONGER` than `num_frames` as a file, and its caption. By FFV1, which loses nothing and puts out
    the same bytes each time, so that it goes the way of all videos and has one fingerprint."""
    frames, caption = draw_clip(index, image_size, int(LONGER * num_frames))
    buffer = io.BytesIO()
    write_video(frames, fps, buffer, **LOSSLESS)
    return buffer.getvalue(), caption


def judge_clip(frames: Sequence[Image.Image]) -> tuple[str | None, str | None, str | None]:
    """Name the (color, shape, direction) that the square frames of a clip show as clearly as an eye asks for; None for
    what they do not.

    Three quarters of the frames must show a colour and a shape (`shapes.judge`). The figure has a direction if the
    centre of what is coloured goes some way along it, in no frame much back, and not half as far aside.
    """
    named = [judge(frame) for frame in frames]
    color, shape = (_most([names[part] for names in named]) for part in range(2))
    return color, shape, _judge_direction(frames)


def _most(names: Sequence[str | None]) -> str | None:
    """What nearly all frames show."""
    found = max(set(names), key=names.count)
    return found if names.count(found) >= NEEDED * len(names) else None


def _judge_direction(frames: Sequence[Image.Image]) -> str | None:
    centres = []
    for frame in frames:
        pixels = np.asarray(frame.convert("RGB"), dtype=np.float64) / 255
        figure = pixels.max(axis=2) - pixels.min(axis=2) > 0.3
        if figure.mean() < 0.04:
            return None
        centres.append(np.argwhere(figure).mean(axis=0)[::-1] / frame.size)  # across, down
    steps = np.diff(centres, axis=0)
    for name, along in DIRECTIONS.items():
        along, aside = steps @ along, steps @ along[::-1]
        way = along.sum()
        is_even = along[along < 0].sum() > -0.1 * way
        if way >= LEAST_WAY and is_even and abs(aside.sum()) < MOST_ASIDE * way:
            return name
    return None


def parse(prompt: str) -> str:
    """The caption itself. Raises ValueError for a prompt that is none."""
    if prompt not in MOVING:
        raise ValueError(f"{prompt!r:.80} is no caption of builtin:moving-shapes, such as {MOVING[0]!r}")
    return prompt


def share_right(clips: Sequence[Clip], prompts: Sequence[str]) -> dict[str, float]:
    """{"moving_shapes_right": the share of the clips that are right}. Raises ValueError for a prompt that is no
    caption."""
    return {"moving_shapes_right": count_right([clip.frames for clip in clips], prompts) / len(clips)}


def count_right(clips: Sequence[Sequence[Image.Image]], prompts: Sequence[str]) -> int:
    """How many clips, each as its frames, show the colour, the shape and the direction that their prompts ("a red
    circle moving left") ask for. Raises ValueError for a prompt that is no caption."""
    named = (judge_clip(frames) for frames in clips)
    told = [f"a {color} {shape} moving {direction}" for color, shape, direction in named]
    return sum(is_told == parse(prompt) for is_told, prompt in zip(told, prompts, strict=True))
