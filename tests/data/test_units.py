import io
import json
import os
import random
import tarfile
import time
from pathlib import Path

import datasets
import pyarrow as pa
import pytest

from difftrain_utils.data import units
from difftrain_utils.data.remote import Reader, find_file
from difftrain_utils.data.units import FileRows, Units, find_units, walk_tar
from difftrain_utils.errors import InputError, RowError

LONG = "folder/" * 30 + "name"  # 214 characters


def write_tar(path: Path, members: list[tuple[str, bytes]], form: int = tarfile.PAX_FORMAT, **fields) -> Path:
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            vars_of = {"mtime": 1234.5} | fields if form == tarfile.PAX_FORMAT else fields  # a float needs a pax header
            for field, value in vars_of.items():
                setattr(member, field, value)
            tar.addfile(member, io.BytesIO(content))
    return path


def walk(path: Path) -> list[tuple[str | None, bytes]]:
    content = path.read_bytes()
    members = walk_tar(lambda start, length: content[start : start + length], len(content))
    return [(name, content[start:stop]) for name, _, start, stop in members]


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_members_are_those_of_tarfile_however_long_their_names_are(tmp_path, form):
    chance = random.Random(0)
    names = ["a.txt", f"{LONG}.txt", "b.seg.png", "ä.txt", "x" * 98 + ".t", "c"]
    members = [(name, chance.randbytes(chance.choice([0, 1, 511, 512, 513, 5000]))) for name in names]
    assert walk(write_tar(tmp_path / "a.tar", members, form)) == members


def test_what_is_no_file_or_hidden_is_passed_over(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, kind in (("d", tarfile.DIRTYPE), ("l", tarfile.SYMTYPE), (".hidden.txt", b"0"), ("a.txt", b"0")):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "a.txt" if kind == tarfile.SYMTYPE else ""
            tar.addfile(member)
    assert walk(tmp_path / "a.tar") == [(None, b"")] * 3 + [("a.txt", b"")]


@pytest.fixture
def of_tar(tmp_path, monkeypatch):
    """The rows of a tar file, in units of two kilobytes, and what they were made of."""
    monkeypatch.setattr(units, "TAR_UNIT", 2000)
    members = [
        (f"{LONG if i % 3 else ''}{i}.{kind}", f"{i}{kind}".encode() * 70) for i in range(20) for kind in ("png", "txt")
    ]
    file = find_file(str(write_tar(tmp_path / "0.tar", members)))
    reader = Reader(tmp_path, 0)
    found = Units.from_bytes(find_units("webdataset", [file, file], "data.dataset", reader).to_bytes())
    features = datasets.Features({"png": datasets.Image(decode=False), "txt": datasets.Value("string")})
    return FileRows("webdataset", [file, file], found, features, reader), members


def test_units_of_a_tar_are_runs_of_its_members(of_tar):
    rows, members = of_tar
    assert rows.units.of_file[0] == rows.units.of_file[1] > 3 and rows.units.rows.sum() == 40
    read = [row for unit in range(rows.units.of_file[0]) for row in rows.read(unit)]
    assert [(row["png"]["bytes"], row["txt"].encode()) for row in read] == [
        (image[1], text[1]) for image, text in zip(members[::2], members[1::2], strict=True)
    ]
    assert [len(rows.read(unit)) for unit in range(len(rows.units.rows))] == rows.units.rows.tolist()
    assert read[1]["png"]["path"] == members[2][0] and read[1]["__name__"].endswith(f"0.tar {members[2][0][:-4]}")


@pytest.mark.parametrize("end", [b"", b"\n", b"\n \n"])
def test_units_of_lines_are_runs_of_them(tmp_path, monkeypatch, end):
    monkeypatch.setattr(units, "TAR_UNIT", 100)
    texts = [f"{i} \u2028 ä" * (50 if i == 7 else i % 5) for i in range(60)]
    lines = [json.dumps({"text": text, "other": i}, ensure_ascii=i % 2 == 0).encode() for i, text in enumerate(texts)]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([*lines[:9], b" ", *lines[9:]]) + end)
    file = find_file(str(tmp_path / "a.jsonl"))
    found = find_units("json", [file], "data.dataset", Reader(tmp_path, 0))
    rows = FileRows("json", [file], found, datasets.Features({"text": datasets.Value("string")}), Reader(tmp_path, 0))
    read = [rows.read(unit) for unit in range(len(found.rows))]
    assert len(read) > 10 and [len(of_unit) for of_unit in read] == found.rows.tolist()
    assert [row for of_unit in read for row in of_unit] == [
        {"text": text, "__name__": f"{file.path} row {i}"} for i, text in enumerate(texts)
    ]


def test_a_text_that_is_none_is_an_error_of_its_row(tmp_path):
    file = find_file(
        str(write_tar(tmp_path / "0.tar", [("a.txt", b"\xff"), ("b.txt", b"fine"), ("b.json", b'{"c": 1}')]))
    )
    found = find_units("webdataset", [file], "data.dataset", Reader(tmp_path, 0))
    features = datasets.Features({"txt": datasets.Value("string"), "json": {"c": datasets.Value("int64")}})
    wrong, fine = FileRows("webdataset", [file], found, features, Reader(tmp_path, 0)).read(0)
    assert isinstance(wrong, RowError) and str(wrong).startswith(f"{file.path} a.txt: 'utf-8'")
    assert fine["txt"] == "fine" and fine["json"] == {"c": 1}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda content: content[:1500], r"cut off: the member at byte 0 ends at \d+ of 1500 bytes$"),
        (lambda content: content[:3700], r"no tar file, or damaged or cut off at byte 3584$"),
        (lambda content: b"x" * 600, r"no tar file, or damaged or cut off at byte 0$"),
        (lambda content: content[:3600] + b"y" + content[3601:], r"no tar file, or damaged or cut off at byte 3584$"),
    ],
)
def test_a_damaged_tar_is_refused(tmp_path, spoil, message):
    path = write_tar(tmp_path / "0.tar", [("a.png", b"1" * 3000), ("a.txt", b"2")], tarfile.GNU_FORMAT)
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(InputError, match=rf"^data.dataset: {path}: {message}"):
        find_units("webdataset", [find_file(str(path))], "data.dataset", Reader(tmp_path, 0))


@pytest.mark.slow
def test_a_hundred_thousand_members_are_found_in_seconds(tmp_path):
    path = write_tar(
        tmp_path / "0.tar", [(f"{i // 2:06d}.{('jpg', 'txt')[i % 2]}", b"1" * 600) for i in range(100_000)]
    )
    start = time.perf_counter()
    found = find_units("webdataset", [find_file(str(path))], "data.dataset", Reader(tmp_path, 0))
    assert time.perf_counter() - start < 10 and found.rows.sum() == 50_000  # measured: 0.9 s
    os.unlink(path)


@pytest.mark.parametrize("writer", [pa.ipc.new_stream, pa.ipc.new_file])
def test_both_kinds_of_arrow_files(tmp_path, writer):
    table = pa.table({"text": [str(i) for i in range(70)]})
    with writer(str(tmp_path / "a.arrow"), table.schema) as file:
        file.write_table(table, max_chunksize=30)
    found = find_file(str(tmp_path / "a.arrow"))
    index = find_units("arrow", [found], "data.dataset", Reader(tmp_path, 0))
    features = datasets.Features({"text": datasets.Value("string")})
    rows = FileRows("arrow", [found], index, features, Reader(tmp_path, 0))
    assert index.rows.tolist() == [30, 30, 10] and [row["text"] for row in rows.read(1)] == [
        str(i) for i in range(30, 60)
    ]
    assert rows.read(2)[0]["__name__"] == f"{found.path} row 60"
