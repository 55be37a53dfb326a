"""Encoded data on the disk: entries that are dicts of tensors, in shards that are read through memory maps.

A cache is a folder of safetensors shards, each beside its digest as `sha256sum` writes it. Each shard is written aside
and renamed, and shards that are missing or damaged are made again: a build that was killed goes on where it was. What a
shard holds does not depend on the number of processes. Several runs, on several machines, may make one cache together:
a claim beside a shard says that somebody is making it."""

import contextlib
import hashlib
import json
import math
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import safe_open
from safetensors.torch import save

from difftrain_utils.errors import InputError, warn, writing
from difftrain_utils.files import file_digest, write_file
from difftrain_utils.processes import is_gone, main_process_first, read_process, this_process
from difftrain_utils.terminal import announce, progress

SHARD_BYTES, ENTRIES_PER_BATCH = 2**26, 16
LAYOUT_FILE = "layout.json"
ABANDONED = 120  # seconds, longer than it takes to encode a batch
LOOK_AGAIN = 1.0  # seconds between two looks at what others are making

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
    at_once: int | None = None,
) -> EncodedCache:
    """The cache in `folder`, whose entry i, of group `groups[i]`, is what `encode` makes of `inputs[i]` (of a list of
    inputs, `at_once` or `ENTRIES_PER_BATCH`, it makes a batch). Shards that are not there or damaged are made; the
    processes share them out, and leave out those that another run is making, on this machine or on another one that has
    the same folder.

    Raises:
        InputError: there is not enough room on the disk.
        RunError: a shard cannot be written.
        RowError: of `inputs`.
    """
    at_once = at_once or ENTRIES_PER_BATCH
    with main_process_first(accelerator):
        cache = EncodedCache(folder, groups, _layout(accelerator, folder, groups, inputs, encode, at_once))
    mine = range(accelerator.process_index, len(cache.shards), accelerator.num_processes)
    with ThreadPoolExecutor(4) as pool:
        intact = list(pool.map(is_intact, map(cache.path, mine)))
    missing = [shard for shard, is_there in zip(mine, intact, strict=True) if not is_there]
    missing_anywhere = gather_object(missing)
    if accelerator.is_main_process and missing_anywhere:
        for path in map(cache.path, missing_anywhere):
            if path.exists() and not is_intact(path):
                warn_if_damaged(path)
                path.unlink()
        sizes = [(groups[cache.shards[shard][0]], len(cache.shards[shard])) for shard in missing_anywhere]
        announce(f"{what}: {len(missing_anywhere)} of {len(cache.shards)} files are to be made")
        _check_room(folder, sum(count * cache.layout[str(group)]["entry_bytes"] for group, count in sizes))
    accelerator.wait_for_everyone()
    while missing := [shard for shard in missing if not cache.path(shard).exists()]:
        if not _make_shards(cache, missing, inputs, encode, what, num_workers, at_once):
            time.sleep(LOOK_AGAIN)  # others are making them
    accelerator.wait_for_everyone()
    for shard in range(len(cache.shards)):
        _check_is_there(cache.path(shard))
    cache.measure()
    return cache


def _make_shards(
    cache: EncodedCache, shards: list[int], inputs, encode, what: str, num_workers: int, at_once: int
) -> int:
    """Make those of the shards that nobody else is making. Returns how many."""
    claimed: list[int] = []  # by the sampler, which is ahead of what is encoded

    def batches() -> Iterator[list[int]]:
        for shard in shards:
            if claim(cache.path(shard)):
                claimed.append(shard)
                yield from _batches(cache.shards[shard].tolist(), at_once)

    loader = torch.utils.data.DataLoader(inputs, batch_sampler=batches(), num_workers=num_workers, collate_fn=list)
    num_batches = sum(len(_batches(cache.shards[shard], at_once)) for shard in shards)
    entries, made = [], 0
    try:
        for batch in progress(loader, num_batches, f"{what}, batches"):
            entries += _entries(encode(batch), len(batch))
            for shard in claimed[made:]:
                claim_of(cache.path(shard)).touch()
            if len(entries) == len(cache.shards[claimed[made]]):
                path = cache.path(claimed[made])
                write_with_digest(path, save(pack(entries)))
                claim_of(path).unlink(missing_ok=True)
                entries, made = [], made + 1
    finally:
        for shard in claimed[made:]:
            claim_of(cache.path(shard)).unlink(missing_ok=True)
    return made


def claim(path: Path) -> bool:
    """Whether a file that is not there is this process's to make: nobody else has claimed it, or who has is dead: a
    process of this machine that is gone, or one that has not touched the claim for long. If that one lives after all,
    both make the same file, and nothing is lost.

    Raises:
        RunError: the claim cannot be written.
    """
    mark = claim_of(path)
    with writing(mark):
        while not path.exists():
            try:
                with mark.open("x") as file:
                    json.dump(this_process(), file)
            except FileExistsError:
                if not _is_abandoned(mark):
                    return False
                with contextlib.suppress(FileNotFoundError):  # one of those who find it takes it away
                    aside = mark.with_name(f"{mark.name}.{uuid.uuid4().hex}")
                    mark.rename(aside)
                    aside.unlink()
                continue
            if path.exists():  # made meanwhile
                mark.unlink(missing_ok=True)
                return False
            return True
    return False


def claim_of(path: Path) -> Path:
    """The file that says that somebody is making `path`."""
    return path.with_suffix(".claim")


def _is_abandoned(mark: Path) -> bool:
    """By the process that it names, or by the clock that its file system has, which another machine may have."""
    clock = mark.with_name(f"clock.{uuid.uuid4().hex}")
    try:
        clock.touch()
        return is_gone(read_process(mark)) or clock.stat().st_mtime - mark.stat().st_mtime > ABANDONED
    except FileNotFoundError:  # given up
        return True
    finally:
        clock.unlink(missing_ok=True)


def _layout(
    accelerator: Accelerator, folder: Path, groups: np.ndarray, inputs, encode, at_once: int
) -> dict[str, dict[str, int]]:
    """Of each group, the bytes of an entry as it is stored, measured at some from all over the group, and how many
    entries a shard of `SHARD_BYTES` has: whole batches, so that its size changes no batch. It is kept beside the
    shards, because measuring takes the encoder."""
    path = folder / LAYOUT_FILE
    if accelerator.is_main_process and not is_intact(path):
        warn_if_damaged(path)
        layout = {}
        for group in np.unique(groups):
            of_group = np.flatnonzero(groups == group)
            some = of_group[np.linspace(0, len(of_group) - 1, min(len(of_group), at_once)).astype(int)]
            trimmed = [_trim(entry) for entry in _entries(encode([inputs[int(entry)] for entry in some]), len(some))]
            size = math.ceil(sum(values.nbytes for entry in trimmed for values in entry.values()) / len(some))
            if size == 0:
                raise InputError(f"data.cache_dir: {folder}: the encoder puts out nothing that could be kept")
            count = max(1, SHARD_BYTES // size // at_once) * at_once
            layout[str(group)] = {"entry_bytes": size, "entries_per_shard": count}
        write_with_digest(path, json.dumps(layout).encode())
    return read_json(path)


def _batches(entries: list[int], at_once: int) -> list[list[int]]:
    return [entries[start : start + at_once] for start in range(0, len(entries), at_once)]


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
