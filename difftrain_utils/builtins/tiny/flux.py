"""`builtin:tiny-flux`: Flux.1 dev, an MMDiT of 2 million weights that is told a guidance, on the VAE of the shapes."""

from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

from difftrain_utils.builtins.tiny.parts import (
    WIDTH,
    clip_text_encoder,
    clip_tokenizer,
    shapes_vae,
    t5_text_encoder,
    t5_tokenizer,
)


def make() -> FluxPipeline:
    """Its tokens are 2 × 2 latents of 4 channels; the shift depends on the size, as that of Flux.1 dev."""
    transformer = FluxTransformer2DModel(
        in_channels=4 * 4,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )
    return FluxPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=shapes_vae(shift_factor=0.1),
        text_encoder=clip_text_encoder(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5_text_encoder(),
        tokenizer_2=t5_tokenizer(),
    )
