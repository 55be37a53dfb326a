"""`builtin:tiny-llada`: a Llama of half a million weights with attention in both directions, which reads bytes."""

from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from difftrain_utils.builtins.tiny.parts import text_tokenizer


def make() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    tokenizer = text_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        is_causal=False,
        use_cache=False,
    )
    return LlamaForCausalLM(config).eval(), tokenizer
