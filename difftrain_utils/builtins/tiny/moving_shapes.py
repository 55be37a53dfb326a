"""`builtin:tiny-moving-shapes`: a small Wan for `builtin:moving-shapes`. Its VAE knows the clips, its tokenizer each
word of the captions, and its transformer has a million weights."""

from pathlib import Path

from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

from difftrain_utils.builtins.moving_shapes import MOVING
from difftrain_utils.builtins.tiny.parts import WIDTH, add_words, t5_tokenizer, umt5_text_encoder


def make() -> WanPipeline:
    vae = AutoencoderKLWan.from_pretrained(Path(__file__).parent.parent / "tiny_moving_shapes")
    add_words(tokenizer := t5_tokenizer(), " ".join(MOVING))
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=vae.config.z_dim,
        out_channels=vae.config.z_dim,
        text_dim=WIDTH,
        freq_dim=64,
        ffn_dim=384,
        num_layers=4,
        rope_max_seq_len=64,
    )
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=umt5_text_encoder(tokenizer=tokenizer),
        vae=vae.eval(),
        transformer=transformer,
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0),
    )
