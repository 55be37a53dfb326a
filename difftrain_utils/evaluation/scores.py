"""What can be said of pictures that lie in a folder: by a reference, by their captions and by a judge."""

import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from PIL import Image

from difftrain_utils.builtins import moving_shapes, scenes, shapes, tones
from difftrain_utils.errors import InputError, blame
from difftrain_utils.evaluation.distances import (
    Neighbours,
    at_infinity,
    cmmd,
    frechet_distance,
    kernel_distance,
    neighbours,
    over_halves,
    unreliable,
)
from difftrain_utils.evaluation.image_metrics import clip_score, load_clip, load_features
from difftrain_utils.terminal import progress

JUDGES = {"shapes": shapes, "scenes": scenes, "moving_shapes": moving_shapes, "tones": tones}
MIN_IMAGES = 12  # so that half of them have five neighbours each
LOWER_IS_BETTER = ("fid", "fid_infinity", "kid", "cmmd")


class Score(NamedTuple):
    value: float
    error: float | None = None
    """Its standard error; None: it is not estimated."""


class Networks(NamedTuple):
    """Those of `load_networks`; None: not asked for."""

    features: Callable | None
    clip: Callable | None


def load_networks(features: str | None, clip: str | None, device: torch.device) -> Networks:
    """Raises InputError, about --features or --clip, for one that cannot be loaded."""
    loaded = []
    for option, name, load in (("--features", features, load_features), ("--clip", clip, load_clip)):
        with blame(f"{option}: cannot use {name!r}", Exception):
            loaded.append(load(name, device) if name else None)
    return Networks(*loaded)


@torch.no_grad()
def embed(
    networks: Networks, images: Sequence[Image.Image], captions: Sequence[str], batch_size: int
) -> dict[str, torch.Tensor]:
    """What the networks make of N images, float64 on the CPU: "features" (N, d), "embeddings" of CLIP (N, e) and the
    "clip_score" (N,) of each."""
    found: dict[str, list[torch.Tensor]] = {}
    starts = range(0, len(images), batch_size) if any(networks) else ()
    for start in progress(starts, len(starts), "Looking at images, batches"):
        batch, texts = images[start : start + batch_size], captions[start : start + batch_size]
        if networks.features:
            found.setdefault("features", []).append(networks.features(batch))
        if networks.clip:
            of_images, of_captions = networks.clip(batch, texts)
            found.setdefault("embeddings", []).append(of_images)
            found.setdefault("clip_score", []).append(clip_score(of_images, of_captions))
    return {name: torch.cat(parts).cpu().double() for name, parts in found.items()}


def distances(real: dict[str, torch.Tensor], generated: dict[str, torch.Tensor]) -> dict[str, Score]:
    """Of the generated images from the real ones, what `embed` says of both: `fid`, `fid_infinity`, `kid`, `precision`,
    `recall`, `density` and `coverage` of the features, and `cmmd` of CLIP's embeddings.

    Raises:
        InputError: there are fewer than `MIN_IMAGES` of either.
    """
    found = {}
    if "features" in generated:
        pair = real["features"], generated["features"]
        check_number(pair)
        of_halves = over_halves(frechet_distance, *pair)
        found["fid"] = Score(fid := frechet_distance(*pair), statistics.stdev(of_halves))
        found["fid_infinity"] = Score(at_infinity(fid, of_halves))
        found["kid"] = Score(kernel_distance(*pair), statistics.stdev(over_halves(kernel_distance, *pair)))
        of_halves = zip(*over_halves(neighbours, *pair), strict=True)
        for name, value, values in zip(Neighbours._fields, neighbours(*pair), of_halves, strict=True):
            found[name] = Score(value, statistics.stdev(values))
    if "embeddings" in generated:
        pair = real["embeddings"], generated["embeddings"]
        check_number(pair)
        found["cmmd"] = Score(cmmd(*pair), statistics.stdev(over_halves(cmmd, *pair)))
    return found


def check_number(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    for what, images in zip(("--reference", "FOLDER"), pair, strict=True):
        if len(images) < MIN_IMAGES:
            raise InputError(f"{what}: needs at least {MIN_IMAGES} images, got {len(images)}")


def mean_clip_score(generated: dict[str, torch.Tensor]) -> dict[str, Score]:
    """`clip_score`, if there is a CLIP model."""
    if "clip_score" not in generated:
        return {}
    values = generated["clip_score"]
    error = (values.std() / len(values) ** 0.5).item() if len(values) > 1 else None
    return {"clip_score": Score(values.mean().item(), error)}


def check_captions(judge: str, captions: Sequence[str], culprit: str) -> None:
    """Raise InputError, about the `culprit`, for a caption that the judge, "shapes" or "scenes", does not know."""
    with blame(culprit, ValueError):
        for caption in captions:
            JUDGES[judge].parse(caption)


def judged(judge: str, images: Sequence[Image.Image], captions: Sequence[str]) -> dict[str, Score]:
    """The shares of right images, of "shapes" or "scenes". Raises InputError for a caption that the judge does not
    know."""
    check_captions(judge, captions, f"--judge {judge}")
    return {name: Score(value) for name, value in JUDGES[judge].share_right(images, captions).items()}


def too_few(real: dict[str, torch.Tensor], generated: dict[str, torch.Tensor]) -> str | None:
    """Why the Fréchet distances say little, if they do: with fewer than twice as many images as features, what is left
    of their bias is not of the form that `fid_infinity` takes away (tests/evaluation/test_distances.py)."""
    if "features" not in generated:
        return None
    number, width = min(len(real["features"]), len(generated["features"])), generated["features"].shape[1]
    return unreliable("fid and fid_infinity are", "images", number, width)
