"""`builtin:tiny-lumina2`: Lumina-Image 2, a transformer of a million weights and a VAE with random weights."""

from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel

from difftrain_utils.builtins.tiny.parts import WIDTH, add_words, gemma2_text_encoder, gemma_tokenizer


def make() -> Lumina2Pipeline:
    """Its VAE makes an eighth of the size, as the pipeline has it."""
    transformer = Lumina2Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        hidden_size=96,
        num_layers=3,
        num_refiner_layers=1,
        num_attention_heads=4,
        num_kv_heads=2,
        multiple_of=32,
        axes_dim_rope=(8, 8, 8),
        axes_lens=(300, 64, 64),
        cap_feat_dim=WIDTH,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=0.5,
        shift_factor=0.1,
    )
    pipeline = Lumina2Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=vae.eval(),
        text_encoder=gemma2_text_encoder(),
        tokenizer=gemma_tokenizer(),
    )
    add_words(pipeline.tokenizer, pipeline.system_prompt)
    return pipeline
