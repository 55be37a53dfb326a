import json
import os
import subprocess
import sys

import pytest
from helpers import ROOT
from transformers import AutoTokenizer

from difftrain_utils.config.text_data import TextDataConfig
from difftrain_utils.data import tokenizer as module
from difftrain_utils.data.tokenizer import make_tokenizer
from difftrain_utils.media.text import tokenizer_digest

TEXT = "the cat sat on the mat — ünïcode 你好\n"
MAKE = """
import sys
from difftrain_utils.config.text_data import TextDataConfig
from difftrain_utils.data.tokenizer import make_tokenizer
from difftrain_utils.media.text import tokenizer_digest
for kind in (300, "characters"):
    config = TextDataConfig(sys.argv[1], tokenizer=kind, cache_dir=sys.argv[2], validation_split=0.2)
    print(tokenizer_digest(make_tokenizer(config)))
"""


@pytest.fixture
def config(tmp_path) -> TextDataConfig:
    rows = [{"text": TEXT + f"{i} and " * 20} for i in range(40)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return TextDataConfig(str(tmp_path / "a.jsonl"), cache_dir=str(tmp_path / "cache"))


@pytest.mark.parametrize("kind", ["bytes", "characters", 300])
def test_text_comes_back_from_its_tokens_also_when_it_was_saved(config, tmp_path, kind):
    config.tokenizer = kind
    made = make_tokenizer(config)
    made.save_pretrained(tmp_path / "saved")
    saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
    for tokenizer in (made, saved):
        tokens = tokenizer(TEXT).input_ids
        assert tokenizer.decode(tokens) == TEXT
        assert len(tokens) == {"bytes": len(TEXT.encode()), "characters": len(TEXT)}.get(kind, len(tokens))
        assert (tokenizer.pad_token_id, tokenizer.mask_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert saved("other: xyz[EOS]").input_ids == made("other: xyz[EOS]").input_ids
    assert len(made) == {"bytes": 259, 300: 300}.get(kind, len(made))
    if kind == 300:
        assert len(tokens) < len(TEXT.encode())  # it has learned something


def test_a_character_that_training_has_not_is_unknown(config):
    config.tokenizer = "characters"
    tokenizer = make_tokenizer(config)
    assert tokenizer("aXa").input_ids.count(tokenizer.unk_token_id) == 1


def test_it_is_learned_once_from_the_training_texts_alone(config, monkeypatch, tmp_path):
    read, texts_of = [], module.texts_of
    monkeypatch.setattr(module, "texts_of", lambda row: read.append(row) or texts_of(row))
    config.tokenizer, config.validation_split = 280, 0.3
    first = tokenizer_digest(make_tokenizer(config))
    assert 20 < len(read) < 36
    again, count = tokenizer_digest(make_tokenizer(config)), len(read)
    assert again == first and len(read) == count
    config.cache_dir = str(tmp_path / "other")  # made again where it is not found: the same
    assert tokenizer_digest(make_tokenizer(config)) == first and len(read) == 2 * count


@pytest.mark.slow
def test_it_is_the_same_in_each_process(config, tmp_path):
    """Whatever the order of hashes and the number of threads."""
    found = []
    for i, threads in enumerate(("1", "4")):
        environment = {"RAYON_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "true", "PYTHONHASHSEED": threads}
        command = [sys.executable, "-c", MAKE, config.dataset, str(tmp_path / f"cache-{i}")]
        found.append(subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True).stdout)
    assert found[0] == found[1] and len(found[0].split()) == 2
