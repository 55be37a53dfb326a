"""DiT: a transformer on VAE latents that is told a class, whose captions are its classes' names or numbers."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, DiTPipeline
from diffusers.models.embeddings import LabelEmbedding

from difftrain_utils.config.config import Config
from difftrain_utils.errors import InputError, some
from difftrain_utils.families.diffusers_family import DiffusersFamily
from difftrain_utils.families.family import Conditioning, Weights

NO_CLASS = 1000  # as the pipeline has it, whatever the transformer's number of classes


@dataclass
class DiT(DiffusersFamily):
    """See `Family`. Conditioning: "class_labels", (batch,), the classes' numbers, or `NO_CLASS` (Peebles and Xie 2023,
    arXiv:2212.09748).

    A class has the names that `id2label` in model_index.json gives it ("tench, Tinca tinca": each of them, or both),
    and its number. Of the transformer's output the second half, if there is one, is a variance and not trained."""

    pipeline_class: ClassVar[type[DiffusionPipeline]] = DiTPipeline
    guidance_order: ClassVar[str] = "prompt first"
    has_fixed_size: ClassVar[bool] = True

    @classmethod
    def load(cls, source: str, model_index: dict[str, Any], config: Config, weights: Weights) -> "DiT":
        family = super().load(source, model_index, config, weights)
        transformer = family.config_of("transformer")
        if transformer.num_embeds_ada_norm != NO_CLASS:
            raise ValueError(
                f"transformer: num_embeds_ada_norm must be {NO_CLASS}, the number of a DiTPipeline's no class, "
                f"got {transformer.num_embeds_ada_norm}"
            )
        channels, out_channels = transformer.in_channels, transformer.out_channels
        if out_channels not in (channels, 2 * channels):
            raise ValueError(f"transformer: out_channels must be {channels} or {2 * channels}, got {out_channels}")
        if not hasattr(family.sampler, "scale_model_input"):
            name = type(family.sampler).__name__
            raise InputError(f"scheduler.sampler: not for a DiTPipeline, try DPMSolverMultistepScheduler, got {name}")
        if config.data.changes_tags:
            raise InputError("data.shuffle_tags, data.tag_dropout: a DiTPipeline is told classes, which have no tags")
        for prompt in config.evaluation.prompts:
            family.class_number(prompt, "evaluation.prompts")
        return family

    @property
    def pipeline_options(self) -> dict[str, Any]:
        labels = self.model_index.get("id2label")
        return {"id2label": labels} if labels else {}

    @cached_property
    def classes(self) -> dict[str, set[int]]:
        """The numbers of the classes that are called so. A whole label is its own class, also where it is a synonym of
        another."""
        numbers, synonyms, labels = ({str(i): {i} for i in range(NO_CLASS)}, defaultdict(set), defaultdict(set))
        for number, label in self.pipeline_options.get("id2label", {}).items():
            labels[label.strip()].add(int(number))
            for name in label.split(","):  # as `DiTPipeline.get_label_ids` knows them
                synonyms[name.strip()].add(int(number))
        return numbers | synonyms | labels

    def class_number(self, caption: str, field: str) -> int:
        """The class of a caption, which is of this field. Raises InputError if it is none or one of several."""
        numbers = self.classes.get(caption.strip(), set())
        if len(numbers) > 1:
            raise InputError(f"{field}: {caption!r} may be class {' or '.join(map(str, sorted(numbers)))}: use numbers")
        if not numbers:
            labels = self.pipeline_options.get("id2label", {}).values()
            there = f"numbers below {NO_CLASS}" + (f" and {some(list(labels))}" if labels else "")
            raise InputError(f"{field}: no class is called {caption!r}; there is {there}")
        return min(numbers)

    def check_captions(self, captions: Iterable[str], field: str = "data.caption_column") -> None:
        for caption in set(captions):
            self.class_number(caption, field)

    def load_denoiser(self) -> torch.nn.Module:
        """See `Family`. In training it would drop labels by itself, besides `data.caption_dropout`."""
        denoiser = super().load_denoiser()
        for module in denoiser.modules():
            if isinstance(module, LabelEmbedding):
                module.dropout_prob = 0.0
        return denoiser

    def describe_parts(self, *parts: str) -> dict[str, str]:
        return super().describe_parts(*parts) | {"id2label": str(self.pipeline_options)}

    def encode_texts(self, texts: list[str]) -> Conditioning:
        numbers = [self.class_number(text, "data.caption_column") for text in texts]
        return {"class_labels": torch.tensor(numbers, device=self.device)}

    def encode_nothing(self) -> Conditioning:
        return {"class_labels": torch.tensor([NO_CLASS], device=self.device)}

    def normalise(self, latents: torch.Tensor) -> torch.Tensor:
        """Times `scaling_factor`, which is all that its pipeline undoes."""
        return latents * self.config_of("vae").scaling_factor

    def predict(
        self,
        denoiser: torch.nn.Module,
        noisy_latents: torch.Tensor,
        timesteps: torch.Tensor,
        conditioning: Conditioning,
    ) -> torch.Tensor:
        output = denoiser(
            noisy_latents, timestep=timesteps, class_labels=conditioning["class_labels"], return_dict=False
        )[0]
        return output[:, : noisy_latents.shape[1]].float()

    def pipeline(self, denoiser: torch.nn.Module) -> DiffusionPipeline:
        """It notes the names of its classes, which the pipeline itself forgets to."""
        pipeline = super().pipeline(denoiser)
        pipeline.register_to_config(**self.pipeline_options)
        return pipeline

    def call_options(self, prompts: list[str], guidance_scale: float) -> dict[str, Any]:
        labels = [self.class_number(prompt, "evaluation.prompts") for prompt in prompts]
        return {"class_labels": labels, "guidance_scale": guidance_scale}
