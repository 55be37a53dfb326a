"""What frozen encoders make of the data, computed once: the VAE's moments and the prompts' embeddings.

A cache is a folder of safetensors shards, each beside its digest as `sha256sum` writes it. Its name is a digest of all
that decides its content (data, transforms, encoders, dtype), so that nothing stale is ever read. Each shard is written
aside and renamed, and shards that are missing or damaged are made again: a build that was killed goes on where it was.
What a shard holds does not depend on the number of processes.
"""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, tqdm
from safetensors import safe_open
from safetensors.torch import save_file

from difftrain_utils.buckets import Buckets
from difftrain_utils.config import Config, DataConfig
from difftrain_utils.data import Rows, captions_of, read_row
from difftrain_utils.errors import InputError, RowError, warn, writing
from difftrain_utils.fingerprint import cache_folder
from difftrain_utils.samples import resize_and_crop, size_of
from difftrain_utils.snapshot import file_digest, write_text

ENTRIES_PER_SHARD, ENTRIES_PER_BATCH = 1024, 16
CAPTIONS_FILE = "captions.json"
FORMAT = 1  # part of a cache's name: to be raised when what is stored changes


class TensorCache:
    """Entry i is a tensor, read from memory-mapped shards; entries of one group have one shape.

    Shard s holds the entries `shards[s]`, in this order.
    """

    def __init__(self, folder: Path, groups: np.ndarray):
        self.folder, self.shards = folder, []
        self.places = np.empty((len(groups), 2), np.int32)  # of each entry: its shard, and where in it
        for group in np.unique(groups):
            entries = np.flatnonzero(groups == group)
            for start in range(0, len(entries), ENTRIES_PER_SHARD):
                shard = entries[start : start + ENTRIES_PER_SHARD]
                self.places[shard, 0], self.places[shard, 1] = len(self.shards), np.arange(len(shard))
                self.shards.append(shard)
        self._open = {}

    def __getitem__(self, entry: int) -> torch.Tensor:
        shard, place = self.places[entry].tolist()
        if shard not in self._open:
            self._open[shard] = safe_open(self.path(shard), "pt").get_slice("values")
        return self._open[shard][place]

    def __getstate__(self):  # an open shard is not passed on to another process
        return vars(self) | {"_open": {}}

    def path(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:05d}.safetensors"

    def is_intact(self, shard: int) -> bool:
        path = self.path(shard)
        try:
            return path.with_suffix(".sha256").read_text() == _sha256_line(path)
        except OSError:
            return False

    def write(self, shard: int, values: torch.Tensor) -> None:
        path = self.path(shard)
        partial = path.with_suffix(".partial")
        with writing(path):
            save_file({"values": values}, partial)
            path.with_suffix(".sha256").write_text(_sha256_line(partial, path.name))
            partial.replace(path)


def build_cache(
    accelerator: Accelerator,
    cache: TensorCache,
    inputs: torch.utils.data.Dataset,
    encode: Callable[[Any], torch.Tensor],
    what: str,
    config: DataConfig,
) -> None:
    """Make the shards of `cache` that are not there or damaged: entry i is `encode` of `inputs[i]`, in batches.

    The processes share the shards out.

    Raises:
        InputError: there is not enough room on the disk.
        RunError: a shard cannot be written.
        RowError: of `inputs`.
    """
    mine = range(accelerator.process_index, len(cache.shards), accelerator.num_processes)
    with ThreadPoolExecutor(4) as pool:
        intact = dict(zip(mine, pool.map(cache.is_intact, mine), strict=True))
    missing = [shard for shard in mine if not intact[shard]]
    for shard in missing:
        if cache.path(shard).exists():
            warn(f"{cache.path(shard)} is damaged: making it again")
    batches = [b.tolist() for shard in missing for b in np.split(cache.shards[shard], _cuts(len(cache.shards[shard])))]
    loader = torch.utils.data.DataLoader(inputs, batch_sampler=batches, num_workers=config.num_workers, collate_fn=list)
    done, remaining = [], iter(missing)
    with tqdm(total=sum(map(len, batches)), desc=what, disable=not batches or not accelerator.is_main_process) as bar:
        for batch in loader:
            values = encode(batch).cpu()
            if not done:
                shard = next(remaining)
                _check_room(cache, values[0].nbytes)
            done.append(values)
            bar.update(len(values))
            if sum(map(len, done)) == len(cache.shards[shard]):
                cache.write(shard, torch.cat(done).contiguous())
                done = []
    accelerator.wait_for_everyone()
    for shard in range(len(cache.shards)):
        if not cache.path(shard).exists():
            raise InputError(f"data.cache_dir: {cache.path(shard)} is missing; all processes must see the same folder")


def _cuts(length: int) -> range:
    return range(ENTRIES_PER_BATCH, length, ENTRIES_PER_BATCH)


def _check_room(cache: TensorCache, entry_bytes: int) -> None:
    missing = sum(len(shard) for i, shard in enumerate(cache.shards) if not cache.path(i).exists())
    needed, free = missing * entry_bytes, shutil.disk_usage(cache.folder).free
    if needed > free:
        raise InputError(
            f"data.cache_dir: {cache.folder} needs {needed / 1e9:.1f} GB more, {free / 1e9:.1f} GB are free"
        )


class _Images(torch.utils.data.Dataset):
    """Item i is the image of row i as a training sample has it, (3, H, W); NaN if it cannot be read and is skipped."""

    def __init__(self, data, config: DataConfig, buckets: Buckets | None):
        self.data, self.config, self.buckets = data, config, buckets

    def __getitem__(self, row: int) -> torch.Tensor:
        size = size_of(row, self.config, self.buckets)
        try:
            return resize_and_crop(read_row(self.data, row, self.config)[0], self.config, size, 0.5, 0.5, flip=False)
        except RowError:
            if self.config.on_bad_row == "stop":
                raise
            return torch.full((3, *size), torch.nan)


class _Captions(torch.utils.data.Dataset):
    def __init__(self, captions: list[str]):
        self.captions = captions

    def __getitem__(self, entry: int) -> str:
        return self.captions[entry]


def load_caches(
    accelerator: Accelerator, family, data: Rows, config: Config, fingerprints: dict | None, buckets: Buckets | None
) -> tuple[TensorCache | None, "TextCache | None"]:
    """The caches that `data.cache_latents` and `data.cache_text` ask for, made where they are not there yet; then the
    encoder is dropped from memory. All processes call it; the main one has the data's `fingerprints`.

    Raises:
        InputError, RowError, RunError: see `build_cache`.
    """
    latents, prompts = None, None
    if config.data.cache_latents or config.data.cache_text:
        (fingerprint,) = broadcast_object_list([fingerprints and fingerprints["train"]["sha256"]])
    if config.data.cache_latents:
        latents = cache_latents(accelerator, family, data, config, fingerprint, buckets)
        family.free("vae")
    if config.data.cache_text:
        prompts = cache_text(accelerator, family, data, config, fingerprint)
        family.free("text_encoder")
    return latents, prompts


def cache_latents(
    accelerator: Accelerator, family, data, config: Config, fingerprint: str, buckets: Buckets | None
) -> TensorCache:
    """Entry i is the VAE's mean and standard deviation for row i, upright and (with `data.random_flip`) mirrored, of
    shape (1 or 2, 2, channels, height, width). For a row that cannot be read it is NaN.

    Raises:
        InputError, RowError, RunError: see `build_cache`.
    """
    names = ("resolution", "random_flip", "image_interpolation", "on_bad_row")
    key = {name: getattr(config.data, name) for name in names} | {"data": fingerprint}
    key |= {"buckets": buckets and buckets.sizes, "vae": family.digests()["vae"], "dtype": str(family.weight_dtype)}
    groups = np.zeros(len(data), np.int16) if buckets is None else buckets.of_row
    cache = TensorCache(_folder(config.data, "latents", key), groups)

    def encode(images: list[torch.Tensor]) -> torch.Tensor:
        pixel_values = torch.stack(images).to(accelerator.device)
        flips = (pixel_values, pixel_values.flip(-1)) if config.data.random_flip else (pixel_values,)
        return torch.stack([family.encode_images(flip) for flip in flips], 1)

    build_cache(accelerator, cache, _Images(data, config.data, buckets), encode, "Caching latents", config.data)
    return cache


class TextCache:
    """`cache.of_row(i)` are the numbers of row i's captions; `cache[number]` is a caption's conditioning, and number 0
    the empty caption."""

    def __init__(self, cache: TensorCache, starts: torch.Tensor, numbers: torch.Tensor):
        self.cache, self.starts, self.numbers = cache, starts, numbers  # tensors, which the workers share

    def __getitem__(self, number: int) -> torch.Tensor:
        return self.cache[number]

    def of_row(self, row: int) -> list[int]:
        first, last = self.starts[row : row + 2].tolist()
        return self.numbers[first:last].tolist()


def cache_text(accelerator: Accelerator, family, data, config: Config, fingerprint: str) -> TextCache:
    """The conditioning of each caption that the data has, and of the empty one. A row whose captions cannot be read has
    none.

    Raises:
        InputError, RowError, RunError: see `build_cache`.
    """
    key = {name: getattr(config.data, name) for name in ("caption_column", "sources", "on_bad_row")} | {
        "data": fingerprint
    }
    key |= {"text_encoder": family.digests()["text_encoder"], "dtype": str(family.weight_dtype)}
    vocabulary = json.dumps(family.tokenizer.get_vocab(), sort_keys=True).encode()
    key |= {"vocabulary": hashlib.sha256(vocabulary).hexdigest(), "tokens": family.tokenizer.model_max_length}
    folder = _folder(config.data, "text", key)
    with accelerator.main_process_first():
        if not (folder / CAPTIONS_FILE).exists():
            write_text(folder / CAPTIONS_FILE, json.dumps(_number_captions(data, config.data)))
        content = json.loads((folder / CAPTIONS_FILE).read_text(encoding="utf-8"))
    cache = TensorCache(folder, np.zeros(len(content["captions"]), np.int16))

    def encode(captions: list[str]) -> torch.Tensor:
        return family.encode_prompts(captions)

    workers = dataclasses.replace(config.data, num_workers=0)
    build_cache(accelerator, cache, _Captions(content["captions"]), encode, "Caching prompts", workers)
    return TextCache(cache, torch.tensor(content["starts"]), torch.tensor(content["numbers"], dtype=torch.int32))


def _number_captions(data, config: DataConfig) -> dict[str, list]:
    """The different captions, the empty one first, and their numbers row after row; row i's from starts[i] on."""
    numbers, of_rows, starts = {"": 0}, [], [0]
    for index in range(len(data)):
        row = data[index]
        try:
            captions = captions_of(row.captions, row.name)
        except RowError:
            if config.on_bad_row == "stop":
                raise
            captions = []
        of_rows += [numbers.setdefault(caption, len(numbers)) for caption in captions]
        starts.append(len(of_rows))
    return {"captions": list(numbers), "starts": starts, "numbers": of_rows}


def _folder(config: DataConfig, what: str, key: dict[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps([FORMAT, key]).encode()).hexdigest()[:20]
    folder = cache_folder(config) / f"{what}-{digest}"
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "key.json", json.dumps(key, indent=2) + "\n")
    return folder


def _sha256_line(path: Path, name: str | None = None) -> str:
    return f"{file_digest(path)}  {name or path.name}\n"
