import inspect
import json
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
from accelerate import Accelerator
from tokenizers import Tokenizer

from difftrain_utils.config.text_data import TextDataConfig, TextSourceConfig
from difftrain_utils.config.training import TrainConfig
from difftrain_utils.data import tokens as module
from difftrain_utils.data.load import Data, load_data
from difftrain_utils.data.rows import Rows, map_rows
from difftrain_utils.data.samples import Samples, collate, read_held_out
from difftrain_utils.data.tokenizer import make_tokenizer
from difftrain_utils.data.tokens import Blocks, TokenRows
from difftrain_utils.errors import InputError, RowError

END = 2


def write(folder: Path, texts: list) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(folder)


def load(tmp_path: Path, dataset: str | None = None, batch_size: int = 4, **fields) -> tuple[Data, Samples]:
    fields = {"tokenizer": "bytes", "sequence_length": 8, "cache_dir": str(tmp_path / "cache")} | fields
    data = TextDataConfig(dataset, **fields)
    config = SimpleNamespace(data=data, train=TrainConfig(batch_size=batch_size))
    loaded = load_data(Accelerator(cpu=True), SimpleNamespace(tokenizer=make_tokenizer(data)), config)
    return loaded, Samples(loaded, data, 0, 1000)


def text_of(data: Data, sample: dict) -> str:
    return data.rows.tokenizer.decode(sample["tokens"])


@pytest.mark.parametrize("rows_class", [TokenRows, Blocks])
def test_they_are_rows(rows_class):
    for name, method in vars(Rows).items():
        if callable(method) and name[0] != "_":
            asked, has = (inspect.signature(each).parameters for each in (method, getattr(rows_class, name)))
            assert [(p.name, p.default) for p in asked.values()] == [(p.name, p.default) for p in has.values()]


@pytest.mark.parametrize("packing", ["pad", "pack"])
def test_a_sample_is_a_function_of_seed_and_key(tmp_path, packing):
    dataset = write(tmp_path / "data", [f"{i} " * (i % 7 + 1) for i in range(40)])
    _, samples = load(tmp_path, dataset, packing=packing)
    _, others = load(tmp_path, dataset, packing=packing)
    backwards = {k: others[k] for k in reversed(range(90))}
    for k in range(90):
        assert samples[k].keys() == {"tokens", "maskable", "attention_mask", "num_tokens", "key", "weight", "skipped"}
        for name in ("tokens", "maskable", "attention_mask"):
            assert torch.equal(samples[k][name], backwards[k][name]) and samples[k][name].shape == (8,)
    batch = collate([samples[k] for k in range(4)])
    assert batch["tokens"].shape == (4, 8) and batch["keys"] == [0, 1, 2, 3] and batch["weights"].tolist() == [1] * 4
    assert batch["maskable"].dtype == batch["attention_mask"].dtype == torch.bool


def test_an_epoch_of_blocks_has_each_token_once(tmp_path):
    """But for those at the end that fill no block."""
    texts = [f"text {i}" * (i % 3) for i in range(30)]
    data, samples = load(tmp_path, write(tmp_path / "data", texts), packing="pack")
    whole = "".join(f"{text}[EOS]" for text in texts)
    blocks = [data.rows.tokenizer.decode(data.rows[i].tokens) for i in range(len(data.rows))]
    assert whole.startswith("".join(blocks)) and data.samples_per_epoch == len(blocks)
    num_tokens = len(data.rows.tokenizer(whole).input_ids)
    assert len(blocks) == num_tokens // 8 and num_tokens % 8
    assert sorted(text_of(data, samples[k]) for k in range(len(blocks))) == sorted(blocks)
    assert all(samples[k]["maskable"].all() and samples[k]["attention_mask"].all() for k in range(len(blocks)))
    with pytest.raises(IndexError):
        data.rows[len(blocks)]


def test_blocks_are_of_one_source_with_its_weights(tmp_path):
    places = [write(tmp_path / name, [name * 7] * 30) for name in "ab"]
    sources = [TextSourceConfig(place, weight=w, loss_weight=w) for place, w in zip(places, (3.0, 1.0), strict=True)]
    data, samples = load(tmp_path, sources=sources, packing="pack")
    found = [(text_of(data, samples[k]), samples[k]["weight"]) for k in range(60)]
    assert {(text.replace("[EOS]", ""), weight) for text, weight in found} == {("a" * 7, 3.0), ("b" * 7, 1.0)}
    assert sum(weight == 3 for _, weight in found) == 45


def test_a_second_start_reads_no_text(tmp_path, monkeypatch):
    read, tokenize = [], module.tokenize
    monkeypatch.setattr(module, "tokenize", lambda row, tokenizer: read.append(row.name) or tokenize(row, tokenizer))
    dataset = write(tmp_path / "data", ["some text"] * 20)
    first, _ = load(tmp_path, dataset, packing="pack")
    again, _ = load(tmp_path, dataset, packing="pack")
    assert len(read) == 20 and [list(row.tokens) for row in again.rows] == [list(row.tokens) for row in first.rows]
    load(tmp_path, write(tmp_path / "data", ["some text", *["other text"] * 19]), packing="pack")
    assert len(read) == 40
    load(tmp_path, dataset, packing="pack", tokenizer="characters")
    assert len(read) == 60


def test_a_fingerprint_is_of_texts_and_tokenizer(tmp_path):
    texts = ["one", "two", "three"]

    def fingerprint(texts: list, **fields) -> dict:
        data, samples = load(tmp_path, write(tmp_path / "data", texts), **fields)
        return data.rows.inspect(samples.config)

    first = fingerprint(texts)
    assert first["num_texts"] == 3 and first == fingerprint(texts)
    assert fingerprint(["one", "two", "thred"])["sha256"] != first["sha256"] != fingerprint(texts[::-1])["sha256"]
    other = fingerprint(texts, tokenizer="characters")
    assert other["sha256"] == first["sha256"] and other["tokenizer"] != first["tokenizer"]


class TestBadRows:
    texts = ("aaaa", None, "bbbb", "a [MASK]", "cccc")

    @pytest.mark.parametrize("packing", ["pad", "pack"])
    def test_stop_names_the_row(self, tmp_path, packing):
        dataset = write(tmp_path / "data", list(self.texts))
        with pytest.raises(
            RowError, match=rf"^{dataset} row [13]: (the text must be a string, got None|holds \[MASK\])"
        ):
            _, samples = load(tmp_path, dataset, packing=packing)
            for k in range(5):
                samples[k]

    def test_skip_takes_another_text_or_leaves_it_out(self, tmp_path, capsys):
        dataset = write(tmp_path / "data", list(self.texts))
        data, samples = load(tmp_path, dataset, on_bad_row="skip")
        found = [(text_of(data, samples[k])[:4], samples[k]["skipped"]) for k in range(50)]
        assert {text for text, _ in found} == {"aaaa", "bbbb", "cccc"} and sum(skipped for _, skipped in found) == 20
        data, _ = load(tmp_path, dataset, on_bad_row="skip", packing="pack")
        assert len(data.rows) == 1 and list(data.rows[0].tokens).count(END) == 1
        assert "2 of the 5 texts" in capsys.readouterr().err


def test_too_little_for_a_block_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"data.sequence_length: .* has 4 tokens, fewer than the 8 of a sample"):
        load(tmp_path, write(tmp_path / "data", ["abc"]), packing="pack")


def test_evaluations_see_the_middle_of_held_out_texts(tmp_path):
    dataset = write(tmp_path / "data", [f"{i:03d}456789012" for i in range(40)])
    data, samples = load(tmp_path, dataset, validation_split=0.3)
    number = len(data.validation_rows)
    batch = read_held_out(data.validation_rows, [0, 1, number], samples.config, seed=0)
    assert batch["keys"] == [0, 1, number] and torch.equal(batch["tokens"][0], batch["tokens"][2])
    text = data.validation_rows.rows[0].text
    assert data.rows.tokenizer.decode(batch["tokens"][0]) == text[3:11]  # of 13 with the end


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "txt"])
def test_a_stream_of_texts_is_padded(tmp_path, kind):
    (tmp_path / "data").mkdir()
    texts = [f"t{i}" for i in range(12)]
    rows = datasets.Dataset.from_dict({"text": texts, "image": [0] * 12})
    if kind == "parquet":
        rows.to_parquet(tmp_path / "data/a.parquet")
    elif kind == "jsonl":
        rows.to_json(tmp_path / "data/a.jsonl")
    for i, text in enumerate(texts if kind == "txt" else ()):
        (tmp_path / f"data/a{i}.txt").write_text(text)
    data, samples = load(tmp_path, f"{tmp_path}/data", streaming=True, shuffle_buffer=3)
    found = [text_of(data, samples[k]).partition("[EOS]")[0] for k in range(12)]
    assert sorted(found) == sorted(texts) != found and data.rows.inspect(samples.config)["streaming"]
    assert samples.names_of([0])[0].startswith(f"{tmp_path}/data/a")


def test_a_bad_line_of_a_stream_is_named(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/a.jsonl").write_text('{"text": "a"}\n\n{"text": "b"}\n["c"]\n{"text": "d"\n')
    fields = {"streaming": True, "batch_size": 1, "tokenizer": "bytes"}
    data, samples = load(tmp_path, f"{tmp_path}/data", **fields)
    with pytest.raises(RowError, match=rf"^{tmp_path}/data/a.jsonl row [23]: (must be an object|not JSON)"):
        [samples[k] for k in range(4)]
    data, samples = load(tmp_path, f"{tmp_path}/data", on_bad_row="skip", **fields)
    found = [samples[k] for k in range(4)]
    assert {text_of(data, sample).partition("[EOS]")[0] for sample in found} == {"a", "b"}
    assert sum(sample["skipped"] for sample in found) == 2
    (tmp_path / "data/a.jsonl").write_text('[{"text": "a"}]')
    with pytest.raises(InputError, match=r"its first line is no object, {…}: a stream reads JSONL$"):
        load(tmp_path, f"{tmp_path}/data", **fields)


@pytest.mark.parametrize("text", ["ab[MASK]", "b" * 8])
def test_what_no_sample_can_have_is_found_before_the_first(tmp_path, text):
    """The mask token, and a prompt as long as a sample."""
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"p": each, "text": "c"}) + "\n" for each in ["a", "a", text]))
    fields = {"prompt_column": "p"}
    data, samples = load(tmp_path, str(tmp_path / "a.jsonl"), **fields)
    for _ in range(2):  # what was wrong is not remembered as fine
        with pytest.raises(RowError, match=r"a.jsonl row 2: (holds \[MASK\]|a prompt of 8 tokens)"):
            data.rows.inspect(samples.config)
    data, samples = load(tmp_path, str(tmp_path / "a.jsonl"), on_bad_row="skip", **fields)
    assert data.rows.inspect(samples.config)["num_texts"] == 3
    if text[0] == "b":  # in samples that are longer it is fine
        data, samples = load(tmp_path, str(tmp_path / "a.jsonl"), sequence_length=9, **fields)
        assert data.rows.inspect(samples.config)["num_texts"] == 3


def test_a_tokenizer_may_have_gaps(tmp_path):
    dataset = write(tmp_path / "data", ["abcdefgh" * 4])
    tokenizer = make_tokenizer(TextDataConfig("d", tokenizer="bytes"))
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["model"]["vocab"] |= {name: 2**17 + i for i, name in enumerate("abcdefgh")}
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(content))
    rows = map_rows(TextDataConfig(dataset, cache_dir=str(tmp_path / "cache")))
    packed = module.pack_tokens(rows.parts[0], tokenizer, TextDataConfig(dataset, cache_dir=str(tmp_path / "cache")))
    assert packed[:8].tolist() == [2**17 + i for i in range(8)]
