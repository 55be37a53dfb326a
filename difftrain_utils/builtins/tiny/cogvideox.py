"""`builtin:tiny-cogvideox`: CogVideoX, a transformer of half a million weights and a VAE for videos with random
weights."""

from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
)

from difftrain_utils.builtins.tiny.parts import WIDTH, t5_text_encoder, t5_tokenizer


def make(**transformer) -> CogVideoXPipeline:
    """As the 5B, whose places rotate tokens, with other fields of the transformer's config. Four frames are one of
    latents, after the first, and a side an eighth, as the real one's."""
    config = {
        "num_attention_heads": 3,
        "attention_head_dim": 32,
        "in_channels": 4,
        "out_channels": 4,
        "time_embed_dim": 96,
        "text_embed_dim": WIDTH,
        "num_layers": 3,
        "sample_width": 4,
        "sample_height": 4,
        "sample_frames": 9,
        "use_rotary_positional_embeddings": True,
    }
    vae = AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        scaling_factor=0.7,
    )
    scheduler = CogVideoXDDIMScheduler(
        prediction_type="v_prediction",
        clip_sample=False,
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        snr_shift_scale=1.0,
    )
    return CogVideoXPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5_text_encoder(),
        vae=vae.eval(),
        transformer=CogVideoXTransformer3DModel(**config | transformer),
        scheduler=scheduler,
    )
