"""`builtin:tiny-wan`: Wan 2.1, a transformer of half a million weights and a VAE for videos with random weights."""

from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

from difftrain_utils.builtins.tiny.parts import WIDTH, t5_tokenizer, umt5_text_encoder


def make() -> WanPipeline:
    """Four frames are one of latents, after the first, and a side an eighth, as the real one's."""
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=4,
        attention_head_dim=24,
        in_channels=4,
        out_channels=4,
        text_dim=WIDTH,
        freq_dim=64,
        ffn_dim=192,
        num_layers=3,
        rope_max_seq_len=64,
    )
    vae = AutoencoderKLWan(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[-0.3, 0.2, 0.1, -0.1],
        latents_std=[0.8, 1.2, 0.5, 2.0],
    )
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return WanPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=umt5_text_encoder(),
        vae=vae.eval(),
        transformer=transformer,
        scheduler=scheduler,
    )
