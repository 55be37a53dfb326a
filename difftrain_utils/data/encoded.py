"""What frozen encoders make of the data, computed once: the VAE's moments and the prompts' conditioning.

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
from accelerate.utils import gather_object, tqdm
from safetensors import safe_open
from safetensors.torch import save

from difftrain_utils.config.config import Config
from difftrain_utils.config.data import DataConfig
from difftrain_utils.data.fingerprint import cache_folder
from difftrain_utils.data.load import Data
from difftrain_utils.data.rows import read_row
from difftrain_utils.data.samples import size_of
from difftrain_utils.devices import device_name
from difftrain_utils.errors import InputError, RowError, RunError, warn, writing
from difftrain_utils.files import file_digest, write_file
from difftrain_utils.media.image import crop_of, resize_and_crop
from difftrain_utils.media.text import captions_of

SHARD_BYTES, ENTRIES_PER_BATCH = 2**26, 16
FORMAT = 2  # part of a cache's name: to be raised when what is stored changes
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
    with accelerator.main_process_first():
        cache = EncodedCache(folder, groups, _layout(accelerator, folder, groups, inputs, encode))
    mine = range(accelerator.process_index, len(cache.shards), accelerator.num_processes)
    with ThreadPoolExecutor(4) as pool:
        intact = list(pool.map(is_intact, map(cache.path, mine)))
    missing = [shard for shard, is_there in zip(mine, intact, strict=True) if not is_there]
    missing_anywhere = gather_object(missing)
    if accelerator.is_main_process and missing_anywhere:
        for path in map(cache.path, missing_anywhere):
            _warn_if_damaged(path)
        sizes = [(groups[cache.shards[shard][0]], len(cache.shards[shard])) for shard in missing_anywhere]
        _check_room(folder, sum(count * cache.layout[str(group)]["entry_bytes"] for group, count in sizes))
    batches_of = [_batches(cache.shards[shard].tolist()) for shard in missing]
    batches = list(itertools.chain(*batches_of))
    loader = torch.utils.data.DataLoader(inputs, batch_sampler=batches, num_workers=num_workers, collate_fn=list)
    with tqdm(total=sum(map(len, batches)), desc=what, disable=not batches or not accelerator.is_main_process) as bar:
        loaded = iter(loader)
        for shard, of_shard in zip(missing, batches_of, strict=True):
            entries = []
            for batch in itertools.islice(loaded, len(of_shard)):
                encoded = {name: values.cpu() for name, values in encode(batch).items()}
                entries += [{name: values[i] for name, values in encoded.items()} for i in range(len(batch))]
                bar.update(len(batch))
            _write(cache.path(shard), save(pack(entries)))
    accelerator.wait_for_everyone()
    for shard in range(len(cache.shards)):
        _check_is_there(cache.path(shard))
    cache.measure()
    return cache


def _layout(accelerator: Accelerator, folder: Path, groups: np.ndarray, inputs, encode) -> dict[str, dict[str, int]]:
    """Of each group, the bytes of an entry, measured at the first one, and how many entries a shard of `SHARD_BYTES`
    has: whole batches, so that its size changes no batch. It is kept beside the shards, for measuring takes the
    encoder."""
    path = folder / LAYOUT_FILE
    if accelerator.is_main_process and not is_intact(path):
        _warn_if_damaged(path)
        layout = {}
        for group in np.unique(groups):
            entry = encode([inputs[int(np.flatnonzero(groups == group)[0])]])
            size = sum(values.nbytes for values in entry.values())
            count = max(1, SHARD_BYTES // size // ENTRIES_PER_BATCH) * ENTRIES_PER_BATCH
            layout[str(group)] = {"entry_bytes": size, "entries_per_shard": count}
        _write(path, json.dumps(layout).encode())
    return _read_json(path)


def _batches(entries: list[int]) -> list[list[int]]:
    return [entries[start : start + ENTRIES_PER_BATCH] for start in range(0, len(entries), ENTRIES_PER_BATCH)]


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(f"data.cache_dir: {folder} needs {needed / 1e9:.1f} GB more, {free / 1e9:.1f} GB are free")


class _Images:
    """Item i is the image of row i as a training sample has it, with the middle cut out, the sizes of that crop as it
    is and mirrored, (2, 6), and whether the image could be read (if not, it is grey)."""

    def __init__(self, data: Data, config: DataConfig):
        self.data, self.config = data, config

    def __getitem__(self, row: int) -> tuple[torch.Tensor, torch.Tensor, bool]:
        size = size_of(row, self.config, self.data.buckets)
        try:
            image, _ = read_row(self.data.rows, row)
        except RowError:
            if self.config.on_bad_row == "stop":
                raise
            return torch.zeros(3, *size), torch.zeros(2, 6, dtype=torch.long), False
        upright, mirrored = (crop_of(image, size, flip=flip) for flip in (False, True))
        sizes = torch.tensor([upright.sizes, mirrored.sizes])
        return resize_and_crop(image, upright, self.config), sizes, True


def load_caches(
    accelerator: Accelerator, family, data: Data, fingerprints: dict[str, dict], config: Config
) -> dict[str, Any]:
    """The caches by name that `data.cache_latents` ("latents") and `data.cache_text` ("text") ask for, made where they
    are not there yet; then the encoder is dropped from memory. All processes call it.

    Raises:
        InputError, RowError, RunError: see `build_cache`.
    """
    caches, sha256 = {}, fingerprints["train"]["sha256"]
    if config.data.cache_latents:
        caches["latents"] = cache_latents(accelerator, family, data, sha256, config)
        family.free_cached()
    if config.data.cache_text:
        caches["text"] = cache_text(accelerator, family, data, sha256, config)
        family.free_cached()
    return caches


def cache_latents(accelerator: Accelerator, family, data: Data, sha256: str, config: Config) -> EncodedCache:
    """Entry i is of row i, upright and (with `data.random_flip`) mirrored: "moments", the VAE's mean and standard
    deviation, (1 or 2, 2, channels, height, width), "sizes", (1 or 2, 6), and "is_readable".

    Raises:
        InputError, RowError, RunError: see `build_cache`.
    """
    names = ("resolution", "random_flip", "image_interpolation", "on_bad_row")
    key = {name: getattr(config.data, name) for name in names} | family.describe_parts(family.image_part)
    key |= {"data": sha256, "buckets": data.buckets and data.buckets.sizes, "pillow": PIL.__version__}
    key |= {"channels_last": config.train.channels_last, "vae_slicing": config.model.vae_slicing}
    key |= describe_rounding(accelerator, family, config)
    groups = np.zeros(len(data.rows), np.int16) if data.buckets is None else data.buckets.of_row
    folder = _folder(accelerator, config.data, "latents", key)
    sides = 2 if config.data.random_flip else 1

    def encode(items: list[tuple[torch.Tensor, torch.Tensor, bool]]) -> Entry:
        images, sizes, is_readable = zip(*items, strict=True)
        pixel_values, is_readable = torch.stack(images).to(accelerator.device), torch.tensor(is_readable)
        flips = (pixel_values, pixel_values.flip(-1))[:sides]
        moments = torch.stack([family.encode_images(flip) for flip in flips], 1)
        if not moments.isfinite().all():
            raise RunError(f"data.cache_latents: the VAE's output is not finite in {family.weight_dtype}")
        return {"moments": moments, "sizes": torch.stack(sizes)[:, :sides], "is_readable": is_readable}

    images = _Images(data, config.data)
    return build_cache(accelerator, folder, groups, images, encode, "Caching latents", config.data.num_workers)


class TextCache:
    """`text.of_row(i)` are the numbers of row i's captions, and `text[number]` is a caption's conditioning; number
    `NULL` is that of no caption."""

    NULL = 0

    def __init__(self, cache: EncodedCache, starts: np.ndarray, numbers: np.ndarray):
        self.cache, self.starts, self.numbers = cache, starts, numbers  # arrays, which forked workers share

    def __getitem__(self, number: int) -> Entry:
        return self.cache[number]

    def of_row(self, row: int) -> np.ndarray:
        """The numbers of a row's captions, (n,), int32; none if the row could not be read."""
        return self.numbers[self.starts[row] : self.starts[row + 1]]


def cache_text(accelerator: Accelerator, family, data: Data, sha256: str, config: Config) -> TextCache:
    """The conditioning of each caption that the data has, and of none. A row whose captions cannot be read has none.

    Raises:
        InputError, RowError, RunError: see `build_cache`.
    """
    key = {"data": sha256} | describe_rounding(accelerator, family, config) | family.describe_parts(*family.text_parts)
    folder = _folder(accelerator, config.data, "text", key)
    captions_file = folder / "captions.json"
    with accelerator.main_process_first():
        if accelerator.is_main_process and not is_intact(captions_file):
            _warn_if_damaged(captions_file)
            _write(captions_file, json.dumps(_number_captions(data.rows, config.data)).encode())
        content = _read_json(captions_file)
    captions, groups = content["captions"], np.zeros(len(content["captions"]), np.int16)
    cache = build_cache(accelerator, folder, groups, captions, family.encode_prompts, "Caching prompts", num_workers=0)
    return TextCache(cache, np.array(content["starts"]), np.array(content["numbers"], np.int32))


def _number_captions(rows, config: DataConfig) -> dict[str, list]:
    """The different captions, after the null for no caption, and their numbers row after row; row i's from starts[i]
    on."""
    numbers, of_rows, starts = {None: TextCache.NULL}, [], [0]
    for index in range(len(rows)):
        row = rows[index]
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
            write_file(folder / "key.json", content, shared=True)
    return folder


def _write(path: Path, content: bytes) -> None:
    """With its digest first: what is there is intact or not, whoever else is making the same cache."""
    write_file(path.with_suffix(".sha256"), f"{hashlib.sha256(content).hexdigest()}  {path.name}\n", shared=True)
    write_file(path, content, shared=True)


def is_intact(path: Path) -> bool:
    """Whether a file is what its digest beside it says."""
    try:
        return path.with_suffix(".sha256").read_text() == f"{file_digest(path)}  {path.name}\n"
    except (OSError, UnicodeDecodeError):
        return False


def _warn_if_damaged(path: Path) -> None:
    """Of a file that is not intact: it is damaged, unless it was never made."""
    if path.exists():
        warn(f"{path} is damaged: making it again")


def _read_json(path: Path) -> Any:
    """What the main process has just written, or found."""
    _check_is_there(path)
    return json.loads(path.read_bytes())


def _check_is_there(path: Path) -> None:
    if not path.exists():
        raise InputError(f"data.cache_dir: {path} is missing; all processes must see the same folder")
