"""`builtin:tiny-modernbert`: a ModernBERT of half a million weights that reads bytes."""

from transformers import ModernBertConfig, ModernBertForMaskedLM, PreTrainedTokenizerFast

from difftrain_utils.builtins.tiny.parts import text_tokenizer


def make() -> tuple[ModernBertForMaskedLM, PreTrainedTokenizerFast]:
    """Its first layer of three looks at all, the others at 64 tokens on either side."""
    tokenizer = text_tokenizer()
    config = ModernBertConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        cls_token_id=None,
        sep_token_id=None,
    )
    return ModernBertForMaskedLM(config).eval(), tokenizer
