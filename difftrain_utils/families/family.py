"""What a model family is: the contract that scripts, data and evaluation rely on."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from PIL import Image
from transformers import PreTrainedTokenizerBase

from difftrain_utils.config.audio_data import AudioDataConfig
from difftrain_utils.config.config import Config
from difftrain_utils.config.model import LoraConfig
from difftrain_utils.config.training import TrainConfig
from difftrain_utils.media.audio import Sound
from difftrain_utils.media.video import Clip
from difftrain_utils.objective.schedule import Schedule

Conditioning = dict[str, torch.Tensor]  # batch first
Weights = Literal["pretrained", "random", "none"]


class Family(Protocol):
    """What every script asks of a model family.

    It holds the checkpoint's frozen parts. The denoiser, which is trained, is an argument: there may be several, or
    wrapped ones. What it is told, and in which order, is the family's affair, in `predict` and nowhere else."""

    class_name: str
    """What the checkpoint says that it is: the class of its pipeline or model."""
    denoiser_part: str
    """The name of the part that is trained: "unet", "transformer"."""
    weight_dtype: torch.dtype
    """Of the frozen parts."""
    has_weights: bool
    """False: all parts are on the meta device."""
    lora_targets: tuple[str, ...]
    """The ends of the names of the denoiser's layers that adapters are for."""
    takes_gradient_checkpointing: bool
    """Whether `train.gradient_checkpointing` leaves what the denoiser computes as it is."""
    lora: LoraConfig | None
    """Of the adapters that the denoiser has in training."""
    init_seed: int | None
    """The seed of the denoiser's random weights; None: the checkpoint's weights."""
    text_encoders: torch.nn.Module | None
    """Those that encode captions as one module (captions -> conditioning), if they are trained, too."""

    def load_denoiser(self) -> torch.nn.Module:
        """The denoiser in float32 on the CPU, from the checkpoint's weights or from random ones."""

    def check_denoiser(self, denoiser: torch.nn.Module) -> None:
        """Raise RunError unless a pipeline of this family can have this denoiser."""

    def digests(self, denoiser: torch.nn.Module) -> dict[str, str]:
        """SHA-256 of the weights of all parts (`weights_digest`), by their names."""

    def move_frozen_parts(self, accelerator: Accelerator, config: TrainConfig) -> None:
        """Bring the frozen parts onto the device, in its precision; with `train.shard_encoders` a share of the text
        encoders."""

    def free_cached(self) -> None:
        """Drop the frozen parts whose work is cached from memory, and others that training does without; they are
        loaded again when they are used again."""

    def frozen_modules(self) -> dict[str, torch.nn.Module]:
        """The frozen parts that have weights, by name, also those whose work is cached."""

    def of_shapes(self, dtype: torch.dtype, empty: Callable[[torch.nn.Module], torch.nn.Module]) -> "Family":
        """The same family on the CPU, with frozen parts of this dtype as `empty` makes them of those on the meta
        device: without weights, so that what they put out has a shape and nothing else."""

    @classmethod
    def loads_adapters(cls) -> bool:
        """Whether plain diffusers, or peft for text, loads what `save_lora` writes."""

    def save_lora(self, folder: Path, denoiser: torch.nn.Module) -> None:
        """Write the adapters of the denoiser, and of the text encoders if they are trained, as its pipeline's
        `load_lora_weights(folder)` loads them, or peft for text, with rank and alpha."""

    def save_pipeline(self, folder: Path, denoiser: torch.nn.Module) -> None:
        """Write a pipeline around `denoiser`, with the checkpoint's own frozen parts. Raises RunError if it would not
        be one (`check_denoiser`)."""


class ImageFamily(Family, Protocol):
    """What scripts for images ask besides, or for all that has latents.

    Latents have any rank, (batch, channels, …), in their natural form: packing them, ids, scale and direction of time
    and the sign of the output are the family's affair, in `predict` and nowhere else.

    Conditioning is a dict of tensors, batch first. What is padded is padded to a length that does not depend on the
    other captions; if the model is given what counts, `NAME_mask`, (batch, tokens), says it of `NAME`."""

    image_part: str | None
    """The name of the part that encodes images; None in pixel space."""
    text_parts: tuple[str, ...]
    """The names of the parts that encode captions: text encoders and tokenizers."""
    schedule: Schedule
    """The noise schedule to train with."""
    size_multiple: int
    """What an image's sides must be multiples of."""
    guidance_order: Literal["nothing first", "prompt first", "apart"] | None
    """How the pipeline asks for the two predictions of classifier-free guidance: in one call, in this order, or in two,
    that of the prompt first; None: it does not guide, or this is not known."""
    is_distilled: bool
    """Whether the pipeline's guidance scale is not that of classifier-free guidance."""
    noise_range: tuple[float, float]
    """From which noise level to which the pipeline asks the denoiser, as fractions of the schedule."""

    @classmethod
    def load(cls, source: str, model_index: dict[str, Any], config: Config, weights: Weights) -> "ImageFamily":
        """The family of the checkpoint in the folder or at the hub name `source`, without its denoiser. `weights` are
        the denoiser's; with "none" no part has any: all are on the meta device. Raises InputError if a part cannot be
        loaded."""

    def check_size(self, height: int, width: int, name: str) -> None:
        """Raise InputError, about the field `name`, unless the model can take images of this size."""

    def check_captions(self, captions: Iterable[str], field: str = "data.caption_column") -> None:
        """Raise InputError, about the field, for captions that the model cannot be told."""

    def describe_parts(self, *parts: str) -> dict[str, str]:
        """All that decides what frozen parts put out, by name: digests of their weights, configs and vocabularies."""

    def train_text_encoders(self, seed: int, gradient_checkpointing: bool) -> torch.nn.Module:
        """Make `text_encoders`, in float32 on the CPU, with adapters if there is `lora`."""

    def encode_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Mean and standard deviation of what images are in latents, (batch, 2, *latent); 0 where there is no
        posterior."""

    def sample_latents(self, moments: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Normalised latents drawn from the moments by `noise`, of its shape; float32."""

    def encode_prompts(self, captions: Sequence[str | None]) -> Conditioning:
        """The conditioning of captions; of None the pipeline's own for "nothing", which is not always that of "". That
        of one does not depend on the others, to the last bit."""

    def null_conditioning(self) -> Conditioning:
        """The conditioning of one sample without a caption."""

    def encode(
        self,
        batch: dict[str, Any],
        seed: int,
        text_encoders: torch.nn.Module | None = None,
        purpose: str = "vae_noise",
    ) -> tuple[torch.Tensor, Conditioning]:
        """The latents and the conditioning of a batch of samples, from the caches where the batch is from them, with
        the `text_encoders`, which may be wrapped, if they are trained; `purpose` is that of the keyed noise that
        latents are drawn with."""

    def predict(
        self,
        denoiser: torch.nn.Module,
        noisy_latents: torch.Tensor,
        timesteps: torch.Tensor,
        conditioning: Conditioning,
    ) -> torch.Tensor:
        """The denoiser's output, float32, of the latents' shape, as the schedule's prediction type: ε, v, x_0 or
        u = ε - x_0. The denoiser may be wrapped, and then has no `config`; what it was made of, the family knows."""

    def shift(self, *size: int) -> float:
        """How much the timesteps of latents of this size (height, width, say) are shifted towards noise."""

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
        """An image for each prompt, by the family's own pipeline."""

    def pipeline(self, denoiser: torch.nn.Module) -> DiffusionPipeline:
        """A pipeline of the parts in memory around `denoiser`."""


class VideoFamily(ImageFamily, Protocol):
    """What scripts for videos ask besides: pixel values are (batch, 3, frames, height, width), latents (batch,
    channels, frames, height, width), and images are what `encode_images` calls videos."""

    frame_multiple: int
    """A video must have one frame more than a multiple of this."""
    first_frames: Literal["none", "some", "all"]
    """Of which samples the model can be given the first frame: of none; of some, which `predict` is told by times of
    frames (batch, 1, frames, 1, 1), 0 of a frame that is clean; or of all, as part of the conditioning."""

    def check_frames(self, num_frames: int, name: str) -> None:
        """Raise InputError, about the field `name`, unless the model can take videos of so many frames."""

    def encode_first_frames(self, pixel_values: torch.Tensor) -> Conditioning:
        """What models that are always given the first frame are told of it besides the caption; of others nothing."""

    def generate(
        self,
        denoiser: torch.nn.Module,
        prompts: Sequence[str],
        num_frames: int,
        height: int,
        width: int,
        num_inference_steps: int,
        guidance_scale: float,
        guidance_rescale: float,
        generators: Sequence[torch.Generator],
        first_frames: Sequence[Image.Image] | None = None,
    ) -> list[Clip]:
        """A clip for each prompt, of `data.fps` frames a second, by the family's own pipeline; with `first_frames`, of
        that size, by its pipeline for images."""


class AudioFamily(ImageFamily, Protocol):
    """What scripts for sounds ask besides: waveforms are (batch, audio channels, samples), latents (batch, channels,
    length), and images are what `encode_images` calls waveforms. A batch also has "seconds_start" and "seconds_total"
    (`media.audio.read`), which `encode` makes conditioning of."""

    def check_waveforms(self, data: AudioDataConfig) -> None:
        """Raise InputError unless the model can take windows of this length, rate and channels."""

    def generate(
        self,
        denoiser: torch.nn.Module,
        prompts: Sequence[str],
        waveform_length: int,
        num_inference_steps: int,
        guidance_scale: float,
        guidance_rescale: float,
        generators: Sequence[torch.Generator],
    ) -> list[Sound]:
        """A sound for each prompt, by the family's own pipeline."""


class TextFamily(Family, Protocol):
    """What scripts for text ask besides.

    A text is a row of tokens; positions whose `attention_mask` is false are not seen by the others, so that what is
    there does not matter. Logits of a sample do not depend on the others of its batch."""

    tokenizer: PreTrainedTokenizerBase
    mask_token_id: int
    """The token that stands for one that is masked."""
    vocab_size: int
    """How many logits a position has: the tokenizer's tokens, and perhaps some that it does not use."""

    @classmethod
    def load(
        cls, source: str, config: Config, weights: Weights, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> "TextFamily":
        """The family of the checkpoint in the folder or at the hub name `source`, without its denoiser. `weights` are
        the denoiser's; with "none" it has none and is on the meta device. A `tokenizer` takes the place of the
        checkpoint's, for a denoiser of random weights.

        Raises:
            InputError: the config or the tokenizer cannot be loaded, no token stands for a masked one, or the model
                takes no texts of this length.
        """

    def predict(
        self, denoiser: torch.nn.Module, noisy_tokens: torch.Tensor, attention_mask: torch.Tensor
    ) -> torch.Tensor:
        """Logits (batch, length, vocabulary), float32, of what each position's token is before it was masked, of tokens
        (batch, length) int64 and of which of them the model may look at, bool. The denoiser may be wrapped."""

    def generate(
        self,
        denoiser: torch.nn.Module,
        prompts: Sequence[str],
        *,
        length: int,
        num_inference_steps: int,
        sampler: str,
        temperature: float,
        block_length: int | None,
        generators: Sequence[torch.Generator],
    ) -> list[str]:
        """A text for each prompt, of `length` tokens at most, its prompt's among them and in front of it."""
