"""A second family, so that the contract is one: a class-conditional DiT whose captions are its classes' names."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, DiTPipeline, DiTTransformer2DModel
from PIL import Image

from difftrain_utils.builtins.shapes import PROMPTS
from difftrain_utils.errors import InputError
from difftrain_utils.families.diffusers_family import DiffusersFamily
from difftrain_utils.families.family import Conditioning

LABELS = {str(i): prompt for i, prompt in enumerate(PROMPTS)}


def save_checkpoint(folder: Path, vae: torch.nn.Module, scheduler=None) -> Path:
    """A DiT of random weights on the latents of `vae`, with the shapes' captions as its classes."""
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8
    )
    for parameter in transformer.parameters():  # adaLN-zero: a DiT begins as the identity
        torch.nn.init.normal_(parameter, std=0.05)
    scheduler = DDIMScheduler(clip_sample=False) if scheduler is None else scheduler
    pipeline = DiTPipeline(transformer, vae, scheduler, id2label=LABELS)
    pipeline.register_to_config(id2label=LABELS)
    pipeline.save_pretrained(folder)
    return folder


@dataclass
class TinyDiT(DiffusersFamily):
    """Conditioning: "class_labels", (batch,). Of its output the second half, a variance, is not trained."""

    pipeline_class: ClassVar[type[DiffusionPipeline]] = DiTPipeline

    @property
    def pipeline_options(self) -> dict[str, Any]:
        return {"id2label": self.model_index["id2label"]}

    @property
    def size_multiple(self) -> int:
        halvings = len(self.config_of("vae").block_out_channels) - 1
        return 2**halvings * self.config_of("transformer").patch_size

    @property
    def labels(self) -> dict[str, int]:
        return {name: int(number) for number, name in self.model_index["id2label"].items()}

    def describe_parts(self, *parts: str) -> dict[str, str]:
        return super().describe_parts(*parts) | {"labels": str(self.labels)}

    def encode_prompts(self, captions: Sequence[str | None]) -> Conditioning:
        if unknown := {caption for caption in captions if caption is not None} - self.labels.keys():
            raise InputError(f"{self.source}: no class is called {min(unknown)!r}; there is {', '.join(self.labels)}")
        null = self.config_of("transformer").num_embeds_ada_norm
        labels = [null if caption is None else self.labels[caption] for caption in captions]
        return {"class_labels": torch.tensor(labels, device=self.device)}

    def predict(
        self,
        denoiser: torch.nn.Module,
        noisy_latents: torch.Tensor,
        timesteps: torch.Tensor,
        conditioning: Conditioning,
    ) -> torch.Tensor:
        output = denoiser(noisy_latents, timestep=timesteps, class_labels=conditioning["class_labels"]).sample
        return output[:, : noisy_latents.shape[1]].float()

    def shift(self, *size: int) -> float:
        """Larger latents need more noise: that of the schedule at 8 × 8."""
        return self.schedule.shift * (size[0] * size[1] / 64) ** 0.5

    def pipeline(self, denoiser: torch.nn.Module) -> DiffusionPipeline:
        """It notes the names of its classes, which the pipeline itself forgets to."""
        pipeline = super().pipeline(denoiser)
        pipeline.register_to_config(**self.pipeline_options)
        return pipeline

    def generate(
        self,
        denoiser: torch.nn.Module,
        prompts: Sequence[str],
        height: int,
        width: int,
        num_inference_steps: int,
        guidance_scale: float,
        guidance_rescale: float,
        generators: Sequence[torch.Generator],
    ) -> list[Image.Image]:
        """Its pictures have the size that the transformer was made for."""
        return self.pipeline(denoiser)(
            [self.labels[prompt] for prompt in prompts],
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            generator=list(generators),
        ).images
