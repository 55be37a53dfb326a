"""The tensors of a checkpoint, without pickle: of each part of the run (a model, the optimizer, an average) by name.

One process writes `PART.safetensors`. Where each holds a share (`train.shard`), each writes its own, of all parts, to
`shard-00000.safetensors` and so on, as "PART/NAME"; `index.json` then has for each of these names its "shape" and its
"chunks", [file, offset, shape]. Any number of processes reads either: each what it holds itself."""

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from torch.distributed.tensor import DTensor

from difftrain_utils.errors import some
from difftrain_utils.optimization.sharding import as_share, share_of

INDEX_FILE, OPTIMIZER = "index.json", "optimizer"
Parts = Mapping[str, Mapping[str, torch.Tensor]]
Index = dict[str, dict[str, Any]]


def files_to_write(
    accelerator: Accelerator, parts: Parts, copy: bool
) -> tuple[dict[str, dict[str, torch.Tensor]], Index | None]:
    """({file: {name: tensor}} of this process, its entries of the index, None where there shall be none). The tensors
    are in main memory and contiguous; with `copy` they are copies."""
    is_shared = any(isinstance(tensor, DTensor) for tensors in parts.values() for tensor in tensors.values())
    is_main = accelerator.is_main_process

    def here(values: torch.Tensor) -> torch.Tensor:
        return values.to("cpu", copy=copy).contiguous()

    if not is_shared:
        own = parts.items() if is_main else ()
        return {f"{part}.safetensors": {n: here(t.detach()) for n, t in tensors.items()} for part, tensors in own}, None
    file, mine, index = f"shard-{accelerator.process_index:05d}.safetensors", {}, {}
    for part, tensors in parts.items():
        for name, tensor in tensors.items():
            offset, values, is_first = share_of(tensor, is_main)
            shape = list(tensor.shape)
            is_written = is_first and (values.numel() > 0 or (is_main and 0 in shape))
            if is_written:
                mine[f"{part}/{name}"] = here(values)
            if is_main or is_written:
                chunks = [[file, list(offset), list(values.shape)]] if is_written else []
                index[f"{part}/{name}"] = {"shape": shape, "chunks": chunks}
    return {file: mine}, index


def merge_indices(indices: Sequence[Index]) -> Index:
    """The index of all processes from theirs, of which the first has all names."""
    merged = {name: entry | {"chunks": list(entry["chunks"])} for name, entry in sorted(indices[0].items())}
    for index in indices[1:]:
        for name, entry in index.items():
            merged[name]["chunks"] += entry["chunks"]
    for name, entry in merged.items():
        entry["chunks"].sort(key=lambda chunk: chunk[1])
        _check_chunks(name, entry)
    return merged


class SavedTensors:
    """The tensors in a checkpoint's folder, open to be read.

    Raises what json and safetensors raise, or LookupError, TypeError or ValueError, if they are none."""

    def __init__(self, folder: Path):
        self.folder, self.is_shared = folder, (folder / INDEX_FILE).is_file()
        self.parts: dict[str, Index] = {}
        self._files: dict[str, Any] = {}
        self._stack = ExitStack()
        if self.is_shared:
            index = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
            for key, entry in index.items():
                part, _, name = key.partition("/")
                _check_chunks(key, entry)
                self.parts.setdefault(part, {})[name] = entry
            return
        for path in sorted(folder.glob("*.safetensors")):
            try:
                with safe_open(path, "pt") as file:
                    shapes = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            except SafetensorError as error:
                raise ValueError(f"{path.name}: {error}") from error
            entries = {n: {"shape": s, "chunks": [[path.name, [0] * len(s), s]]} for n, s in shapes.items()}
            self.parts[path.stem] = entries

    def __enter__(self) -> "SavedTensors":
        return self

    def __exit__(self, *exception: object) -> None:
        self._files.clear()
        self._stack.close()

    def shapes(self, part: str) -> dict[str, tuple[int, ...]]:
        """Of the tensors of a part."""
        return {name: tuple(entry["shape"]) for name, entry in self.parts[part].items()}

    def read(self, part: str, name: str) -> torch.Tensor:
        """A whole tensor, in main memory."""
        shape = self.parts[part][name]["shape"]
        return self._region(part, name, [0] * len(shape), shape)

    def read_like(self, part: str, name: str, like: torch.Tensor) -> torch.Tensor:
        """A tensor of which each process holds the share that it has of `like`; the whole where the two differ in
        shape or `like` is no DTensor."""
        if not isinstance(like, DTensor) or like.shape != tuple(self.parts[part][name]["shape"]):
            return self.read(part, name)
        offset, held, _ = share_of(like, True)
        return as_share(self._region(part, name, offset, held.shape).to(held.device), like)

    @torch.no_grad()
    def load(self, part: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Read a part into tensors of the same names and shapes.

        Raises:
            ValueError: names or shapes are others; nothing was changed.
        """
        if part not in self.parts:
            raise ValueError(f"{self.folder} has no {part!r}")
        there, here = self.shapes(part), {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if differing := sorted(there.keys() ^ here.keys()):
            raise ValueError(f"{self.folder} and this run do not both have {some(differing)} of {part}")
        for name in here:
            if there[name] != here[name]:
                raise ValueError(f"{part}: {name} is {there[name]} in {self.folder}, and here {here[name]}")
        for name, tensor in tensors.items():
            offset, held, _ = share_of(tensor, True)
            held.copy_(self._region(part, name, offset, held.shape))

    def _region(self, part: str, name: str, offset: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
        """The values from `offset` on, of this shape, put together from the chunks that overlap it."""
        chunks, key = self.parts[part][name]["chunks"], f"{part}/{name}" if self.is_shared else name
        if not shape:
            return self._open(chunks[0][0]).get_tensor(key)
        if 0 in shape:  # of nothing, too, the type is in a file
            return self._open(chunks[0][0]).get_slice(key)[0:0].new_empty(shape)
        found, columns = [], tuple(slice(o, o + n) for o, n in zip(offset[1:], shape[1:], strict=True))
        for file, start, size in chunks:
            first, last = max(offset[0], start[0]), min(offset[0] + shape[0], start[0] + size[0])
            if first < last:
                rows = slice(first - start[0], last - start[0])
                found.append(self._open(file).get_slice(key)[(rows, *columns)])
        return found[0] if len(found) == 1 else torch.cat(found)

    def _open(self, name: str) -> Any:
        if name not in self._files:
            if Path(name).name != name:
                raise ValueError(f"{self.folder / INDEX_FILE} names {name!r}, which is no file beside it")
            self._files[name] = self._stack.enter_context(safe_open(self.folder / name, "pt"))
        return self._files[name]


def _check_chunks(name: str, entry: dict[str, Any]) -> None:
    """Raise ValueError unless the chunks are all rows of a tensor, one after the other."""
    shape, next_row = entry["shape"], 0
    for _, start, size in entry["chunks"] if shape else ():
        if [next_row, *[0] * (len(shape) - 1)] != start or size[1:] != shape[1:]:
            raise ValueError(f"of {name}, which is {tuple(shape)}, a chunk begins at {start} and is {tuple(size)}")
        next_row += size[0]
    if not entry["chunks"] or (shape and next_row != shape[0]):
        raise ValueError(f"of {name}, which is {tuple(shape)}, there are {next_row} rows")
