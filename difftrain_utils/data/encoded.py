"""What frozen encoders make of the data, computed once: the VAE's moments and the prompts' embeddings.

A cache is a folder of safetensors shards, each beside its digest as `sha256sum` writes it. Its name is a digest of all
that decides its content (data, transforms, encoders, dtype), so that nothing stale is ever read. Each shard is written
aside and renamed, and shards that are missing or damaged are made again: a build that was killed goes on where it was.
What a shard holds does not depend on the number of processes.
"""

import hashlib
import itertools
import json
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import PIL
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object, tqdm
from safetensors import safe_open
from safetensors.torch import save

from difftrain_utils.config.config import Config
from difftrain_utils.config.data import DataConfig
from difftrain_utils.data.buckets import Buckets
from difftrain_utils.data.fingerprint import cache_folder
from difftrain_utils.data.rows import Rows, captions_of, read_row
from difftrain_utils.data.samples import resize_and_crop, size_of
from difftrain_utils.devices import device_name
from difftrain_utils.errors import InputError, RowError, RunError, warn, writing
from difftrain_utils.files import file_digest, write_file

ENTRIES_PER_SHARD, ENTRIES_PER_BATCH = 1024, 16
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
        shard, place = int(self.places[entry, 0]), int(self.places[entry, 1])
        values = self._open.get(shard)
        if values is None:  # a view of the mapped file
            values = self._open[shard] = safe_open(self.path(shard), "pt").get_tensor("values")
        return values[place]

    def __getstate__(self):  # an open shard is not passed on to another process
        return vars(self) | {"_open": {}}

    def path(self, shard: int) -> Path:
        """The shard's file, with one tensor, `values`."""
        return self.folder / f"shard-{shard:05d}.safetensors"


def build_cache(
    accelerator: Accelerator,
    cache: TensorCache,
    inputs: Sequence[Any],
    encode: Callable[[Any], torch.Tensor],
    what: str,
    num_workers: int,
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
        intact = list(pool.map(_is_intact, map(cache.path, mine)))
    missing = [shard for shard, is_intact in zip(mine, intact, strict=True) if not is_intact]
    missing_anywhere = gather_object(missing)
    if accelerator.is_main_process and missing_anywhere:
        for path in map(cache.path, missing_anywhere):
            if path.exists():
                warn(f"{path} is damaged: making it again")
        entry_bytes = encode([inputs[int(cache.shards[missing_anywhere[0]][0])]]).nbytes
        _check_room(cache.folder, sum(len(cache.shards[shard]) for shard in missing_anywhere) * entry_bytes)
    batches_of = [_batches(cache.shards[shard].tolist()) for shard in missing]
    batches = list(itertools.chain(*batches_of))
    loader = torch.utils.data.DataLoader(inputs, batch_sampler=batches, num_workers=num_workers, collate_fn=list)
    with tqdm(total=sum(map(len, batches)), desc=what, disable=not batches or not accelerator.is_main_process) as bar:
        loaded = iter(loader)
        for shard, of_shard in zip(missing, batches_of, strict=True):
            values = []
            for batch in itertools.islice(loaded, len(of_shard)):
                values.append(encode(batch).cpu())
                bar.update(len(batch))
            _write(cache.path(shard), save({"values": torch.cat(values).contiguous()}))
    accelerator.wait_for_everyone()
    for shard in range(len(cache.shards)):
        if not cache.path(shard).exists():
            raise InputError(f"data.cache_dir: {cache.path(shard)} is missing; all processes must see the same folder")


def _batches(entries: list[int]) -> list[list[int]]:
    return [entries[start : start + ENTRIES_PER_BATCH] for start in range(0, len(entries), ENTRIES_PER_BATCH)]


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(f"data.cache_dir: {folder} needs {needed / 1e9:.1f} GB more, {free / 1e9:.1f} GB are free")


class _Images:
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
        family.free_cached()
    if config.data.cache_text:
        prompts = cache_text(accelerator, family, data, config, fingerprint)
        family.free_cached()
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
    key = {name: getattr(config.data, name) for name in names} | family.cache_key("vae")
    key |= {"data": fingerprint, "buckets": buckets and buckets.sizes, "pillow": PIL.__version__}
    key |= {"channels_last": config.train.channels_last, "vae_slicing": config.model.vae_slicing}
    key |= describe_rounding(accelerator, family, config)
    groups = np.zeros(len(data), np.int16) if buckets is None else buckets.of_row
    cache = TensorCache(_folder(accelerator, config.data, "latents", key), groups)

    def encode(images: list[torch.Tensor]) -> torch.Tensor:
        pixel_values = torch.stack(images).to(accelerator.device)
        flips = (pixel_values, pixel_values.flip(-1)) if config.data.random_flip else (pixel_values,)
        moments = torch.stack([family.encode_images(flip) for flip in flips], 1)
        if not moments[pixel_values[:, 0, 0, 0].isfinite()].isfinite().all():  # would count as rows that are not read
            raise RunError(f"data.cache_latents: the VAE's output is not finite in {family.weight_dtype}")
        return moments

    build_cache(
        accelerator, cache, _Images(data, config.data, buckets), encode, "Caching latents", config.data.num_workers
    )
    return cache


class TextCache:
    """`cache.of_row(i)` are the numbers of row i's captions; `cache[number]` is a caption's conditioning, and number 0
    the empty caption."""

    def __init__(self, cache: TensorCache, starts: np.ndarray, numbers: np.ndarray):
        self.cache, self.starts, self.numbers = cache, starts, numbers  # arrays, which forked workers share

    def __getitem__(self, number: int) -> torch.Tensor:
        return self.cache[number]

    def of_row(self, row: int) -> np.ndarray:
        """The numbers of a row's captions, (n,), int32; none if the row could not be read."""
        return self.numbers[self.starts[row] : self.starts[row + 1]]


def cache_text(accelerator: Accelerator, family, data, config: Config, fingerprint: str) -> TextCache:
    """The conditioning of each caption that the data has, and of the empty one. A row whose captions cannot be read has
    none.

    Raises:
        InputError, RowError, RunError: see `build_cache`.
    """
    key = {"data": fingerprint} | describe_rounding(accelerator, family, config)
    folder = _folder(accelerator, config.data, "text", key | family.cache_key("text_encoder", "tokenizer"))
    captions_file = folder / "captions.json"
    with accelerator.main_process_first():
        if accelerator.is_main_process and not _is_intact(captions_file):
            if captions_file.exists():
                warn(f"{captions_file} is damaged: making it again")
            _write(captions_file, json.dumps(_number_captions(data, config.data)).encode())
        content = json.loads(captions_file.read_bytes())
    cache = TensorCache(folder, np.zeros(len(content["captions"]), np.int16))
    build_cache(accelerator, cache, content["captions"], family.encode_prompts, "Caching prompts", num_workers=0)
    return TextCache(cache, np.array(content["starts"]), np.array(content["numbers"], np.int32))


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


def describe_rounding(accelerator: Accelerator, family, config: Config) -> dict[str, Any]:
    """What an encoder's rounding depends on. It is in a cache's name, so that the numbers of a run never depend on
    whether, and by which run, its caches were made before."""
    on_cpu = accelerator.device.type == "cpu"
    return {
        "dtype": str(family.weight_dtype),
        "tf32": config.train.tf32,
        "deterministic": config.train.deterministic,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "device": torch.backends.cpu.get_cpu_capability() if on_cpu else device_name(accelerator.device),
        "threads": torch.get_num_threads() if on_cpu else None,
    }


def _folder(accelerator: Accelerator, config: DataConfig, what: str, key: dict[str, Any]) -> Path:
    content = json.dumps({"format": FORMAT} | key, indent=2) + "\n"
    folder = cache_folder(config) / f"{what}-{hashlib.sha256(content.encode()).hexdigest()[:20]}"
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if accelerator.is_main_process and not (folder / "key.json").exists():
            _write(folder / "key.json", content.encode())
    return folder


def _write(path: Path, content: bytes) -> None:
    """With its digest first: what is there is intact or not, whoever else is making the same cache."""
    write_file(path.with_suffix(".sha256"), f"{hashlib.sha256(content).hexdigest()}  {path.name}\n", shared=True)
    write_file(path, content, shared=True)


def _is_intact(path: Path) -> bool:
    try:
        return path.with_suffix(".sha256").read_text() == f"{file_digest(path)}  {path.name}\n"
    except (OSError, UnicodeDecodeError):
        return False
