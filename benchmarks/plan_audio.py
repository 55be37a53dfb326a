"""The plan of Stable Audio Open on windows of 47.6 seconds in stereo, without its checkpoint.

    python benchmarks/plan_audio.py
    python benchmarks/plan_audio.py path/to/folder

As plan_video.py, on configs/stable_audio_lora.yaml: configs alone, by the numbers of the public model, and a table in
10⁹ bytes. In a folder that is named the configs stay, as `stable-audio-open`, for `difftrain plan` itself.
"""

from pathlib import Path

from plan_video import print_plans

CONFIG = Path(__file__).parent.parent / "configs/stable_audio_lora.yaml"
TRANSFORMER = {
    **{"sample_size": 1024, "in_channels": 64, "out_channels": 64, "num_layers": 24, "attention_head_dim": 64},
    **{"num_attention_heads": 24, "num_key_value_attention_heads": 12, "cross_attention_dim": 768},
    **{"time_proj_dim": 256, "global_states_input_dim": 1536, "cross_attention_input_dim": 768},
}
OOBLECK = {
    **{"encoder_hidden_size": 128, "downsampling_ratios": [2, 4, 4, 8, 8], "channel_multiples": [1, 2, 4, 8, 16]},
    **{"decoder_channels": 128, "decoder_input_channels": 64, "audio_channels": 2, "sampling_rate": 44100},
}
T5_BASE = {"d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 12, "num_heads": 12, "vocab_size": 32128}
PROJECTION = {"text_encoder_dim": 768, "conditioning_dim": 768, "min_value": 0, "max_value": 512}
PARTS = {"transformer": TRANSFORMER, "vae": OOBLECK, "text_encoder": T5_BASE, "projection_model": PROJECTION}
MODELS = {"stable-audio-open": PARTS}
FULL = ["--model.lora", "null", "--ema.enabled", "true"]
ONE = ["--train.batch_size", "1", "--train.gradient_accumulation_steps", "1"]
EIGHT = ["--train.batch_size", "8", "--train.gradient_accumulation_steps", "1"]
CACHED = ["--data.cache_latents", "true", "--data.window", "all"]
PLANS = [  # model, what is trained, GPUs, their name, options of the config
    (name, what, number, gpu, options)
    for name in MODELS
    for what, number, gpu, options in (
        ("LoRA, 8 parts of 1", 1, "rtx4090", []),
        ("the same, VAE in tiles", 1, "rtx4090", ["--model.vae_tiling", "true"]),
        ("LoRA, 8 at a time", 1, "h100", EIGHT),
        ("LoRA, 8 at a time, VAE one by one", 1, "l40s", [*EIGHT, "--model.vae_slicing", "true"]),
        ("LoRA, 8 at a time, cached", 1, "rtx4090", [*EIGHT, *CACHED]),
        ("all weights, EMA, 1", 1, "l40s", [*ONE, *FULL]),
        ("all weights, EMA, 8, cached", 1, "l40s", [*EIGHT, *FULL, *CACHED]),
        ("all weights, EMA, FSDP2", 8, "rtx4090", [*EIGHT, *FULL, *CACHED, "--train.shard", "full"]),
    )
]

if __name__ == "__main__":
    print_plans(CONFIG, "tiny-stable-audio", MODELS, PLANS)
