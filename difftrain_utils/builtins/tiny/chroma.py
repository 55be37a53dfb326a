"""`builtin:tiny-chroma`: Chroma, an MMDiT of 2 million weights, on the VAE of the shapes."""

from diffusers import ChromaPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler

from difftrain_utils.builtins.tiny.parts import WIDTH, shapes_vae, t5_text_encoder, t5_tokenizer


def make() -> ChromaPipeline:
    """Its tokens are 2 × 2 latents of 4 channels."""
    transformer = ChromaTransformer2DModel(
        in_channels=4 * 4,
        num_layers=3,
        num_single_layers=3,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(8, 12, 12),
        approximator_num_channels=64,
        approximator_hidden_dim=128,
        approximator_layers=2,
    )
    return ChromaPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=shapes_vae(shift_factor=0.1),
        text_encoder=t5_text_encoder(),
        tokenizer=t5_tokenizer(),
    )
