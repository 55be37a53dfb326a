from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator

from difftrain_utils.config.data import DataConfig
from difftrain_utils.config.model import ModelConfig
from difftrain_utils.config.text_to_image import TextToImageConfig
from difftrain_utils.data.caches import load_caches
from difftrain_utils.data.load import Data


class FakeFamily:
    """As much of a family as caches need, without weights. An image's latents have two frames, the image in small and
    its negative; a caption has a token for each word, of at most eight, and no caption has one of its own."""

    image_part, text_parts, weight_dtype = "vae", ("text_encoder", "tokenizer"), torch.float32

    def describe_parts(self, *parts: str) -> dict[str, str]:
        return dict.fromkeys(parts, "fake")

    def free_cached(self) -> None:
        pass

    def encode_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(batch, 2, 3, 2, height / 8, width / 8)."""
        small = torch.nn.functional.max_pool2d(pixel_values, 8)  # exactly mirrored if the image is
        mean = torch.stack([small, -small], 2)
        return torch.stack([mean, torch.full_like(mean, 0.1)], 1)

    def encode_prompts(self, captions: Sequence[str | None]) -> dict[str, torch.Tensor]:
        tokens = [[-1] if caption is None else list(map(len, caption.split()))[:8] for caption in captions]
        embeds = torch.zeros(len(captions), 8, 3)
        mask = torch.zeros(len(captions), 8, dtype=torch.bool)
        for i, lengths in enumerate(tokens):
            embeds[i, : len(lengths)] = torch.tensor(lengths, dtype=torch.float32)[:, None]
            mask[i, : len(lengths)] = True
        return {"prompt_embeds": embeds, "prompt_embeds_mask": mask}


@pytest.fixture
def fake_family() -> FakeFamily:
    return FakeFamily()


@pytest.fixture
def load_fake_caches(fake_family, tmp_path) -> Callable[[Data, DataConfig], dict]:
    """What `load_caches` makes of data with the fake family."""

    def load(data: Data, config: DataConfig) -> dict:
        config = TextToImageConfig(ModelConfig("fake"), replace(config, cache_dir=str(tmp_path / "cache")))
        fingerprints = {"train": {"sha256": "of the test"}}
        return load_caches(Accelerator(cpu=True), fake_family, data, fingerprints, config)

    return load
