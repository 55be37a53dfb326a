"""Sample k of a run: which image, crop, flip and caption it has is a function of (config, seed, k).

A run is one stream of samples k = 0, 1, 2, … across epochs, and optimizer step s takes the samples
[s·G, (s+1)·G), G the global batch size. So a resumed run starts its stream at k = step·G and needs no
state of a data loader, and processes and gradient accumulation only split [s·G, (s+1)·G).
"""

import functools
from collections.abc import Iterable
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image, ImageOps

from difftrain_utils.config import DataConfig, TrainConfig
from difftrain_utils.data import read_row
from difftrain_utils.errors import RowError
from difftrain_utils.keyed_random import generator_for

NUM_SUBSTITUTES = 10  # where more than ten rows in a row cannot be read, the data needs a look


class Samples(torch.utils.data.Dataset):
    """Item k is sample k: {"key": k, "pixel_values": (3, H, W) float32 in [-1, 1], "caption": str, "skipped": bool}.

    "skipped" says that another row stands in for the one that was due, which cannot be read.
    """

    def __init__(self, data: datasets.Dataset, config: DataConfig, seed: int, num_samples: int):
        self.data, self.config, self.seed, self.num_samples = data, config, seed, num_samples

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, k: int) -> dict[str, Any]:
        image, captions, skipped = read_row_or_substitute(self.data, self.index_of(k), self.config, self.seed, k)
        sample = {"key": k, "pixel_values": self._transform(image, k), "caption": self._choose(captions, k)}
        return sample | {"skipped": skipped}

    def index_of(self, k: int) -> int:
        """The row of sample k: epochs are permutations, each image comes once in each."""
        epoch, position = divmod(k, len(self.data))
        return _permutation(self.seed, epoch, len(self.data))[position].item()

    def names_of(self, keys: Iterable[int]) -> list[str]:
        """The file names of the samples `keys`."""
        rows = [self.index_of(k) for k in keys]
        return [self.data[row].name for row in rows]

    def describe_nonfinite(self, global_step: int, train: TrainConfig, grad_norm: float) -> str:
        """What to tell when the step after `global_step` has a gradient that is not finite."""
        first, last = global_step * train.batch_size, (global_step + 1) * train.batch_size - 1
        names = ", ".join(dict.fromkeys(self.names_of(range(first, last + 1))))
        return (
            f"the norm of the gradient is {grad_norm} at step {global_step + 1}, samples {first} to {last} ({names}); "
            f"{train.output_dir}/checkpoint-{global_step} holds the state before it"
        )

    def _transform(self, image: Image.Image, k: int) -> torch.Tensor:
        across, down = torch.rand(2, generator=generator_for(self.seed, "crop", k)).tolist()
        if self.config.center_crop:
            across = down = 0.5
        flip = self.config.random_flip and torch.rand((), generator=generator_for(self.seed, "flip", k)) < 0.5
        return to_square(image, self.config, across, down, flip)

    def _choose(self, captions: list[str], k: int) -> str:
        dropped = torch.rand((), generator=generator_for(self.seed, "caption_dropout", k))
        if dropped < self.config.caption_dropout:
            return ""
        return captions[torch.randint(len(captions), (), generator=generator_for(self.seed, "caption", k)).item()]


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch: {"keys": list of int, "pixel_values": (batch, 3, H, W), "captions": list of str, "skipped": of bool}.

    The keys stay Python integers: what is drawn for them is drawn on the CPU, without asking the device.
    """
    return {
        "keys": [sample["key"] for sample in samples],
        "pixel_values": torch.stack([sample["pixel_values"] for sample in samples]),
        "captions": [sample["caption"] for sample in samples],
        "skipped": [sample["skipped"] for sample in samples],
    }


def read_row_or_substitute(
    data: datasets.Dataset, index: int, config: DataConfig, seed: int, k: int
) -> tuple[Image.Image, list[str], bool]:
    """The image and captions of row `index`, and False; or, if it cannot be read and `data.on_bad_row` is skip, those
    of the first readable one of some rows drawn from (seed, k), and True.

    Raises:
        RowError: the row cannot be read and is not to be skipped, or none of the drawn rows can be read either.
    """
    try:
        return *read_row(data, index, config), False
    except RowError as error:
        if config.on_bad_row == "stop":
            raise
        first = error
    drawn = torch.randint(len(data), (NUM_SUBSTITUTES,), generator=generator_for(seed, "substitute", k))
    for substitute in drawn.tolist():
        try:
            return *read_row(data, substitute, config), True
        except RowError:
            continue
    raise RowError(f"{first}; nor can {NUM_SUBSTITUTES} rows be read that were drawn in its place")


@functools.lru_cache(maxsize=2)  # a batch touches two epochs at most, unless the data set is tiny
def _permutation(seed: int, epoch: int, length: int) -> torch.Tensor:
    return torch.randperm(length, generator=generator_for(seed, "order", epoch))


def to_square(image: Image.Image, config: DataConfig, across: float, down: float, flip: bool) -> torch.Tensor:
    """Resize the shorter side to `data.resolution` and cut a square, `across` and `down` in [0, 1) of the way."""
    size = config.resolution
    scale = size / min(image.size)
    width, height = (max(size, round(edge * scale)) for edge in image.size)
    image = image.resize((width, height), Image.Resampling[config.image_interpolation.upper()])
    # each of the (width - size + 1) places is as likely as any other
    left, top = int(across * (width - size + 1)), int(down * (height - size + 1))
    image = image.crop((left, top, left + size, top + size))
    return to_pixel_values(ImageOps.mirror(image) if flip else image)


def to_pixel_values(image: Image.Image) -> torch.Tensor:
    """An RGB image as float32 of shape (3, height, width) in [-1, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).to(torch.float32).div_(127.5).sub_(1)
