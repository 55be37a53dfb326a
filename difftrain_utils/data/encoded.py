"""Encoded data on the disk: entries that are dicts of tensors, in shards that are read through memory maps.

A cache is a folder of safetensors shards, each beside its digest as `sha256sum` writes it. Each shard is written aside
and renamed, and shards that are missing or damaged are made again: a build that was killed goes on where it was. What a
shard holds does not depend on the number of processes."""

import hashlib
import itertools
import json
import math
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import safe_open
from safetensors.torch import save

from difftrain_utils.errors import InputError, warn
from difftrain_utils.files import file_digest, write_file
from difftrain_utils.processes import main_process_first
from difftrain_utils.terminal import announce, progress

SHARD_BYTES, ENTRIES_PER_BATCH = 2**26, 16
LAYOUT_FILE = "layout.json"

Entry = dict[str, torch.Tensor]


class EncodedCache:
    """Entry i is a dict of tensors, read from memory-mapped shards.

    A shard holds entries of one group, and of each name one tensor: those of its entries one after another along their
    first dimension, and as `NAME.ends` where each of them ends. So entries may be of different lengths: of what a mask
    `NAME_mask` belongs to, the end that the mask leaves out is not stored, and comes back as zeros. Numbers, which have
    no dimension, are stacked.

    `layout` says of each group how many entries a shard has.
    """

    def __init__(self, folder: Path, groups: np.ndarray, layout: dict[str, dict[str, int]]):
        self.folder, self.layout, self.shards = folder, layout, []
        self.shard_of, self.index_in = (np.empty(len(groups), np.int32) for _ in range(2))
        for group in np.unique(groups):
            entries, count = np.flatnonzero(groups == group), layout[str(group)]["entries_per_shard"]
            for start in range(0, len(entries), count):
                shard = entries[start : start + count]
                self.shard_of[shard], self.index_in[shard] = len(self.shards), np.arange(len(shard))
                self.shards.append(shard)
        self.lengths: dict[str, int] = {}
        self._open: dict[int, dict[str, tuple[torch.Tensor, np.ndarray | None]]] = {}

    def __getitem__(self, entry: int) -> Entry:
        tensors, index, values = self._tensors(int(self.shard_of[entry])), int(self.index_in[entry]), {}
        for name, (tensor, edges) in tensors.items():
            value = tensor[index] if edges is None else tensor[int(edges[index]) : int(edges[index + 1])]
            if name in self.lengths:
                padding = value.new_zeros(self.lengths[name] - len(value), *value.shape[1:])
                value = torch.cat([value, padding])
            values[name] = value
        return values

    def __getstate__(self):  # an open shard is not passed on to another process
        return vars(self) | {"_open": {}}

    def path(self, shard: int) -> Path:
        """The shard's file."""
        return self.folder / f"shard-{shard:05d}.safetensors"

    def measure(self) -> None:
        """Note how long the longest entry is, of each name with a mask: what is read is padded to that. So it depends
        on the data, and not on which entries are in one batch."""
        names = self._tensors(0)
        padded = [name for name in names if f"{name}_mask" in names or name.endswith("_mask")]
        for shard in range(len(self.shards) if padded else 0):
            with safe_open(self.path(shard), "pt") as file:
                for name in padded:
                    longest = int(file.get_tensor(f"{name}.ends").diff(prepend=torch.zeros(1, dtype=torch.long)).max())
                    self.lengths[name] = max(longest, self.lengths.get(name, 0))

    def _tensors(self, shard: int) -> dict[str, tuple[torch.Tensor, np.ndarray | None]]:
        if shard not in self._open:  # views of the mapped file
            with safe_open(self.path(shard), "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            ends = {name: tensors.pop(f"{name}.ends", None) for name in list(tensors) if not name.endswith(".ends")}
            self._open[shard] = {name: _as_rows(tensors[name], of_name) for name, of_name in ends.items()}
        return self._open[shard]


def _as_rows(tensor: torch.Tensor, ends: torch.Tensor | None) -> tuple[torch.Tensor, np.ndarray | None]:
    """Entries of one length as the rows of a tensor, which is faster to read; others as they lie, and their edges."""
    if ends is None:
        return tensor, None
    if ends[0] and torch.equal(ends.diff(), ends[0].expand(len(ends) - 1)):
        return tensor.view(len(ends), int(ends[0]), *tensor.shape[1:]), None
    return tensor, np.concatenate([[0], ends.numpy()])


def pack(entries: list[Entry]) -> Entry:
    """The tensors of a shard: see `EncodedCache`."""
    entries, tensors = [_trim(entry) for entry in entries], {}
    for name in entries[0]:
        values = [entry[name] for entry in entries]
        if values[0].ndim == 0:
            tensors[name] = torch.stack(values)
        else:
            tensors[name] = torch.cat(values).contiguous()
            tensors[f"{name}.ends"] = torch.tensor([len(value) for value in values]).cumsum(0)
    return tensors


def _entries(encoded: Entry, count: int) -> list[Entry]:
    encoded = {name: values.cpu() for name, values in encoded.items()}
    return [{name: values[i] for name, values in encoded.items()} for i in range(count)]


def _trim(entry: Entry) -> Entry:
    trimmed = dict(entry)
    for mask_name in [name for name in entry if name.endswith("_mask")]:
        kept = entry[mask_name].nonzero()
        length = int(kept[-1]) + 1 if len(kept) else 0
        for name in {mask_name, mask_name.removesuffix("_mask")} & entry.keys():
            trimmed[name] = entry[name][:length]
    return trimmed


def build_cache(
    accelerator: Accelerator,
    folder: Path,
    groups: np.ndarray,
    inputs: Sequence[Any],
    encode: Callable[[list[Any]], Entry],
    what: str,
    num_workers: int,
) -> EncodedCache:
    """The cache in `folder`, whose entry i, of group `groups[i]`, is what `encode` makes of `inputs[i]` (of a list of
    inputs it makes a batch). Shards that are not there or damaged are made; the processes share them out.

    Raises:
        InputError: there is not enough room on the disk.
        RunError: a shard cannot be written.
        RowError: of `inputs`.
    """
    with main_process_first(accelerator):
        cache = EncodedCache(folder, groups, _layout(accelerator, folder, groups, inputs, encode))
    mine = range(accelerator.process_index, len(cache.shards), accelerator.num_processes)
    with ThreadPoolExecutor(4) as pool:
        intact = list(pool.map(is_intact, map(cache.path, mine)))
    missing = [shard for shard, is_there in zip(mine, intact, strict=True) if not is_there]
    missing_anywhere = gather_object(missing)
    if accelerator.is_main_process and missing_anywhere:
        for path in map(cache.path, missing_anywhere):
            warn_if_damaged(path)
        sizes = [(groups[cache.shards[shard][0]], len(cache.shards[shard])) for shard in missing_anywhere]
        announce(f"{what}: {len(missing_anywhere)} of {len(cache.shards)} files are to be made")
        _check_room(folder, sum(count * cache.layout[str(group)]["entry_bytes"] for group, count in sizes))
    batches_of = [_batches(cache.shards[shard].tolist()) for shard in missing]
    batches = list(itertools.chain(*batches_of))
    loader = torch.utils.data.DataLoader(inputs, batch_sampler=batches, num_workers=num_workers, collate_fn=list)
    loaded = progress(loader, len(batches), f"{what}, batches")
    for shard, of_shard in zip(missing, batches_of, strict=True):
        entries = []
        for batch in itertools.islice(loaded, len(of_shard)):
            entries += _entries(encode(batch), len(batch))
        write_with_digest(cache.path(shard), save(pack(entries)))
    accelerator.wait_for_everyone()
    for shard in range(len(cache.shards)):
        _check_is_there(cache.path(shard))
    cache.measure()
    return cache


def _layout(accelerator: Accelerator, folder: Path, groups: np.ndarray, inputs, encode) -> dict[str, dict[str, int]]:
    """Of each group, the bytes of an entry as it is stored, measured at some from all over the group, and how many
    entries a shard of `SHARD_BYTES` has: whole batches, so that its size changes no batch. It is kept beside the
    shards, because measuring takes the encoder."""
    path = folder / LAYOUT_FILE
    if accelerator.is_main_process and not is_intact(path):
        warn_if_damaged(path)
        layout = {}
        for group in np.unique(groups):
            of_group = np.flatnonzero(groups == group)
            some = of_group[np.linspace(0, len(of_group) - 1, min(len(of_group), ENTRIES_PER_BATCH)).astype(int)]
            trimmed = [_trim(entry) for entry in _entries(encode([inputs[int(entry)] for entry in some]), len(some))]
            size = math.ceil(sum(values.nbytes for entry in trimmed for values in entry.values()) / len(some))
            if size == 0:
                raise InputError(f"data.cache_dir: {folder}: the encoder puts out nothing that could be kept")
            count = max(1, SHARD_BYTES // size // ENTRIES_PER_BATCH) * ENTRIES_PER_BATCH
            layout[str(group)] = {"entry_bytes": size, "entries_per_shard": count}
        write_with_digest(path, json.dumps(layout).encode())
    return read_json(path)


def _batches(entries: list[int]) -> list[list[int]]:
    return [entries[start : start + ENTRIES_PER_BATCH] for start in range(0, len(entries), ENTRIES_PER_BATCH)]


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(f"data.cache_dir: {folder} needs {needed / 1e9:.1f} GB more, {free / 1e9:.1f} GB are free")


def write_with_digest(path: Path, content: bytes) -> None:
    """With its digest first: what is there is intact or not, whoever else is making the same cache."""
    write_file(path.with_suffix(".sha256"), f"{hashlib.sha256(content).hexdigest()}  {path.name}\n", shared=True)
    write_file(path, content, shared=True)


def is_intact(path: Path) -> bool:
    """Whether a file is what its digest beside it says."""
    try:
        return path.with_suffix(".sha256").read_text() == f"{file_digest(path)}  {path.name}\n"
    except (OSError, UnicodeDecodeError):
        return False


def warn_if_damaged(path: Path) -> None:
    """Of a file that is not intact: it is damaged, unless it was never made."""
    if path.exists():
        warn(f"{path} is damaged: making it again")


def read_json(path: Path) -> Any:
    """What the main process has just written, or found."""
    _check_is_there(path)
    return json.loads(path.read_bytes())


def _check_is_there(path: Path) -> None:
    if not path.exists():
        raise InputError(f"data.cache_dir: {path} is missing; all processes must see the same folder")
