"""`builtin:tiny-pixart-sigma`: PixArt-Σ, a transformer of a million weights on the VAE of the shapes."""

from diffusers import DDIMScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel

from difftrain_utils.builtins.tiny.parts import WIDTH, shapes_vae, t5_text_encoder, t5_tokenizer


def make() -> PixArtSigmaPipeline:
    """The transformer learns a variance, too, as the real one."""
    transformer = PixArtTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=4,
        out_channels=8,
        num_layers=4,
        cross_attention_dim=128,
        sample_size=8,
        use_additional_conditions=False,
        caption_channels=WIDTH,
    )
    return PixArtSigmaPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5_text_encoder(),
        vae=shapes_vae(),
        transformer=transformer,
        scheduler=DDIMScheduler(beta_start=0.0001, beta_end=0.02, clip_sample=False),
    )
