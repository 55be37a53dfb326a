import json
from pathlib import Path

import datasets
import pytest

from difftrain_utils.builtins.brackets import words
from difftrain_utils.config.text_data import TextDataConfig, TextSourceConfig
from difftrain_utils.data.rows import map_rows, split_rows
from difftrain_utils.errors import InputError

TEXTS = ["one\ntwo\n", "three", "vier — ünï"]


def write(folder: Path, kind: str) -> Path:
    """A folder, or for `file.jsonl` a file, with the texts."""
    folder.mkdir(exist_ok=True)
    data = datasets.Dataset.from_dict({"text": TEXTS, "other": [1, 2, 3]})
    if kind == "txt":
        for i, text in enumerate(TEXTS):
            (folder / f"{i}.txt").write_text(text)
    elif kind == "parquet":
        data.to_parquet(folder / "a.parquet")
    elif kind == "csv":
        data.to_csv(folder / "a.csv", index=False)
    else:
        (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    return folder / "a.jsonl" if kind == "file.jsonl" else folder


@pytest.mark.parametrize("kind", ["txt", "parquet", "csv", "jsonl", "file.jsonl"])
def test_texts_in_files_of_all_kinds(tmp_path, kind):
    rows = map_rows(TextDataConfig(str(write(tmp_path / "data", kind))))
    assert [row.text for row in rows] == TEXTS and {row.prompt for row in rows} == {None}
    assert rows[1].name == f"{rows.parts[0].source.dataset} row 1"


def test_a_folder_for_each_split_and_saved_data(tmp_path):
    for split in ("train", "test"):
        (tmp_path / "a" / split).mkdir(parents=True)
        (tmp_path / "a" / split / "x.txt").write_text(split)
    assert [row.text for row in map_rows(TextDataConfig(f"{tmp_path}/a", split="test"))] == ["test"]
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "b")
    assert [row.text for row in map_rows(TextDataConfig(f"{tmp_path}/b"))] == TEXTS


def test_columns_of_prompts_and_of_structs(tmp_path):
    rows = [{"chat": {"question": f"q{i}", "answer": f"a{i}"}, "text": f"t{i}"} for i in range(2)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    one = TextSourceConfig(str(tmp_path), text_column="chat.answer", prompt_column="chat.question")
    found = map_rows(TextDataConfig(sources=[one, TextSourceConfig(str(tmp_path))]))
    assert [row[1:] for row in found] == [("a0", "q0"), ("a1", "q1"), ("t0", None), ("t1", None)]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"data.dataset: .* has no files that end in \.txt, \.jsonl"),
        ({"a.txt": b"x", "b.csv": b"text\nx"}, r"has files of several kinds, such as .*(a.txt|b.csv) and "),
        ({"a.jsonl": b'{"text": "x"}\n{"text":'}, r"a.jsonl line 2: not JSON: "),
        ({"a.jsonl": b'{"text": "x"}\n[1]'}, r"a.jsonl line 2: must be an object, {…}, got \[1\]"),
        ({"a.txt": b"x", "b.txt": b"\xff"}, r"b.txt: not UTF-8"),
        ({"a.csv": b""}, r"a.csv: is empty"),
        ({"a.jsonl": b'{"txt": "x"}'}, r"data.text_column: no column 'text' in .*; it has txt"),
    ],
)
def test_bad_files_are_refused_by_name(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        map_rows(TextDataConfig(str(tmp_path)))


def test_the_builtin_one():
    rows = map_rows(TextDataConfig("builtin:brackets"))
    assert [rows[i].text for i in range(3)] == words(3, seed=0) and len(rows) == 20000
    with pytest.raises(InputError, match=r"data.dataset: no such builtin: 'builtin:shapes'; there is builtin:brackets"):
        map_rows(TextDataConfig("builtin:shapes"))


def test_a_text_stays_on_its_side_when_others_come(tmp_path):
    def split(numbers: range, share: float) -> tuple[list, list]:
        (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"text {i}"}) + "\n" for i in numbers))
        config = TextDataConfig(str(tmp_path), validation_split=share)
        return tuple([row.text for row in rows] for rows in split_rows(map_rows(config), config))

    training, validation = split(range(400), 0.2)
    assert len(training) + len(validation) == 400 and not set(training) & set(validation) and 50 < len(validation) < 110
    assert split(range(100, 600), 0.2)[1][:20] == [text for text in validation if int(text[5:]) >= 100][:20]
