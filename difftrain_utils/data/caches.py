"""What frozen encoders make of the data, computed once: the VAE's moments and the prompts' conditioning.

The name of a cache's folder is a digest of all that decides its content (data, transforms, encoders, dtype), so that
nothing stale is ever read.
"""

import json
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import PIL
import torch
import transformers
from accelerate import Accelerator

from difftrain_utils.config.audio_data import AudioDataConfig
from difftrain_utils.config.config import Config
from difftrain_utils.config.data import DataConfig
from difftrain_utils.config.video_data import VideoDataConfig
from difftrain_utils.data.encoded import (
    EncodedCache,
    Entry,
    build_cache,
    is_intact,
    read_json,
    warn_if_damaged,
    write_with_digest,
)
from difftrain_utils.data.fingerprint import cache_folder
from difftrain_utils.data.load import Data
from difftrain_utils.data.rows import read_captions
from difftrain_utils.devices import device_name
from difftrain_utils.errors import RowError, RunError, warn, writing
from difftrain_utils.files import text_digest, write_file
from difftrain_utils.media import audio, pairs, video
from difftrain_utils.media.captions import captions_of
from difftrain_utils.media.image import (
    Row,
    crop_of,
    read_image,
    read_mask,
    resize_and_crop,
    resize_and_crop_mask,
    scale_bytes,
    size_of,
)
from difftrain_utils.media.media import media_of
from difftrain_utils.objective.loss import scale_masks
from difftrain_utils.processes import main_process_first

# Part of a cache's name: to be raised when what is stored changes. Text 2 was of captions encoded together, whose last
# bits depended on each other, text 3 of encoders with rotary frequencies in the run's precision, text 4 of
# a T5 that was rounded wholly in fp16, and the same for both of Stable Diffusion XL's conditionings of no caption
FORMATS = {"latents": 2, "text": 5, "features": 1}
AFFIXES = ("caption_prefix", "caption_suffix")


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
    deviation, (1 or 2, 2, channels, height, width), "sizes", (1 or 2, 6), "is_readable", and where a source has masks
    "masks", (1 or 2, 1, height, width). Of pairs, moments and sizes have a dimension more, after the first; of videos
    moments have their frames before the height, and what the model is told of a first frame is there as
    "first_frame.NAME", (1 or 2, …). Of sounds there are "seconds_start" and "seconds_total", (1,), moments
    (1, 2, channels, length) and with `data.mask_padding` masks (1, 1, length), and no sizes.

    Raises:
        InputError, RowError, RunError: see `build_cache`.
    """
    media = media_of(config.data)
    encode_pixels = partial(_moments_of_pairs, family) if media is pairs else family.encode_images
    gives_first_frames = media is video and family.first_frames == "all"
    encoders = (family.image_part, *(family.condition_parts if gives_first_frames else ()))
    key = describe_crops(data, sha256, config.data, family.describe_parts(*encoders))
    key |= {"channels_last": config.train.channels_last, "vae_slicing": config.model.vae_slicing}
    key |= {"vae_tiling": True} if config.model.vae_tiling else {}
    key |= {"masks": True} if data.rows.has_masks else {}  # of a cache without, the name stays
    key |= {"first_frames": True} if gives_first_frames else {}
    key |= describe_rounding(accelerator, family, config)
    groups = np.zeros(len(data.rows), np.int16) if data.buckets is None else data.buckets.of_row
    folder = named_folder(accelerator, config.data, "latents", key)
    sides = 2 if media is not audio and config.data.random_flip else 1

    def encode(items: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, bool]]) -> Entry:
        images, masks, sizes, is_readable = zip(*items, strict=True)
        pixel_values, is_readable = torch.stack(images).to(accelerator.device), torch.tensor(is_readable)
        pixel_values = scale_bytes(pixel_values) if media is video else pixel_values
        flips = (pixel_values, pixel_values.flip(-1))[:sides]
        encoded = {"moments": torch.stack([encode_pixels(flip) for flip in flips], 1)}
        if gives_first_frames:
            given = [family.encode_first_frames(flip) for flip in flips]
            encoded |= {f"first_frame.{name}": torch.stack([flip[name] for flip in given], 1) for name in given[0]}
        check_finite(encoded)
        entry = encoded | {"sizes": torch.stack(sizes)[:, :sides], "is_readable": is_readable}
        if data.rows.has_masks:
            flips = (torch.stack(masks), torch.stack(masks).flip(-1))[:sides]
            size = encoded["moments"].shape[-2:]
            entry["masks"] = torch.stack([scale_masks(flip, size) for flip in flips], 1)
        return entry

    def encode_sounds(items: list[tuple[dict[str, torch.Tensor], bool]]) -> Entry:
        samples, is_readable = zip(*items, strict=True)
        batch = {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
        moments = family.encode_images(batch.pop("waveforms").to(accelerator.device))
        check_finite({"moments": moments})
        if "mask" in batch:
            batch["masks"] = scale_masks(batch.pop("mask"), moments.shape[3:])
        entry = {name: values[:, None] for name, values in ({"moments": moments} | batch).items()}
        return entry | {"is_readable": torch.tensor(is_readable)}

    def check_finite(encoded: dict[str, torch.Tensor]) -> None:
        if not all(values.isfinite().all() for values in encoded.values()):
            raise RunError(f"data.cache_latents: the VAE's output is not finite in {family.weight_dtype}")

    num_workers = config.data.num_workers
    if media is audio:
        inputs, encode, at_once = _Windows(data, config.data), encode_sounds, 1
    else:
        inputs, at_once = (_Clips(data, config.data), 1) if media is video else (CroppedImages(data, config.data), None)
    return build_cache(accelerator, folder, groups, inputs, encode, "Caching latents", num_workers, at_once)


def _moments_of_pairs(family, pixel_values: torch.Tensor) -> torch.Tensor:
    """Of (batch, 2, 3, height, width)."""
    return family.encode_images(pixel_values.flatten(0, 1)).unflatten(0, pixel_values.shape[:2])


class CroppedImages:
    """Item i is the image of row i as a training sample has it, with the middle cut out, its mask, the sizes of that
    crop as it is and mirrored, (2, 6), and whether the image could be read (if not, it is grey); of pairs (2, 3,
    height, width), no mask and (2, 2, 6)."""

    def __init__(self, data: Data, config: DataConfig):
        self.data, self.config, self.are_pairs = data, config, media_of(config) is pairs

    def __getitem__(self, row: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, bool]:
        size = size_of(self.config) if self.data.buckets is None else self.data.buckets.size_of(row)
        number, stored = (2,) if self.are_pairs else (), self.data.rows[row]
        try:
            captions_of(stored.captions, stored.name)
            if self.are_pairs:
                images, masks, sizes = zip(*(self._read(one, size) for one in pairs.images_of(stored)), strict=True)
                return torch.stack(images), masks[0], torch.stack(sizes, 1), True
            return *self._read(stored, size), True
        except RowError:
            if self.config.on_bad_row == "stop":
                raise
            sizes = torch.zeros(2, *number, 6, dtype=torch.long)
            return torch.zeros(*number, 3, *size), torch.zeros(1, *size), sizes, False

    def _read(self, stored: Row, size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        image = read_image(stored)
        mask = read_mask(stored, image) if self.data.rows.has_masks else None
        upright, mirrored = (crop_of(image, size, flip=flip) for flip in (False, True))
        mask = torch.ones(1, *size) if mask is None else resize_and_crop_mask(mask, upright, self.config)
        sizes = torch.tensor([upright.sizes, mirrored.sizes])
        return resize_and_crop(image, upright, self.config), mask, sizes


class _Clips:
    """The same of row i's clip, which has no mask, in bytes; black if it could not be read."""

    def __init__(self, data: Data, config: VideoDataConfig):
        self.data, self.config = data, config

    def __getitem__(self, row: int) -> tuple[torch.Tensor, None, torch.Tensor, bool]:
        size = video.size_of(self.config) if self.data.buckets is None else self.data.buckets.size_of(row)
        sample = _read_sample(self.data, row, video.middle(self.config), size, self.config)
        if sample is None:
            return torch.zeros(3, *size, dtype=torch.uint8), None, torch.zeros(2, 6, dtype=torch.long), False
        shown = video.Header(None, *sample["sizes"][:2].tolist())
        sizes = torch.tensor([crop_of(shown, size[1:], flip=flip).sizes for flip in (False, True)])
        return sample["pixel_values"], None, sizes, True


class _Windows:
    """Item i is what `media.audio.read` makes of row i, and whether it could be read (if not, it is silent)."""

    def __init__(self, data: Data, config: AudioDataConfig):
        self.data, self.config = data, config

    def __getitem__(self, row: int) -> tuple[dict[str, torch.Tensor], bool]:
        size, config = audio.size_of(self.config), self.config
        if (sample := _read_sample(self.data, row, audio.place(config, 0, 0), size, config)) is not None:
            return sample, True
        silent = {"waveforms": torch.zeros(config.audio_channels, *size)}
        silent |= {name: torch.tensor(0.0) for name in ("seconds_start", "seconds_total")}
        return silent | ({"mask": torch.ones(1, *size)} if config.mask_padding else {}), False


def _read_sample(
    data: Data, row: int, place: Any, size: tuple[int, ...], config: VideoDataConfig | AudioDataConfig
) -> dict[str, Any] | None:
    """The place in a row's clip or sound as a training sample has it; None of one that is skipped."""
    try:
        stored = data.rows[row]
        captions_of(stored.captions, stored.name)
        return media_of(config).read(stored, place, size, config)
    except RowError:
        if config.on_bad_row == "stop":
            raise
        return None


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
    key = {"data": sha256}
    key |= {name: value for name in AFFIXES if (value := getattr(config.data, name))}  # a cache without keeps its name
    key |= describe_rounding(accelerator, family, config) | family.describe_parts(*family.text_parts)
    folder = named_folder(accelerator, config.data, "text", key)
    captions_file = folder / "captions.json"
    with main_process_first(accelerator):
        if accelerator.is_main_process and not is_intact(captions_file):
            warn_if_damaged(captions_file)
            write_with_digest(captions_file, json.dumps(_number_captions(data.rows, config.data)).encode())
        content = read_json(captions_file)
    captions, groups = content["captions"], np.zeros(len(content["captions"]), np.int16)

    def encode(captions: list[str | None]) -> Entry:
        conditioning = family.encode_prompts(captions)
        if not all(value.isfinite().all() for value in conditioning.values()):
            raise RunError(f"data.cache_text: the text encoders' output is not finite in {family.weight_dtype}")
        return conditioning

    cache = build_cache(accelerator, folder, groups, captions, encode, "Caching prompts", num_workers=0)
    return TextCache(cache, np.array(content["starts"]), np.array(content["numbers"], np.int32))


def _number_captions(rows, config: DataConfig) -> dict[str, list]:
    """The different captions, after the null for no caption, and their numbers row after row; row i's from starts[i]
    on."""
    numbers, of_rows, starts = {None: TextCache.NULL}, [], [0]
    for captions in read_captions(rows, config):
        of_rows += [numbers.setdefault(caption, len(numbers)) for caption in captions]
        starts.append(len(of_rows))
    return {"captions": list(numbers), "starts": starts, "numbers": of_rows}


def describe_crops(
    data: Data, sha256: str, config: DataConfig | VideoDataConfig | AudioDataConfig, encoder: dict[str, Any]
) -> dict[str, Any]:
    """What decides the content of a cache of `CroppedImages`, clips or windows but for rounding: the pixels or samples,
    of the data that has this digest, and the `encoder`."""
    if media_of(config) is audio:
        names = ("waveform_length", "sampling_rate", "audio_channels", "window", "seconds_of", "peak")
        key = {name: getattr(config, name) for name in (*names, "mask_padding", "min_length_in_s", "on_bad_row")}
        return key | encoder | {"data": sha256} | audio.library_versions()
    is_video = media_of(config) is video
    names = ("num_frames", "fps", "height", "width", "window") if is_video else ("resolution",)
    names += ("random_flip", "image_interpolation", "on_bad_row")
    key = {name: getattr(config, name) for name in names} | encoder  # in this order, for a cache keeps its name
    key |= {"data": sha256, "buckets": data.buckets and data.buckets.sizes, "pillow": PIL.__version__}
    if is_video:
        return key | {"ffmpeg": video.library_versions()}
    return key | ({"no_upscale": True} if config.no_upscale else {})


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


def named_folder(accelerator: Accelerator, config: DataConfig, what: str, key: dict[str, Any]) -> Path:
    """The folder of the cache of `what`, named by all that decides its content; it may be empty."""
    formats = [json.dumps({"format": version} | key, indent=2) + "\n" for version in range(1, FORMATS[what] + 1)]
    *older, folder = [cache_folder(config) / f"{what}-{text_digest(content)[:20]}" for content in formats]
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if accelerator.is_main_process and not (folder / "key.json").exists():
            for path in filter(Path.exists, older):
                warn(f"data.cache_dir: {path} is of an earlier version of difftrain and not used: making it again")
            write_file(folder / "key.json", formats[-1], shared=True)
    return folder
