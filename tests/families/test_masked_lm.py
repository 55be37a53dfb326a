import json
import shutil

import pytest
import torch
from text_families import LENGTH, LORA, ModelAlone, assert_asked_as_transformers_asks, assert_looks_both_ways, load
from tokenizers import Tokenizer, models
from transformers import AutoModelForMaskedLM, AutoTokenizer, BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

from difftrain_utils.builtins.tiny.parts import text_tokenizer
from difftrain_utils.config.model import TextModelConfig
from difftrain_utils.errors import InputError, RunError
from difftrain_utils.evaluation.generative_perplexity import load_scorer
from difftrain_utils.families.load import load_family, trained_models

MODERNBERT = "builtin:tiny-modernbert"


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    tokenizer = text_tokenizer()
    model = BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(params=["modernbert", "bert"])
def name(request, bert_folder) -> str:
    return MODERNBERT if request.param == "modernbert" else str(bert_folder)


def test_it_is_asked_as_transformers_asks(name):
    family, denoiser = load(name)
    assert family.mask_token_id == family.tokenizer.mask_token_id == 3
    assert_asked_as_transformers_asks(family, denoiser)
    assert_looks_both_ways(family, denoiser)


def test_what_it_saves_is_what_transformers_loads(name, tmp_path):
    family, denoiser = load(name)
    family.save_pipeline(tmp_path, denoiser)
    again, tokenizer = AutoModelForMaskedLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    tokens = tokenizer("([])", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, denoiser(tokens).logits)
    assert tokenizer.decode(tokens[0]) == "([])" and tokenizer.mask_token_id == family.mask_token_id
    there, saved = load(str(tmp_path))
    assert there.digests(saved) == family.digests(denoiser)
    with pytest.raises(RunError, match=r"^a checkpoint of \w+ForMaskedLM has one, not a Linear"):
        family.save_pipeline(tmp_path, torch.nn.Linear(2, 2))


def test_no_code_of_a_checkpoint_is_run_or_asked_about(bert_folder, tmp_path, monkeypatch):
    shutil.copytree(bert_folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'was_run')!r}, 'w')\n")
    content = json.loads((tmp_path / "config.json").read_text())
    content |= {"model_type": "of-its-own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(content))
    monkeypatch.setattr("builtins.input", lambda question: "y")
    with pytest.raises(InputError, match=f"^model.pretrained_model_name_or_path: {tmp_path}.*custom code"):
        load_family(ModelAlone(TextModelConfig(str(tmp_path))))
    with pytest.raises(InputError, match=r"^evaluation.perplexity_model: .*custom code"):
        load_scorer(str(tmp_path), torch.device("cpu"))
    assert not (tmp_path / "was_run").exists()


def test_random_weights_are_a_function_of_the_seed(bert_folder):
    def weights(seed: int, from_scratch: bool) -> torch.Tensor:
        config = ModelAlone(TextModelConfig(str(bert_folder), train_from_scratch=from_scratch))
        config.train.seed = seed
        return load_family(config).load_denoiser().bert.embeddings.word_embeddings.weight

    torch.manual_seed(5)
    assert torch.equal(weights(0, True), weights(0, True))
    assert not torch.equal(weights(0, True), weights(1, True))
    assert torch.equal(weights(0, False), weights(1, False))
    assert not torch.equal(weights(0, False), weights(0, True))


def test_adapters_are_loaded_by_peft_and_merged(name, tmp_path):
    from peft import PeftModel

    family, denoiser = load(name, **LORA)
    trained = {name: weight for name, weight in denoiser.named_parameters() if weight.requires_grad}
    assert trained and all(".lora_" in name for name in trained)
    for number, weight in enumerate(trained.values()):
        torch.nn.init.normal_(weight, std=0.3, generator=torch.Generator().manual_seed(number))
    for folder in ("lora", "again", "pipeline"):
        (tmp_path / folder).mkdir()
    family.save_lora(tmp_path / "lora", denoiser)
    family.save_lora(tmp_path / "again", denoiser)
    family.save_pipeline(tmp_path / "pipeline", denoiser)
    for path in (tmp_path / "lora").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
    tokens = torch.randint(6, 200, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    attention_mask = torch.ones_like(tokens, dtype=torch.bool)
    with torch.no_grad():
        logits = family.predict(denoiser, tokens, attention_mask)
        adapted = PeftModel.from_pretrained(family.load_denoiser(), tmp_path / "lora").eval()
        assert torch.equal(family.predict(adapted, tokens, attention_mask), logits)
        merged = AutoModelForMaskedLM.from_pretrained(tmp_path / "pipeline")
        torch.testing.assert_close(merged(tokens).logits, logits, rtol=1e-4, atol=1e-4)
        assert (family.predict(family.load_denoiser().eval(), tokens, attention_mask) - logits).abs().max() > 0.01


def test_it_may_have_a_tokenizer_of_the_runs_own(bert_folder, tmp_path):
    names = ["[PAD]", "[MASK]", "[EOS]", "a", "b"]
    content = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, "[EOS]"))
    special = {"pad_token": "[PAD]", "mask_token": "[MASK]", "eos_token": "[EOS]"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=content, **special)
    with pytest.raises(InputError, match=r"^data.tokenizer: needs model.train_from_scratch"):
        load(str(bert_folder), tokenizer)
    for name, model in ((MODERNBERT, {}), (str(bert_folder), {"train_from_scratch": True})):
        family, denoiser = load(name, tokenizer, **model)
        assert family.vocab_size == 5 and family.mask_token_id == 1
        family.save_pipeline(tmp_path, denoiser)
        again, config = load(str(tmp_path))[0], AutoModelForMaskedLM.from_pretrained(tmp_path).config
        assert again.tokenizer.get_vocab() == tokenizer.get_vocab()
        assert (config.vocab_size, config.pad_token_id, config.eos_token_id, config.bos_token_id) == (5, 0, 2, None)


def test_what_does_not_fit_is_refused_in_one_line(bert_folder):
    with pytest.raises(InputError, match=r"^model.mask_token: the tokenizer has no token '<gone>'$"):
        load(MODERNBERT, mask_token="<gone>")
    with pytest.raises(InputError, match=r"it is of CLIPTextModel; known is ModernBertForMaskedLM, "):
        load_family(ModelAlone(TextModelConfig("difftrain_utils/builtins/tiny_stable_diffusion/text_encoder")))
    with pytest.raises(InputError, match=r"the folder has no config.json, so it is no text model of transformers$"):
        load("builtin:tiny-stable-diffusion")
    config = ModelAlone(TextModelConfig(str(bert_folder)))
    config.data.sequence_length = 65
    with pytest.raises(InputError, match=r"^data.sequence_length: .* takes 64 tokens at most, got 65$"):
        load_family(config)
    config = ModelAlone(TextModelConfig(MODERNBERT))
    config.train.plain_attention = True
    with pytest.raises(InputError, match=r"^train.plain_attention: not for a ModernBertForMaskedLM"):
        trained_models(load_family(config), config)
