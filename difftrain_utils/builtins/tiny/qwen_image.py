"""`builtin:tiny-qwen-image`: Qwen-Image, an MMDiT of a million weights and a VAE for videos with random weights."""

from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)

from difftrain_utils.builtins.tiny.parts import WIDTH, add_words, qwen2_5_vl_text_encoder, qwen_tokenizer


def make() -> QwenImagePipeline:
    """The template around a caption has 34 tokens before it, as the real one's."""
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=3,
        attention_head_dim=32,
        num_attention_heads=3,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(8, 12, 12),
    )
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[-0.3, 0.2, 0.1, -0.1],
        latents_std=[0.8, 1.2, 0.5, 2.0],
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02, use_dynamic_shifting=True
    )
    pipeline = QwenImagePipeline(
        scheduler=scheduler,
        vae=vae.eval(),
        text_encoder=qwen2_5_vl_text_encoder(),
        tokenizer=qwen_tokenizer(),
        transformer=transformer,
    )
    add_words(pipeline.tokenizer, pipeline.prompt_template_encode)
    return pipeline
