"""Z-Image: a single-stream transformer on VAE latents and the states of a Qwen3."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, ZImagePipeline
from diffusers.models.transformers.transformer_z_image import SEQ_MULTI_OF

from difftrain_utils.families.diffusers_family import INNER_FIELDS, DiffusersFamily, caption_start
from difftrain_utils.families.family import Conditioning


@dataclass
class ZImage(DiffusersFamily):
    """See `Family`; Z-Image Team 2025, arXiv:2511.22699. Conditioning: "prompt_embeds", the text encoder's last states
    but one, (batch, tokens, width), and "prompt_embeds_mask", (batch, tokens)."""

    pipeline_class: ClassVar[type[DiffusionPipeline]] = ZImagePipeline
    guidance_order: ClassVar[str] = "prompt first"
    text_parts: ClassVar[tuple[str, ...]] = ("text_encoder", "tokenizer")
    free_fields: ClassVar[frozenset[str]] = INNER_FIELDS | {
        *("dim", "n_layers", "n_refiner_layers", "n_heads", "n_kv_heads", "qk_norm", "rope_theta", "axes_dims")
    }
    gives_sigmas: ClassVar[bool] = True

    @property
    def text_lengths(self) -> tuple[int, int]:
        """More than there are before a caption; and captions, rounded up, have the transformer's places from 1 on, and
        the image the one after them."""
        start = caption_start(self.part("tokenizer"), enable_thinking=True)
        places = self.config_of("transformer").axes_lens[0]
        return start + 1, (places - 2) // SEQ_MULTI_OF * SEQ_MULTI_OF

    @property
    def patch_size(self) -> int:
        """Of those that the transformer may have, the one that the pipeline uses."""
        return 2

    def encode_texts(self, texts: list[str]) -> Conditioning:
        """`encode_prompt` overwrites the list that it is given."""
        embeds, _ = self.text_pipeline().encode_prompt(
            list(texts), do_classifier_free_guidance=False, max_sequence_length=self.text_length
        )
        padded = [torch.nn.functional.pad(states, (0, 0, 0, self.text_length - len(states))) for states in embeds]
        lengths = torch.tensor([len(states) for states in embeds], device=embeds[0].device)
        mask = torch.arange(self.text_length, device=lengths.device) < lengths[:, None]
        return {"prompt_embeds": torch.stack(padded), "prompt_embeds_mask": mask}

    def predict(
        self,
        denoiser: torch.nn.Module,
        noisy_latents: torch.Tensor,
        timesteps: torch.Tensor,
        conditioning: Conditioning,
    ) -> torch.Tensor:
        """See `Family`. The transformer takes lists, a time from 0 at noise to 1, and gives x_0 - ε."""
        embeds, mask = conditioning["prompt_embeds"], conditioning["prompt_embeds_mask"]
        lengths = mask.sum(1).tolist()
        output = denoiser(
            list(noisy_latents.unsqueeze(2).unbind()),  # videos of one frame
            (1000 - timesteps) / 1000,
            [states[:length] for states, length in zip(embeds, lengths, strict=True)],
            return_dict=False,
        )[0]
        return -torch.stack(list(output)).squeeze(2).float()

    def call_options(self, prompts: list[str], guidance_scale: float) -> dict[str, Any]:
        """The pipeline's guidance is 0 where there is none: it adds as many differences to the output of the caption.
        And it overwrites the list of prompts."""
        return super().call_options(list(prompts), guidance_scale - 1)
