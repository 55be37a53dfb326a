"""`builtin:tiny-dit`: a DiT of a million weights on the VAE of the shapes, whose 18 captions are its classes."""

from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

from difftrain_utils.builtins.shapes import PROMPTS
from difftrain_utils.builtins.tiny.parts import shapes_vae


def make() -> DiTPipeline:
    """Its pipeline has 1000 classes and calls none of them number 1000; these are the first. Its tokens are
    single latents."""
    transformer = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=24,
        in_channels=4,
        out_channels=8,
        num_layers=4,
        sample_size=8,
        patch_size=1,
    )
    labels = {str(number): prompt for number, prompt in enumerate(PROMPTS)}
    pipeline = DiTPipeline(transformer, shapes_vae(), DDIMScheduler(clip_sample=False), id2label=labels)
    pipeline.register_to_config(id2label=labels)  # which it forgets to
    return pipeline
