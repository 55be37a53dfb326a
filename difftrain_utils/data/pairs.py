"""Batches of pairs as batches of images."""

from typing import Any

import torch

OF_EACH = ("pixel_values", "moments", "sizes")  # what a sample of pairs has of either image; all else is of both


def as_images(batch: dict[str, Any]) -> dict[str, Any]:
    """A batch of pairs as one of images, the chosen and the rejected one in turn, (2·batch, …). What is of a pair is
    there twice: so its key, by which both are encoded with the same noise, and its caption."""
    images = {}
    for name, values in batch.items():
        if name in OF_EACH:
            images[name] = values.flatten(0, 1)
        elif isinstance(values, torch.Tensor):
            images[name] = values.repeat_interleave(2, 0)
        elif isinstance(values, dict):
            images[name] = {part: value.repeat_interleave(2, 0) for part, value in values.items()}
        else:
            images[name] = None if values is None else [value for value in values for _ in range(2)]
    return images
