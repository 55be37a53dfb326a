"""`builtin:tiny-scenes`: a small Stable Diffusion for `builtin:scenes`. Its VAE keeps the colours of several figures
apart, its tokenizer knows each word, and its text encoder says more of where a word stands."""

from pathlib import Path

from diffusers import AutoencoderKL, StableDiffusionPipeline

from difftrain_utils.builtins.scenes import TASKS
from difftrain_utils.builtins.tiny.parts import clip_text_encoder
from difftrain_utils.builtins.tiny_stable_diffusion.make import make_scheduler, make_tokenizer, make_unet


def make() -> StableDiffusionPipeline:
    words = {word for captions in TASKS.values() for caption in captions for word in caption.split()}
    # the long ones first, or "three" would be spelled th-re-e, by a merge of "red"
    tokenizer = make_tokenizer(sorted(words, key=lambda word: (-len(word), word)))
    return StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(Path(__file__).parent.parent / "tiny_scenes").eval(),
        text_encoder=clip_text_encoder(tokenizer=tokenizer, place=1.0),
        tokenizer=tokenizer,
        unet=make_unet(),
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
