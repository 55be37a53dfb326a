"""`builtin:tiny-sd3`: Stable Diffusion 3, an MMDiT of 2 million weights on the VAE of the shapes, whose single latents
are its tokens."""

from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

from difftrain_utils.builtins.tiny.parts import (
    WIDTH,
    clip_text_encoder,
    clip_tokenizer,
    shapes_vae,
    t5_text_encoder,
    t5_tokenizer,
)


def make() -> StableDiffusion3Pipeline:
    """The T5's states are as wide as those of the two CLIPs side by side."""
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=128,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=32,
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=shapes_vae(shift_factor=0.1),
        text_encoder=clip_text_encoder(with_projection=True),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip_text_encoder(with_projection=True),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5_text_encoder(2 * WIDTH),
        tokenizer_3=t5_tokenizer(),
    )
