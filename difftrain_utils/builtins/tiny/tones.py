"""`builtin:tiny-tones`: a small Stable Audio for `builtin:tones`, with the autoencoder of `builtin:tiny-stable-audio`
and a transformer of 1.3 million weights."""

from diffusers import StableAudioPipeline

from difftrain_utils.builtins.tiny.stable_audio import tones_pipeline


def make() -> StableAudioPipeline:
    # wide heads, for their rotary positions tell places in time apart: how a tone rises, and when a beep is silent
    return tones_pipeline(8, num_layers=4, num_attention_heads=2, attention_head_dim=64, cross_attention_dim=64)
