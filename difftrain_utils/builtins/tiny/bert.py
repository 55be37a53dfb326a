"""`builtin:tiny-bert`: a BERT of 0.9 million weights that reads bytes."""

from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

from difftrain_utils.builtins.tiny.parts import text_tokenizer


def make() -> tuple[BertForMaskedLM, PreTrainedTokenizerFast]:
    """Without dropout, which a model of many masks does not need."""
    tokenizer = text_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=512,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return BertForMaskedLM(config).eval(), tokenizer
