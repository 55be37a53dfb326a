"""What is generated for prompts, as a section `evaluation` says."""

from collections.abc import Sequence

import torch
from diffusers.utils import pt_to_pil
from PIL import Image

from difftrain_utils.config.evaluation import EvaluationConfig
from difftrain_utils.config.text import TextEvaluationConfig
from difftrain_utils.config.text_to_video import TextToVideoConfig
from difftrain_utils.errors import InputError, RowError
from difftrain_utils.evaluation.guidance import guide
from difftrain_utils.keyed_random import torch_generator_for
from difftrain_utils.media.audio import Sound
from difftrain_utils.media.image import crop_of, read_image_file, resize_and_crop
from difftrain_utils.media.video import Clip


@torch.no_grad()
def generate(
    family,
    denoiser: torch.nn.Module,
    config: EvaluationConfig,
    size: tuple[int, ...],
    prompts: Sequence[str],
    keys: Sequence[int],
    weaker: torch.nn.Module | None = None,
    first_frames: Sequence[Image.Image] | None = None,
) -> list[Image.Image] | list[Clip] | list[Sound]:
    """An image of `size` (height, width), a clip of (frames, height, width), or a sound of (samples,), for each prompt;
    prompt i's noise depends on (evaluation.seed, keys[i]) alone. With a `weaker` denoiser it guides
    (`evaluation.autoguidance`). Clips may begin with `first_frames`, of that size."""
    denoiser, guidance_scale = guide(family, denoiser, weaker, config)
    given = {} if first_frames is None else {"first_frames": first_frames}
    return family.generate(
        denoiser,
        prompts,
        *size,
        num_inference_steps=config.num_inference_steps,
        guidance_scale=guidance_scale,
        guidance_rescale=config.guidance_rescale,
        generators=[torch_generator_for(config.seed, "evaluation", k) for k in keys],
        **given,
    )


def load_first_frames(family, config: TextToVideoConfig) -> list[Image.Image] | None:
    """The images of `evaluation.first_frames`, of the size of clips; None: there are none.

    Raises:
        InputError: one is no image or cannot be read, or the model makes no clips of images, or of nothing else.
    """
    names, size = config.evaluation.first_frames, (config.data.height, config.data.width)
    field, model, images = "evaluation.first_frames", f"a {family.class_name}", []
    if names and family.first_frames == "none":
        raise InputError(f"{field}: {model} is given no first frame, got {names[0]!r}")
    if config.evaluation.prompts and not names and family.first_frames == "all":
        raise InputError(f"{field}: {model} makes clips of images: give one for each of evaluation.prompts")
    for name in names:
        try:
            image = read_image_file(name)
        except RowError as error:
            raise InputError(f"{field}: {error}") from error
        images += pt_to_pil(resize_and_crop(image, crop_of(image, size), config.data)[None])
    return images or None


def generate_texts(
    family,
    denoiser: torch.nn.Module,
    config: TextEvaluationConfig,
    length: int,
    prompts: Sequence[str],
    generators: Sequence[torch.Generator],
) -> list[str]:
    """A text of at most `length` tokens for each prompt; text i draws from generators[i] alone."""
    return family.generate(
        denoiser,
        prompts,
        length=length,
        num_inference_steps=config.num_inference_steps,
        sampler=config.sampler,
        temperature=config.temperature,
        block_length=config.block_length,
        generators=generators,
    )


def check_prompts(prompts: Sequence[str], length: int, tokenizer, field: str, of_length: str) -> None:
    """Raise InputError, about `field`, for a prompt that the tokenizer does not know, or that leaves no room for a text
    in `length` tokens; `of_length` says whose length that is."""
    for prompt in prompts:
        tokens = tokenizer(prompt, add_special_tokens=False).input_ids
        if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in tokens:
            raise InputError(f"{field}: {prompt!r:.60} has characters or words that the tokenizer does not know")
        if len(tokens) >= length:
            raise InputError(
                f"{field}: {prompt!r:.60} has {len(tokens)} tokens, and with its text {length} {of_length}"
            )
