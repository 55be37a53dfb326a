"""`builtin:tiny-ace-step`: ACE-Step, a transformer of half a million weights, on the autoencoder of
`builtin:tiny-stable-audio`."""

from diffusers import (
    AceStepAudioTokenDetokenizer,
    AceStepAudioTokenizer,
    AceStepConditionEncoder,
    AceStepPipeline,
    AceStepTransformer1DModel,
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.pipelines.ace_step.pipeline_ace_step import DEFAULT_DIT_INSTRUCTION, SFT_GEN_PROMPT

from difftrain_utils.builtins.tiny.parts import WIDTH, add_words, qwen3_text_encoder, qwen_tokenizer
from difftrain_utils.builtins.tiny.stable_audio import HOP, tones_autoencoder
from difftrain_utils.builtins.tones import TONES


def make() -> AceStepPipeline:
    """Silence is zeros in its latents, as the condition encoder's is before it is loaded."""
    tokenizer, own = qwen_tokenizer(), AceStepPipeline._build_metadata_string(audio_duration=1.0)
    add_words(tokenizer, SFT_GEN_PROMPT + DEFAULT_DIT_INSTRUCTION + own + "# Languages\nen\n\n# Lyric\n")
    add_words(tokenizer, " ".join(TONES))
    attention = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24}
    inner = {"hidden_size": 96, "intermediate_size": 192} | attention
    pooler = inner | {"audio_acoustic_hidden_dim": HOP, "num_attention_pooler_hidden_layers": 1}
    return AceStepPipeline(
        vae=tones_autoencoder(),
        text_encoder=qwen3_text_encoder(num_layers=2),
        tokenizer=tokenizer,
        transformer=AceStepTransformer1DModel(
            **inner, num_hidden_layers=3, in_channels=3 * HOP, audio_acoustic_hidden_dim=HOP
        ),
        condition_encoder=AceStepConditionEncoder(
            **inner,
            text_hidden_dim=WIDTH,
            timbre_hidden_dim=HOP,
            num_lyric_encoder_hidden_layers=1,
            num_timbre_encoder_hidden_layers=2,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, shift=1.0),
        audio_tokenizer=AceStepAudioTokenizer(**pooler, fsq_dim=96),
        audio_token_detokenizer=AceStepAudioTokenDetokenizer(**pooler),
    )
