"""The checkpoint to train."""

import math
from dataclasses import dataclass
from typing import Literal

from difftrain_utils.config.config import Require, refuse_null, require_of


@dataclass
class LoraConfig:
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685) that are trained instead of the denoiser."""

    rank: int = 16
    """Rank of the adapters' matrices."""
    alpha: float | None = None
    """What an adapter adds is scaled by alpha / rank; null: as the rank, so by 1."""
    target_modules: list[str] | None = None
    """Names of the layers that get adapters, or the ends of their names; null: the attention's, by the family."""
    init: Literal["gaussian", "kaiming"] = "gaussian"
    """How adapters begin, drawn from `train.seeds.weights`; all begin at adding nothing."""
    dropout: float = 0.0
    """Dropout of what goes into the adapters."""
    use_dora: bool = False
    """Train the length of each weight's columns, too (Liu et al. 2024, arXiv:2402.09353)."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(rank) (Kalajdzievski 2023, arXiv:2312.03732)."""
    quantization: Literal["int8", "nf4"] | None = None
    """Keep the frozen linear layers in 8 bits (LLM.int8(), Dettmers et al. 2022, arXiv:2208.07339) or 4 (QLoRA, 2023,
    arXiv:2305.14314). Needs the extra `quantization`."""
    merge: bool = False
    """Write `pipeline/`, too, with the adapters merged into its denoiser."""

    def check(self, require: Require) -> None:
        require(1 <= self.rank <= 4096, "rank", "must be from 1 to 4096")
        require(self.alpha is None or 0 < self.alpha < math.inf, "alpha", "must be above 0 and finite, or null")
        require(self.target_modules is None or len(self.target_modules) > 0, "target_modules", "must not be empty")
        require(0 <= self.dropout < 1, "dropout", "must be at least 0 and below 1")
        rule = "not with use_dora, for which peft does not find the weights; nf4 goes with it"
        require(not (self.use_dora and self.quantization == "int8"), "quantization", rule)


@dataclass
class CheckpointConfig:
    """A checkpoint, and what of it is trained."""

    pretrained_model_name_or_path: str
    """A checkpoint: a folder, a hub name or a built-in one."""
    revision: str | None = None
    """Branch, tag or commit of a hub checkpoint."""
    variant: str | None = None
    """Variant of the weight files, e.g. `fp16`."""
    train_from_scratch: bool = False
    """Start the denoiser from random weights (drawn from `train.seeds.weights`) instead of the checkpoint's.
    The built-in ones have no trained denoiser, so they always do."""
    lora: LoraConfig | None = None
    """Train adapters instead of the denoiser's own weights: `{}` for the defaults, or the fields one by one,
    `--model.lora.rank 16`. Needs the extra `lora`."""
    trainable: list[str] | None = None
    """Patterns of the denoiser's weights that are trained, `["*.attn2.*", "conv_out.*"]`; null: all, or with
    `model.lora` none but its adapters."""

    def check(self, require: Require) -> None:
        require(self.pretrained_model_name_or_path != "", "pretrained_model_name_or_path", "must not be empty")
        require(self.trainable is None or len(self.trainable) > 0, "trainable", "must not be empty")
        if self.lora is not None:
            refuse_null(self.lora, "model.lora")
            self.lora.check(require_of(self.lora, "model.lora"))
            both = self.trainable is not None and not self.lora.merge
            require(not both, "trainable", "with model.lora needs model.lora.merge: adapters hold no other weights")


@dataclass
class ModelConfig(CheckpointConfig):
    """The checkpoint to train."""

    pretrained_model_name_or_path: str
    """A diffusers checkpoint: a folder, a hub name, or a built-in one such as `builtin:tiny-stable-diffusion` (needs no
    download; docs/families.md lists them)."""
    prediction_type: Literal["epsilon", "v_prediction", "sample", "flow_prediction"] | None = None
    """What the denoiser predicts; null: what the checkpoint's scheduler says."""
    max_sequence_length: int | None = None
    """Tokens that captions are cut and padded to, where the model leaves it open; null: its pipeline's default."""
    guidance: float | None = None
    """What a guidance-distilled model (Flux.1 dev) is told in training; null: 1, the images as they are."""
    train_text_encoder: bool = False
    """Train the text encoders, too (Stable Diffusion's and SDXL's): all their weights or, with `model.lora`, adapters
    of their attention. In `optimizer.groups` they are `text_encoders.*`."""
    offload_text_encoders: bool = False
    """Leave the text encoders' weights on the disk, from which each layer's come to the device when it computes: for
    encoders that are larger than memory. Slower, and with `data.cache_text` only."""
    vae_slicing: bool = False
    """Encode and decode one image, clip or sound at a time: less memory, slower."""
    vae_tiling: bool = False
    """Encode and decode what is larger than a tile, whose size is the VAE's own, in tiles that overlap: less memory,
    slower, and not quite the same latents."""

    def check(self, require: Require) -> None:
        super().check(require)
        length, guidance = self.max_sequence_length, self.guidance
        require(length is None or 1 <= length <= 4096, "max_sequence_length", "must be from 1 to 4096, or null")
        require(guidance is None or 0 <= guidance <= 100, "guidance", "must be from 0 to 100, or null")


@dataclass
class TextModelConfig(CheckpointConfig):
    """The checkpoint to train."""

    pretrained_model_name_or_path: str
    """A text model in transformers' format: a folder, a hub name, or a built-in one such as `builtin:tiny-modernbert`
    (needs no download; docs/text.md lists them)."""
    mask_token: str | None = None
    """The token that stands for one that is masked, where the tokenizer has none for it; null: the tokenizer's."""
