"""`builtin:tiny-pixel`: PRXPixel, a transformer of two million weights on pixels."""

from diffusers import FlowMatchEulerDiscreteScheduler, PRXPixelPipeline, PRXTransformer2DModel

from difftrain_utils.builtins.shapes import PROMPTS
from difftrain_utils.builtins.tiny.parts import WIDTH, add_words, qwen3_vl_text_encoder, qwen_tokenizer


def make() -> PRXPixelPipeline:
    """Its tokens are patches of 4 x 4 pixels, and each word of the shapes."""
    transformer = PRXTransformer2DModel(
        in_channels=3,
        patch_size=4,
        context_in_dim=WIDTH,
        hidden_size=128,
        num_heads=4,
        depth=5,
        axes_dim=[16, 16],
        theta=10,
        bottleneck_size=32,
        resolution_embeds=True,
    )
    tokenizer = qwen_tokenizer()
    add_words(tokenizer, " ".join(PROMPTS))
    return PRXPixelPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=qwen3_vl_text_encoder(),
        tokenizer=tokenizer,
        default_sample_size=20,
        prompt_max_tokens=8,
    )
