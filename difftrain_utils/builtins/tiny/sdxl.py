"""`builtin:tiny-sdxl`: Stable Diffusion XL, a few thousand times smaller, on the VAE of the shapes."""

from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

from difftrain_utils.builtins.tiny.parts import WIDTH, clip_text_encoder, clip_tokenizer, shapes_vae, small_unet_config


def make() -> StableDiffusionXLPipeline:
    """Its UNet is told a pooled text and six sizes, of 16 numbers each."""
    unet = UNet2DConditionModel(
        **small_unet_config(),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        cross_attention_dim=2 * WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=16,
        projection_class_embeddings_input_dim=WIDTH + 6 * 16,
    )
    return StableDiffusionXLPipeline(
        vae=shapes_vae(),
        text_encoder=clip_text_encoder(),
        text_encoder_2=clip_text_encoder(with_projection=True),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=unet,
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            timestep_spacing="leading",
        ),
        add_watermarker=False,
    )
