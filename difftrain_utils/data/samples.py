"""Sample k of a run: which image, crop, flip and caption it has is a function of (config, seed, k).

A run is one stream of samples k = 0, 1, 2, … across epochs, and optimizer step s takes the samples
[s·G, (s+1)·G), G the global batch size. So a resumed run starts its stream at k = step·G and needs no
state of a data loader, and processes and gradient accumulation only split [s·G, (s+1)·G).
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from difftrain_utils.config.data import DataConfig
from difftrain_utils.config.training import TrainConfig
from difftrain_utils.data.buckets import Buckets
from difftrain_utils.data.order import Order
from difftrain_utils.data.rows import Rows, captions_of, read_row
from difftrain_utils.data.streaming import StreamedRows
from difftrain_utils.errors import RowError
from difftrain_utils.keyed_random import generator_for

NUM_SUBSTITUTES = 10  # where more than ten rows in a row cannot be read, the data needs a look


class Samples(torch.utils.data.Dataset):
    """Item k is sample k:

    - "key": k
    - "pixel_values": (3, H, W) float32 in [-1, 1]; or "moments", of the `latents` cache: (2, channels, h, w)
    - "caption": str; or "conditioning", of the `prompts` cache
    - "skipped": whether another row stands in for the one that was due, which cannot be read
    - "stream_state": where a stream (`data.streaming`) goes on from this sample; None for other data

    With `buckets` all samples of a batch have one size; `batch_size` is the global one. `latents` and `prompts` are the
    caches (`load_caches`), where there are any.

    Raises:
        InputError: see `Order`.
    """

    def __init__(
        self,
        data: Rows | StreamedRows,
        config: DataConfig,
        seed: int,
        num_samples: int,
        batch_size: int = 1,
        buckets: Buckets | None = None,
    ):
        self.data, self.config, self.seed, self.num_samples = data, config, seed, num_samples
        self.buckets, self.latents, self.prompts = buckets, None, None
        self.order = None  # a stream has its rows by k
        if not isinstance(data, StreamedRows):
            of_row = None if buckets is None else buckets.of_row
            weights = None if None in data.weights else data.weights
            self.order = Order(seed, data.lengths, weights, of_row, batch_size)

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, k: int) -> dict[str, Any]:
        stream_state = self.data.state(k) if isinstance(self.data, StreamedRows) else None
        row, read = self.index_of(k), partial(self._read, k=k)
        sample, skipped = read_or_substitute(read, self.data, row, self.config, self.seed, k, self.buckets)
        return sample | {"key": k, "skipped": skipped, "stream_state": stream_state}

    def index_of(self, k: int) -> int:
        """The row of sample k."""
        return k if self.order is None else self.order[k]

    def names_of(self, keys: Iterable[int]) -> list[str]:
        """The file names of the samples `keys`."""
        return [self.data[self.index_of(k)].name for k in keys]

    def describe_nonfinite(self, global_step: int, train: TrainConfig, grad_norm: float) -> str:
        """What to tell when the step after `global_step` has a gradient that is not finite."""
        first, last = global_step * train.batch_size, (global_step + 1) * train.batch_size - 1
        names = ", ".join(dict.fromkeys(self.names_of(range(first, last + 1))))
        return (
            f"the norm of the gradient is {grad_norm} at step {global_step + 1}, samples {first} to {last} ({names}); "
            f"{train.output_dir}/checkpoint-{global_step} holds the state before it"
        )

    def _read(self, row: int, k: int) -> dict[str, Any]:
        """What sample k is made of row `row`; raises RowError if that cannot be read."""
        sample = {}
        if self.latents is not None:
            if self.prompts is None:
                stored = self.data[row]
                captions = captions_of(stored.captions, stored.name)
            flips = self.latents[row]
            if self.config.on_bad_row == "skip" and flips[0, 0, 0, 0, 0].isnan():
                raise RowError(f"{self._name(row)}: could not be read when the latents were cached")
            sample["moments"] = flips[1 if self._is_flipped(k) else 0]
        else:
            image, captions = read_row(self.data, row, self.config)
            across, down = 0.5, 0.5
            if not self.config.center_crop:
                across, down = torch.rand(2, generator=generator_for(self.seed, "crop", k)).tolist()
            size = size_of(row, self.config, self.buckets)
            sample["pixel_values"] = resize_and_crop(image, self.config, size, across, down, self._is_flipped(k))
        if self.prompts is None:
            sample["caption"] = captions[self._choose(len(captions), k)] if self._has_caption(k) else ""
        else:
            numbers = self.prompts.of_row(row)
            if len(numbers) == 0:
                raise RowError(f"{self._name(row)}: its captions could not be read when the prompts were cached")
            sample["conditioning"] = self.prompts[numbers[self._choose(len(numbers), k)] if self._has_caption(k) else 0]
        return sample

    def _name(self, row: int) -> str:
        return self.data[row].name

    def _is_flipped(self, k: int) -> bool:
        return self.config.random_flip and self._draw("flip", k) < 0.5

    def _has_caption(self, k: int) -> bool:
        return not self.config.caption_dropout or self._draw("caption_dropout", k) >= self.config.caption_dropout

    def _choose(self, count: int, k: int) -> int:
        if count == 1:
            return 0
        return torch.randint(count, (), generator=generator_for(self.seed, "caption", k)).item()

    def _draw(self, purpose: str, k: int) -> float:
        return torch.rand((), generator=generator_for(self.seed, purpose, k)).item()


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch: tensors are stacked; "keys", "captions" and "skipped" are lists; "stream_state" is that of
    the last sample.

    The keys stay Python integers: what is drawn for them is drawn on the CPU, without asking the device.
    """
    names = {"key": "keys", "caption": "captions"}
    batch = {names.get(name, name): [sample[name] for sample in samples] for name in samples[0]}
    stacked = {name: torch.stack(values) for name, values in batch.items() if isinstance(values[0], torch.Tensor)}
    return batch | stacked | {"stream_state": samples[-1]["stream_state"]}


def read_or_substitute(
    read: Callable[[int], Any],
    data: Rows | StreamedRows,
    index: int,
    config: DataConfig,
    seed: int,
    k: int,
    buckets: Buckets | None = None,
) -> tuple[Any, bool]:
    """`read(index)` and False; or, if it raises RowError and `data.on_bad_row` is skip, what `read` makes of the first
    readable one of some rows (of the same bucket) drawn from (seed, k), and True. A stream, in which no row can be
    drawn, has the rows that follow in its window instead.

    Raises:
        RowError: the row cannot be read and is not to be skipped, or none of the other rows can be read either.
    """
    try:
        return read(index), False
    except RowError as error:
        if config.on_bad_row == "stop":
            raise
        first = error
    if isinstance(data, StreamedRows):
        others, which = data.substitutes(k), f"any of the {config.shuffle_buffer} rows that are shuffled with it"
    else:
        rows = np.arange(len(data)) if buckets is None else np.flatnonzero(buckets.of_row == buckets.of_row[index])
        drawn = torch.randint(len(rows), (NUM_SUBSTITUTES,), generator=generator_for(seed, "substitute", k))
        others, which = rows[drawn.numpy()].tolist(), f"{NUM_SUBSTITUTES} rows be read that were drawn in its place"
    for substitute in others:
        try:
            return read(substitute), True
        except RowError:
            continue
    raise RowError(f"{first}; nor can {which}")


def read_row_or_substitute(
    data: Rows | StreamedRows, index: int, config: DataConfig, seed: int, k: int
) -> tuple[Image.Image, list[str]]:
    """The image and the captions of a row or its substitute: see `read_or_substitute`."""
    return read_or_substitute(lambda row: read_row(data, row, config), data, index, config, seed, k)[0]


def size_of(row: int, config: DataConfig, buckets: Buckets | None = None) -> tuple[int, int]:
    """(height, width) of a row's image when it is trained on."""
    return (config.resolution, config.resolution) if buckets is None else buckets.size_of(row)


def resize_and_crop(
    image: Image.Image, config: DataConfig, size: tuple[int, int], across: float, down: float, flip: bool
) -> torch.Tensor:
    """Scale an image to cover `size` (height, width), and cut that out, `across` and `down` in [0, 1) of the way."""
    height, width = size
    scale = max(width / image.width, height / image.height)
    covering = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    image = image.resize(covering, Image.Resampling[config.image_interpolation.upper()])
    # each of the possible places is as likely as any other
    left, top = int(across * (image.width - width + 1)), int(down * (image.height - height + 1))
    image = image.crop((left, top, left + width, top + height))
    return to_pixel_values(ImageOps.mirror(image) if flip else image)


def to_square(image: Image.Image, config: DataConfig) -> torch.Tensor:
    """The middle of an image, as evaluations see it."""
    return resize_and_crop(image, config, (config.resolution, config.resolution), 0.5, 0.5, flip=False)


def to_pixel_values(image: Image.Image) -> torch.Tensor:
    """An RGB image as float32 of shape (3, height, width) in [-1, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).to(torch.float32).div_(127.5).sub_(1)
