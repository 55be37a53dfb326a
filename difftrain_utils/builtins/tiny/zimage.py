"""`builtin:tiny-zimage`: Z-Image, a transformer of a million weights on the VAE of the shapes."""

from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel

from difftrain_utils.builtins.tiny.parts import WIDTH, qwen3_text_encoder, qwen_tokenizer, shapes_vae


def make() -> ZImagePipeline:
    """Its captions are rounded up to 32 tokens, as the real one's."""
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=96,
        n_layers=3,
        n_refiner_layers=1,
        n_heads=3,
        n_kv_heads=3,
        cap_feat_dim=WIDTH,
        axes_dims=[8, 12, 12],
        axes_lens=[1024, 128, 128],
    )
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=shapes_vae(shift_factor=0.1),
        text_encoder=qwen3_text_encoder(),
        tokenizer=qwen_tokenizer(),
        transformer=transformer,
    )
