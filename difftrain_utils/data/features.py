"""What a frozen image model says of the images that a run trains on: features that a denoiser is aligned with."""

import inspect
import json
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from transformers import AutoModel
from transformers.image_processing_base import ImageProcessingMixin

from difftrain_utils.config.config import Config
from difftrain_utils.data.caches import CroppedImages, describe_crops, describe_rounding, named_folder
from difftrain_utils.data.encoded import EncodedCache, Entry, build_cache
from difftrain_utils.data.load import Data
from difftrain_utils.errors import LOAD_ERRORS, InputError, blame
from difftrain_utils.files import weights_digest


class Teacher:
    """An image model of transformers that cuts images into patches, such as DINOv2, SigLIP, CLIP or any ViT, frozen.

    `teacher(pixel_values)`, of images (batch, 3, height, width) in [-1, 1], is what it says of each of the denoiser's
    tokens, whose sides are `stride` pixels: (batch, height / stride · width / stride, width of its states), float32,
    row by row. For that images are resized to one of its patches a token (Yu et al. 2024, arXiv:2410.06940, appendix).

    Raises:
        InputError: there is no such model, or it has no patches.
    """

    def __init__(self, name: str, stride: int, revision: str | None = None):
        self.name, self.stride = name, stride
        with blame(f"teacher: {name}", *LOAD_ERRORS), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # for what the checkpoint lacks, such as a pooler, which is not used
            model = AutoModel.from_pretrained(name, revision=revision, use_safetensors=True)
            processor, _ = ImageProcessingMixin.get_image_processor_dict(name, revision=revision)
            model = getattr(model, "vision_model", model)  # of those that read texts as well
            if not isinstance(getattr(model.config, "patch_size", None), int):
                raise InputError(f"teacher: {name}: a {type(model).__name__} has no patches")
            self.mean, self.std = (torch.tensor(processor[f"image_{what}"]).view(3, 1, 1) for what in ("mean", "std"))
        self.model, self.width = model.eval().requires_grad_(False), model.config.hidden_size
        self.sha256 = weights_digest(self.model)
        # those whose places are learned for one size
        names = inspect.signature(self.model.forward).parameters
        self.options = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in names else {}

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "Teacher":
        """Bring it onto a device, in place."""
        self.model.to(device, dtype)
        return self

    def describe(self) -> dict[str, Any]:
        """What `teacher(pixel_values)` depends on; of the model's config what its weights do not say, such as its
        heads."""
        return {
            "teacher": self.sha256,
            "teacher_config": json.loads(self.model.config.to_json_string()),
            "stride": self.stride,
            "mean": self.mean.flatten().tolist(),
            "std": self.std.flatten().tolist(),
        }

    def __call__(self, pixel_values: torch.Tensor) -> torch.Tensor:
        grid = [side // self.stride for side in pixel_values.shape[-2:]]
        size = [side * self.model.config.patch_size for side in grid]
        images = F.interpolate(pixel_values.float(), size, mode="bicubic", antialias=True) / 2 + 0.5
        images = (images - self.mean.to(images.device)) / self.std.to(images.device)
        states = self.model(images.to(self.model.dtype), **self.options).last_hidden_state
        count = grid[0] * grid[1]
        if states.shape[1] < count:
            raise InputError(f"teacher: {self.name}: it puts out {states.shape[1]} states of {count} patches")
        return states[:, -count:].float()  # before them may be a class and registers


def cache_features(
    accelerator: Accelerator, family, teacher: Teacher, data: Data, fingerprints: dict[str, dict], config: Config
) -> EncodedCache:
    """Entry i is of row i, upright and (with `data.random_flip`) mirrored, the middle cut out: "features", (1 or 2,
    tokens, width), what the teacher says of it, in the run's precision. Of a batch, `features[range(len(keys)), flips]`
    are those of its samples. Then the teacher is back in main memory. All processes call it.

    Raises:
        InputError: crops are random (`data.center_crop`), or see `build_cache`.
        RowError, RunError: see `build_cache`.
    """
    if not config.data.center_crop or config.data.streaming:
        raise InputError("data.center_crop: features are kept of one crop of each image, so it is needed")
    key = describe_crops(data, fingerprints["train"]["sha256"], config.data, teacher.describe())
    key |= describe_rounding(accelerator, family, config)
    groups = np.zeros(len(data.rows), np.int16) if data.buckets is None else data.buckets.of_row
    folder = named_folder(accelerator, config.data, "features", key)
    sides, dtype = 2 if config.data.random_flip else 1, family.weight_dtype
    teacher.to(accelerator.device, dtype)

    @torch.no_grad()
    def encode(items: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, bool]]) -> Entry:
        pixel_values = torch.stack([item[0] for item in items]).to(accelerator.device)
        flips = (pixel_values, pixel_values.flip(-1))[:sides]
        return {"features": torch.stack([teacher(flip) for flip in flips], 1).to(dtype)}

    images, workers = CroppedImages(data, config.data), config.data.num_workers
    cache = build_cache(accelerator, folder, groups, images, encode, "Caching features", workers)
    teacher.to("cpu", torch.float32)
    return cache
