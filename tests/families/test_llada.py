import pytest
import torch
from text_families import assert_asked_as_transformers_asks, assert_looks_both_ways, load
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from difftrain_utils.errors import InputError

NAME = "builtin:tiny-llada"


def test_it_is_asked_as_transformers_asks():
    assert_asked_as_transformers_asks(*load(NAME))


def test_a_causal_checkpoint_looks_both_ways(tmp_path):
    """One that says nothing of it, as those of autoregressive models do."""
    family, denoiser = load(NAME)
    assert_looks_both_ways(family, denoiser)
    family.save_pipeline(tmp_path, denoiser)
    causal = LlamaForCausalLM.from_pretrained(tmp_path, is_causal=True)
    causal.save_pretrained(tmp_path)
    tokens = torch.arange(6, 30)[None]
    with torch.no_grad():
        torch.testing.assert_close(causal(tokens).logits[0, 0], causal(tokens[:, :5]).logits[0, 0])
    assert_looks_both_ways(*load(str(tmp_path)))


def test_diffusers_pipeline_samples_what_it_saves(tmp_path):
    """Which asks the model as `predict` does, to the bit."""
    from diffusers import BlockRefinementScheduler, LLaDA2Pipeline

    family, denoiser = load(NAME)
    family.save_pipeline(tmp_path, denoiser)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    pipeline, calls = LLaDA2Pipeline(model, BlockRefinementScheduler(), tokenizer), []
    pipeline.set_progress_bar_config(disable=True)
    model.register_forward_hook(lambda _, args, out: calls.append((args[0].clone(), out.logits)))
    generator = torch.Generator().manual_seed(0)
    pipeline("([", gen_length=6, block_length=8, num_inference_steps=3, generator=generator, eos_early_stop=False)
    assert len(calls) >= 3 and (calls[0][0] == family.mask_token_id).sum() == 6
    for tokens, logits in calls:
        assert torch.equal(family.predict(denoiser, tokens, torch.ones_like(tokens, dtype=torch.bool)), logits)


def test_a_tokenizer_without_a_mask_token_is_told_one(tmp_path):
    family, denoiser = load(NAME)
    family.save_pipeline(tmp_path, denoiser)
    plain = PreTrainedTokenizerFast(tokenizer_object=family.tokenizer.backend_tokenizer, pad_token="<pad>")
    plain.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"^model.mask_token: must be one of the tokenizer's tokens"):
        load(str(tmp_path))
    family, _ = load(str(tmp_path), mask_token="<|im_start|>")
    assert family.tokenizer.mask_token_id == family.mask_token_id == plain.convert_tokens_to_ids("<|im_start|>")
