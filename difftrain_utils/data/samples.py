"""Sample k of a run: which row, which part of it and which caption it has is a function of (config, seed, k).

A run is one stream of samples k = 0, 1, 2, … across epochs, and optimizer step s takes the samples
[s·G, (s+1)·G), G the global batch size. So a resumed run starts its stream at k = step·G and needs no
state of a data loader, and processes and gradient accumulation only split [s·G, (s+1)·G).
"""

import atexit
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device

from difftrain_utils.config.config import Config
from difftrain_utils.config.data import DataConfig
from difftrain_utils.data.buckets import Buckets
from difftrain_utils.data.load import Data
from difftrain_utils.data.rows import Rows
from difftrain_utils.errors import RowError, warn
from difftrain_utils.keyed_random import generator_for
from difftrain_utils.media.captions import captions_of, complete, draw_tags
from difftrain_utils.media.image import scale_bytes
from difftrain_utils.media.media import media_of
from difftrain_utils.terminal import end_workers, leave_signals_to_parent


class Samples(torch.utils.data.Dataset):
    """Item k is sample k:

    - "key": k
    - what its medium reads of its row (`Media.read`), of images "pixel_values" (of videos they are bytes, of which
      `scale_pixels` makes those of a batch), "sizes" and where a source has masks "mask"; or of the cache `latents`
      "moments", (2, channels, h, w), "sizes" and "mask", (1, h, w), and where a model is always told the first frame
      of a video "first_frame", a dict of tensors
    - where its medium has captions "caption": str, or None where it is dropped (`data.caption_dropout`); or
      "conditioning": of the cache `text`, a dict of tensors
    - "dropped": whether the caption is dropped
    - "condition": which caption the model is told, by its text or its number in the cache; None where it is dropped. An
      empty one is a caption like others, also of families that tell the model of it what they tell of none
    - "flip": 1 if the image is mirrored, else 0
    - of any other cache, by its name: its row's entry, a dict of tensors
    - "weight": the factor of the sample's loss
    - "skipped": whether another row stands in for the one that was due, which cannot be read

    All samples of a batch have one size. `caches` are those of `load_caches`, and others whose entries are the rows; of
    what `latents` and `text` stand for, `also` names what is to be there besides: "pixel_values", "caption".
    """

    def __init__(
        self,
        data: Data,
        config: DataConfig,
        seed: int,
        num_samples: int,
        caches: Mapping[str, Any] | None = None,
        also: Iterable[str] = (),
    ):
        self.rows, self.order, self.buckets = data.rows, data.order, data.buckets
        self.media, self.config, self.seed, self.num_samples = media_of(config), config, seed, num_samples
        self.caches = dict(caches or {})
        self.latents, self.text = self.caches.pop("latents", None), self.caches.pop("text", None)
        if unknown := set(also) - {"pixel_values", "caption"}:
            raise ValueError(f"also: there is pixel_values and caption, got {', '.join(map(repr, sorted(unknown)))}")
        self.has_content = self.latents is None or "pixel_values" in also
        self.has_caption = self.media.HAS_CAPTIONS and (self.text is None or "caption" in also)

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, k: int) -> dict[str, Any]:
        read = partial(self._read, k=k)
        sample, skipped = read_or_substitute(read, self.rows, self.order[k], self.config, self.seed, k, self.buckets)
        return sample | {"key": k, "skipped": skipped}

    def names_of(self, keys: Iterable[int]) -> list[str]:
        """The file names of the samples `keys`."""
        return [self.rows[self.order[k]].name for k in keys]

    def _read(self, row: int, k: int) -> dict[str, Any]:
        """What sample k is made of row `row`; raises RowError if that cannot be read."""
        sample, place = {"weight": self.rows.loss_weight(row)}, self.media.place(self.config, self.seed, k)
        stored = self.rows[row] if self.has_content or self.has_caption else None
        if self.has_content:
            size = self.media.size_of(self.config) if self.buckets is None else self.buckets.size_of(row)
            has_masks = self.rows.has_masks and self.latents is None
            sample |= self.media.read(stored, place, size, self.config, has_masks)
        if hasattr(place, "flip"):
            sample["flip"] = int(place.flip)
        if self.latents is not None:
            entry = self.latents[row]
            if not entry.pop("is_readable") and self.config.on_bad_row == "skip":
                raise RowError(f"{self.rows[row].name}: could not be read when the latents were cached")
            sides = {name: values[sample.get("flip", 0)] for name, values in entry.items()}
            given = [name for name in entry if name.startswith("first_frame.")]
            if given:
                sample["first_frame"] = {name.removeprefix("first_frame."): sides.pop(name) for name in given}
            if "masks" in sides:
                sample["mask"] = sides.pop("masks")
            sample |= sides
        if self.media.HAS_CAPTIONS:
            sample["dropped"] = self._is_dropped(k)
        if self.has_caption:
            captions = captions_of(stored.captions, stored.name)
            caption = draw_tags(captions[self._choose(len(captions), k)], self.config, self.seed, k)
            sample["caption"] = sample["condition"] = None if sample["dropped"] else complete(caption, self.config)
        if self.text is not None:
            numbers = self.text.of_row(row)
            if len(numbers) == 0:
                reason = "its captions could not be read when the prompts were cached"
                raise RowError(f"{self.rows[row].name}: {reason}")
            number = self.text.NULL if sample["dropped"] else numbers[self._choose(len(numbers), k)]
            sample["conditioning"] = self.text[number]
            sample["condition"] = None if sample["dropped"] else int(number)
        return sample | {name: cache[row] for name, cache in self.caches.items()}

    def _is_dropped(self, k: int) -> bool:
        share = self.config.caption_dropout
        return share > 0 and generator_for(self.seed, "caption_dropout", k).random() < share

    def _choose(self, count: int, k: int) -> int:
        if count == 1:
            return 0
        return int(generator_for(self.seed, "caption", k).integers(count))


def load_batches(accelerator: Accelerator, samples: Samples, state, config: Config) -> Iterator[dict[str, Any]]:
    """This process's parts of the batches, on its device, from the step on that `state` has come to."""
    train, num_workers, num_parts = config.train, config.data.num_workers, 1
    size = train.batch_size // train.gradient_accumulation_steps // accelerator.num_processes
    if config.data.streaming:
        num_workers = min(num_workers, size)
        num_parts = max(num_workers, 1)
        times = samples.order.times_read(accelerator.num_processes, train.gradient_accumulation_steps, num_parts)
        if times > 1:
            warn(
                f"data.lanes: each row is read {times:.3g} times an epoch; with a multiple of {num_parts} workers x "
                f"{accelerator.num_processes} processes x {train.gradient_accumulation_steps} parts it would be once"
            )
    atexit.register(end_workers)
    dataloader = torch.utils.data.DataLoader(
        samples,
        batch_sampler=Shares(
            range(state.step * train.batch_size, len(samples)),
            size,
            accelerator.process_index,
            accelerator.num_processes,
            num_parts,
        ),
        collate_fn=collate,
        num_workers=num_workers,
        prefetch_factor=2 * num_parts if num_workers else None,
        worker_init_fn=leave_signals_to_parent,
        pin_memory=accelerator.device.type == "cuda",
    )

    def batches() -> Iterator[dict[str, Any]]:
        parts = (send_to_device(part, accelerator.device, non_blocking=True) for part in dataloader)
        while batch := list(itertools.islice(parts, num_parts)):
            yield scale_pixels(join(batch))

    return batches()


class Shares(torch.utils.data.Sampler):
    """The samples `keys` of one of several processes, `size` at a time, each time in so many parts.

    A loader hands its batches to its workers in turn: with as many parts as workers, part i is always worker i's, which
    so has the same lanes of a stream all the time, and reads no others.
    """

    def __init__(self, keys: range, size: int, process: int, num_processes: int, num_parts: int = 1):
        self.keys, self.size, self.num_parts = keys, size, num_parts
        self.process, self.num_processes = process, num_processes

    def __iter__(self) -> Iterator[list[int]]:
        for first in range(self.process * self.size, len(self.keys), self.num_processes * self.size):
            for i in range(self.num_parts):
                begin, end = self.size * i // self.num_parts, self.size * (i + 1) // self.num_parts
                yield list(self.keys[first + begin : first + end])


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch: tensors are stacked, also those in dicts; "keys", "captions", "dropped", "conditions", "flips" and
    "skipped" are lists; "weights" is a tensor; "masks" is one, or None where no source has masks.

    The keys stay Python integers: what is drawn for them is drawn on the CPU, without asking the device.
    """
    names = {"key": "keys", "caption": "captions", "condition": "conditions", "weight": "weights", "mask": "masks"}
    names |= {"flip": "flips"}
    batch = {names.get(name, name): [sample[name] for sample in samples] for name in samples[0]}
    for name, values in batch.items():
        if isinstance(values[0], torch.Tensor):
            batch[name] = torch.stack(values)
        elif isinstance(values[0], dict):
            batch[name] = {part: torch.stack([value[part] for value in values]) for part in values[0]}
    return {"masks": None} | batch | {"weights": torch.tensor(batch["weights"])}


def join(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """The parts of a batch, each as `collate` makes it, as one."""
    if len(parts) == 1:
        return parts[0]
    batch = {name: [part[name] for part in parts] for name in parts[0]}
    for name, values in batch.items():
        if isinstance(values[0], torch.Tensor):
            batch[name] = torch.cat(values)
        elif isinstance(values[0], dict):
            batch[name] = {key: torch.cat([value[key] for value in values]) for key in values[0]}
        else:
            batch[name] = None if values[0] is None else list(itertools.chain(*values))
    return batch


def scale_pixels(batch: dict[str, Any]) -> dict[str, Any]:
    """A batch with "pixel_values" in [-1, 1], float32, also of videos, whose samples have bytes, a quarter of that."""
    if "pixel_values" in batch and batch["pixel_values"].dtype == torch.uint8:
        return batch | {"pixel_values": scale_bytes(batch["pixel_values"])}
    return batch


def read_or_substitute(
    read: Callable[[int], Any],
    rows: Rows,
    index: int,
    config: DataConfig,
    seed: int,
    k: int,
    buckets: Buckets | None = None,
) -> tuple[Any, bool]:
    """`read(index)` and False; or, if it raises RowError and `data.on_bad_row` is skip, what `read` makes of the first
    readable one of `rows.substitutes`, and True.

    Raises:
        RowError: the row cannot be read and is not to be skipped, or none of the other rows can be read either.
    """
    try:
        return read(index), False
    except RowError as error:
        if config.on_bad_row == "stop":
            raise
        first = error
    others, which = rows.substitutes(index, k, seed, buckets)
    for substitute in others:
        try:
            return read(substitute), True
        except RowError:
            continue
    raise RowError(f"{first}; nor can {which}")


def held_out_size(rows: Rows, row: int, config: DataConfig) -> tuple[int, ...]:
    """The size that evaluations see a row in."""
    return media_of(config).size_of(config) if rows.buckets is None else rows.buckets.size_of(row)


def read_held_out(rows: Rows, keys: list[int], config: DataConfig, seed: int) -> dict[str, Any]:
    """A batch as evaluations see it, as `collate` makes it: j of `keys` is row j modulo their number, or its
    substitute, from its middle and with its first caption. All have one `held_out_size`.

    Raises:
        RowError: see `read_or_substitute`.
    """
    media = media_of(config)

    def read(row: int) -> dict[str, Any]:
        stored = rows[row]
        sample = media.read(stored, media.MIDDLE, held_out_size(rows, row, config), config, rows.has_masks)
        if media.HAS_CAPTIONS:
            sample["caption"] = complete(captions_of(stored.captions, stored.name)[0], config)
        return sample | {"weight": rows.loss_weight(row)}

    found = [read_or_substitute(read, rows, j % len(rows), config, seed, j, rows.buckets)[0] for j in keys]
    return scale_pixels(collate([sample | {"key": j} for sample, j in zip(found, keys, strict=True)]))
