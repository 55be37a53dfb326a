"""Chroma: Flux.1's blocks without its pooled text and its guidance, and with a mask over the states of a T5."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import ChromaPipeline, DiffusionPipeline

from difftrain_utils.config.config import Config
from difftrain_utils.errors import InputError
from difftrain_utils.families.diffusers_family import JOINT_ATTENTION, DiffusersFamily
from difftrain_utils.families.family import Conditioning, Weights
from difftrain_utils.families.flux import packed_arguments, unpack


@dataclass
class Chroma(DiffusersFamily):
    """See `Family`. Conditioning: "prompt_embeds", the states of the T5, (batch, tokens, width), and
    "prompt_embeds_mask", (batch, tokens), bool: a caption and the first token after it, if there is one.

    The pipeline of diffusers 0.42 gives the denoiser the mask as numbers, which attention adds to its scores, so that
    it masks nothing. Here it is the bool that it is meant to be; `generate` is the pipeline as it is."""

    pipeline_class: ClassVar[type[DiffusionPipeline]] = ChromaPipeline
    guidance_order: ClassVar[str] = "apart"
    lora_targets: ClassVar[tuple[str, ...]] = JOINT_ATTENTION
    text_parts: ClassVar[tuple[str, ...]] = ("text_encoder", "tokenizer")
    text_lengths: ClassVar[tuple[int, float]] = (1, 512)  # that the pipeline allows
    gives_sigmas: ClassVar[bool] = True
    takes_gradient_checkpointing: ClassVar[bool] = False

    @classmethod
    def load(cls, source: str, model_index: dict[str, Any], config: Config, weights: Weights) -> "Chroma":
        if config.train.gradient_checkpointing:
            raise InputError(
                "train.gradient_checkpointing: must be false for a ChromaPipeline, whose denoiser drops the mask of "
                "the captions then, got true"
            )
        return super().load(source, model_index, config, weights)

    @property
    def patch_size(self) -> int:
        """That of the pipeline's packing; the denoiser's own, of what is packed, is 1."""
        return 2

    def encode_texts(self, texts: list[str]) -> Conditioning:
        embeds, _, mask, *_ = self.text_pipeline().encode_prompt(
            texts, do_classifier_free_guidance=False, **self.text_options
        )
        return {"prompt_embeds": embeds, "prompt_embeds_mask": mask.bool()}

    def predict(
        self,
        denoiser: torch.nn.Module,
        noisy_latents: torch.Tensor,
        timesteps: torch.Tensor,
        conditioning: Conditioning,
    ) -> torch.Tensor:
        arguments = packed_arguments(noisy_latents, timesteps, conditioning["prompt_embeds"])
        mask = conditioning["prompt_embeds_mask"].bool()
        mask = torch.cat([mask, mask.new_ones(arguments["hidden_states"].shape[:2])], 1)
        output = denoiser(**arguments, attention_mask=mask, return_dict=False)[0]
        return unpack(output, noisy_latents).float()
