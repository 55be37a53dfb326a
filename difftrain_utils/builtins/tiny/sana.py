"""`builtin:tiny-sana`: Sana, a linear transformer of a million weights on a random deep-compression autoencoder."""

from diffusers import AutoencoderDC, FlowMatchEulerDiscreteScheduler, SanaPipeline, SanaTransformer2DModel

from difftrain_utils.builtins.tiny.parts import WIDTH, gemma2_text_encoder, gemma_tokenizer


def make() -> SanaPipeline:
    """The autoencoder makes latents of 8 channels at an eighth of the size."""
    levels = {"block_out_channels": (16, 32, 32, 64), "layers_per_block": (1, 1, 1, 1), "block_types": "ResBlock"}
    levels["qkv_multiscales"] = ((), (), (), ())
    sides = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in levels.items()}
    transformer = SanaTransformer2DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=32,
        num_layers=4,
        num_cross_attention_heads=4,
        cross_attention_head_dim=32,
        cross_attention_dim=128,
        caption_channels=WIDTH,
        sample_size=4,
        timestep_scale=0.5,
    )
    return SanaPipeline(
        tokenizer=gemma_tokenizer(),
        text_encoder=gemma2_text_encoder(),
        vae=AutoencoderDC(latent_channels=8, scaling_factor=0.41407, **sides).eval(),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
