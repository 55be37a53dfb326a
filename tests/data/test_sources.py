import dataclasses
import json
import os
import shutil

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from helpers import encode, make_data, metrics_without_times, options, read_row, train, write_tar
from PIL import Image, PngImagePlugin

from difftrain_utils.config.data import DataConfig, SourceConfig
from difftrain_utils.data.rows import map_rows, split_rows
from difftrain_utils.data.sizes import image_sizes
from difftrain_utils.data.streaming import open_stream
from difftrain_utils.errors import InputError, RowError
from difftrain_utils.media import image as image_module
from difftrain_utils.media.captions import captions_of
from difftrain_utils.media.image import open_image


def grey(level: int, size=(20, 16)) -> Image.Image:
    return Image.new("RGB", size, (level,) * 3)


@pytest.fixture
def two(tmp_path) -> DataConfig:
    """Four parquet rows with a caption each, and three rows of a tar whose captions are in a list."""
    (tmp_path / "parquet").mkdir()
    make_data([grey(i) for i in range(4)], [f"p{i}" for i in range(4)]).to_parquet(tmp_path / "parquet/train.parquet")
    (tmp_path / "tars").mkdir()
    captions = [json.dumps({"all": [f"t{i}", "x"]}).encode() for i in range(3)]
    samples = {f"{i:04d}": {"png": encode(grey(100 + i)), "json": captions[i]} for i in range(3)}
    write_tar(tmp_path / "tars/train-0000.tar", samples)
    sources = [
        SourceConfig(str(tmp_path / "parquet"), weight=1),
        SourceConfig(str(tmp_path / "tars"), image_column="png", caption_column="json.all", weight=3),
    ]
    return DataConfig(sources=sources, cache_dir=str(tmp_path / "cache"))


class TestRows:
    def test_they_are_those_of_all_sources_in_order(self, two):
        rows = map_rows(two)
        assert (len(rows), rows.lengths, rows.weights) == (7, [4, 3], [1, 3])
        assert [row.captions for row in rows] == ["p0", "p1", "p2", "p3", ["t0", "x"], ["t1", "x"], ["t2", "x"]]
        levels = [np.asarray(read_row(rows, i)[0])[0, 0, 0] for i in range(7)]
        assert levels == [0, 1, 2, 3, 100, 101, 102]
        for index in (7, -1):
            with pytest.raises(IndexError):
                rows[index]

    def test_each_source_is_split_by_itself(self, tmp_path):
        for name, n in (("a", 300), ("b", 200)):
            (tmp_path / name).mkdir()
            make_data([grey(0, (2, 2))] * n, [f"{name}{i}" for i in range(n)]).to_parquet(tmp_path / name / "x.parquet")
        sources = [SourceConfig(str(tmp_path / name)) for name in "ab"]
        both, config = DataConfig(sources=sources), DataConfig(str(tmp_path / "b"), validation_split=0.2)
        sides = split_rows(map_rows(both), dataclasses.replace(both, validation_split=0.2))
        of_b = split_rows(map_rows(config), config)
        for side, alone in zip(sides, of_b, strict=True):
            assert [row.captions for row in side][side.lengths[0] :] == [row.captions for row in alone]
        assert sum(map(len, sides)) == 500 and 20 < len(of_b[1]) < 60
        assert {row.captions for row in sides[0]}.isdisjoint(row.captions for row in sides[1])

    def test_a_row_without_a_path_is_called_after_its_source(self, two, tmp_path):
        rows = [{"image": {"bytes": b"text", "path": None}, "text": "a"}] * 2
        features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
        datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "parquet/train.parquet")
        with pytest.raises(RowError, match=rf"^{tmp_path}/parquet row 1: not an image"):
            read_row(map_rows(two), 1)
        one = DataConfig(str(tmp_path / "parquet"))
        with pytest.raises(RowError, match=rf"^{tmp_path}/parquet row 1: not an image"):
            read_row(map_rows(one), 1)

    def test_errors_name_the_source(self, two):
        two.sources[1].image_column = "jpg"
        with pytest.raises(
            InputError, match=r"data.sources\[1\].image_column: no column 'jpg' in .*; it has png, json"
        ):
            map_rows(two)
        two.sources[1] = SourceConfig("/no/such/folder")
        with pytest.raises(InputError, match=r"data.sources\[1\].dataset: cannot load '/no/such/folder'"):
            map_rows(two)


class TestCaptionColumns:
    def test_all_that_are_not_null(self, tmp_path):
        data = make_data([grey(0)] * 3, ["a", "b", None])
        data.add_column("more", [["c", "d"], None, None]).to_parquet(tmp_path / "train.parquet")
        config = DataConfig(str(tmp_path), caption_column=["text", "more"])
        rows = map_rows(config)
        assert [read_row(rows, i)[1] for i in range(2)] == [["a", "c", "d"], ["b"]]
        with pytest.raises(RowError, match=r"2.png: the caption must be a string or a list of strings, got \[\]"):
            read_row(rows, 2)

    def test_of_an_image_folder(self, tmp_path):
        lines = [{"file_name": "0.png", "short": "s"}, {"file_name": "1.png", "long": "l"}]
        for i, line in enumerate(lines):
            grey(i).save(tmp_path / line["file_name"])
        (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
        rows = map_rows(DataConfig(str(tmp_path), caption_column=["short", "long"]))
        assert [row.captions for row in rows] == [["s"], ["l"]]
        with pytest.raises(InputError, match=r"data.caption_column: no 'a' or 'b' in .* line 1; it has short"):
            map_rows(DataConfig(str(tmp_path), caption_column=["a", "b"]))


class TestFormats:
    def test_tars_of_images_and_texts(self, tmp_path):
        for t in range(2):
            samples = {f"{i:04d}": {"jpg": encode(grey(i), "JPEG"), "txt": f"{t} {i}".encode()} for i in range(3)}
            write_tar(tmp_path / f"train-{t:04d}.tar", samples)
        config = DataConfig(str(tmp_path), image_column="jpg", caption_column="txt")
        rows = map_rows(config)
        assert [read_row(rows, i)[1] for i in range(6)] == [[f"{t} {i}"] for t in range(2) for i in range(3)]
        assert read_row(rows, 5)[0].size == (20, 16)
        with pytest.raises(InputError, match=r"data.image_column: no column 'image' in .*; it has jpg, txt, __key__"):
            map_rows(DataConfig(str(tmp_path)))

    def test_what_save_to_disk_wrote(self, tmp_path):
        data = make_data([grey(i) for i in range(3)], ["a", "b", "c"])
        data.save_to_disk(tmp_path / "one")
        datasets.DatasetDict({"test": data.select([2])}).save_to_disk(tmp_path / "several")
        assert [row.captions for row in map_rows(DataConfig(str(tmp_path / "one")))] == ["a", "b", "c"]
        assert [row.captions for row in map_rows(DataConfig(str(tmp_path / "several"), split="test"))] == ["c"]


class TestFingerprintCache:
    def count_reads(self, monkeypatch) -> list:
        names, read = [], image_module.read_bytes
        monkeypatch.setattr(image_module, "read_bytes", lambda value, name: names.append(name) or read(value, name))
        return names

    def test_a_second_start_reads_nothing(self, two, monkeypatch):
        names = self.count_reads(monkeypatch)
        first = map_rows(two).inspect(two)
        assert len(names) == 7 and first["num_images"] == 7
        assert map_rows(two).inspect(two) == first and len(names) == 7
        assert map_rows(two).inspect(dataclasses.replace(two, cache_dir=f"{two.cache_dir}2")) == first
        assert len(names) == 14  # another folder: all is read

    @pytest.mark.parametrize("same_size", [True, False])
    def test_a_changed_file_is_noticed_whatever_its_time(self, image_folder, tmp_path, same_size):
        folder = tmp_path / "data"
        folder.mkdir()
        for path in image_folder.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        config = DataConfig(str(folder), cache_dir=str(tmp_path / "cache"))
        rows = map_rows(config)
        first, before = rows.inspect(config), os.stat(folder / "000003.png")
        content = bytearray((folder / "000003.png").read_bytes())
        content[-1 if same_size else len(content) :] = b"x"
        (folder / "000003.png").write_bytes(content)
        os.utime(folder / "000003.png", ns=(before.st_atime_ns, before.st_mtime_ns))
        assert map_rows(config).parts[0].data._fingerprint == rows.parts[0].data._fingerprint  # so it is not enough
        assert map_rows(config).inspect(config) != first

    def test_the_key_tells_rows_and_columns_apart(self, two):
        rows = map_rows(two)
        keys = [rows.identity(two), rows.identity(dataclasses.replace(two, on_bad_row="skip"))]
        keys += [side.identity(two) for side in split_rows(rows, dataclasses.replace(two, validation_split=0.5))]
        two.sources[0].caption_column = ["text"]
        keys.append(map_rows(two).identity(two))
        assert len(set(keys)) == 5 and rows.identity(two) not in keys[1:4]

    def test_an_error_is_not_cached(self, tmp_path):
        make_data([grey(0)], [None]).to_parquet(tmp_path / "train.parquet")
        config = DataConfig(str(tmp_path), cache_dir=str(tmp_path / "cache"))
        for _ in range(2):
            with pytest.raises(RowError, match=r"0.png: the caption must be"):
                map_rows(config).inspect(config)

    def test_a_cache_that_cannot_be_written_is_warned_of(self, two, tmp_path, capsys):
        (tmp_path / "file").write_text("")
        config = dataclasses.replace(two, cache_dir=str(tmp_path / "file"))
        assert map_rows(config).inspect(config) == map_rows(two).inspect(two)
        assert "warning: data.cache_dir: cannot write" in capsys.readouterr().err


class TestImageSizes:
    def contents(self) -> list[bytes]:
        exif, text = Image.Exif(), PngImagePlugin.PngInfo()
        exif[0x0112] = 6
        text.add(b"tEXt", b"Author\0x", after_idat=True)
        image = grey(9, (30, 10))
        sideways = encode(image, exif=exif)
        at = sideways.index(b"eXIf") - 4
        chunk = sideways[at : at + 12 + int.from_bytes(sideways[at : at + 4], "big")]
        end = len(sideways) - 12
        exif_last = sideways[:at] + sideways[at + len(chunk) : end] + chunk + sideways[end:]
        kinds = [encode(image, kind) for kind in ("PNG", "JPEG", "WEBP", "GIF")]
        turned = [sideways, encode(image, "JPEG", exif=exif), encode(image, "WEBP", exif=exif), exif_last]
        return [*kinds, *turned, encode(image, pnginfo=text)]

    def test_they_are_those_of_the_decoded_images(self, tmp_path, monkeypatch):
        contents = self.contents()
        expected = [open_image(content, "test").size[::-1] for content in contents]
        assert len(set(expected)) == 2
        lines, folder = [], tmp_path / "data"
        folder.mkdir()
        for i, content in enumerate(contents):
            (folder / f"{i}.img.png").write_bytes(content)
            lines.append(json.dumps({"file_name": f"{i}.img.png", "text": ""}))
        (folder / "metadata.jsonl").write_text("\n".join(lines))
        config = DataConfig(str(folder), cache_dir=str(tmp_path / "cache"))
        sizes = image_sizes(map_rows(config), config)
        assert sizes.dtype == np.int64 and sizes.tolist() == [list(size) for size in expected]
        monkeypatch.setattr(Image, "open", None)  # from the cache
        assert image_sizes(map_rows(config), config).tolist() == sizes.tolist()

    def test_no_pixel_is_decoded(self, two, monkeypatch):
        monkeypatch.setattr(Image.Image, "load", None)
        monkeypatch.setattr("PIL.ImageFile.ImageFile.load", None)
        assert image_sizes(map_rows(two), two).tolist() == [[16, 20]] * 7

    def test_what_cannot_be_read(self, image_folder, tmp_path):
        for path in image_folder.iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
        (tmp_path / "000002.png").write_bytes(b"text")
        (tmp_path / "000005.png").unlink()
        config = DataConfig(str(tmp_path), cache_dir=str(tmp_path / "cache"), on_bad_row="skip")
        rows = map_rows(config)
        assert image_sizes(rows, config).tolist() == [[0, 0] if i in (2, 5) else [36, 36] for i in range(10)]
        with pytest.raises(RowError, match=r"000002.png: not an image that Pillow knows"):
            image_sizes(rows, dataclasses.replace(config, on_bad_row="stop"))


def test_a_run_goes_on_when_its_sources_moved_but_not_with_other_weights(short_run, image_folder, tmp_path):
    for name in ("a", "b", "moved"):
        shutil.copytree(image_folder, tmp_path / name)

    def argv(second: str, weight: int) -> list[str]:
        sources = [{"dataset": str(tmp_path / "a"), "weight": 1}, {"dataset": str(tmp_path / second), "weight": weight}]
        return [*short_run, *options({"data.dataset": None, "data.sources": sources, "train.resume_from": "latest"})]

    run = train([*argv("b", 1), "--train.max_steps", "2"])
    with pytest.raises(InputError, match=r"is of another run: data.sources was "):
        train([*argv("b", 2), "--train.max_steps", "4"])
    train([*argv("moved", 1), "--train.max_steps", "4"])
    assert [entry["step"] for entry in metrics_without_times(run)] == [1, 2, 3, 4]


def test_images_are_known_without_the_features_of_datasets(tmp_path):
    """As pandas and pyarrow write them: bytes, or bytes and a path."""
    images = [encode(grey(i)) for i in range(3)]
    columns = {"bytes": images, "pairs": [{"bytes": image, "path": None} for image in images]}
    for name, values in columns.items():
        (tmp_path / name).mkdir()
        table = pyarrow.table({"image": values, "text": ["a", "b", "c"]})
        pyarrow.parquet.write_table(table, tmp_path / name / "train.parquet")
        rows = map_rows(DataConfig(str(tmp_path / name)))
        for i in range(3):
            image, captions = read_row(rows, i)
            assert image.tobytes() == grey(i).tobytes() and captions == ["abc"[i]]
    message = r"^data.image_column: column 'text' of .* does not hold images, but Value\('string'\)$"
    with pytest.raises(InputError, match=message):
        map_rows(DataConfig(str(tmp_path / "bytes"), image_column="text"))
    stream = DataConfig(str(tmp_path / "bytes"), streaming=True)
    with pytest.raises(InputError, match=r"^data.image_column: .*, but Value\('binary'\) \(of a stream, cast it with"):
        open_stream(stream)


def test_a_caption_that_is_no_unicode_is_a_bad_row(tmp_path):
    with pytest.raises(RowError, match=r"^x.png: the caption is no Unicode text, got 'a\\ud800b'$"):
        captions_of("a\ud800b", "x.png")


@pytest.mark.parametrize("streaming", [False, True])
def test_the_weights_of_an_image_folder(tmp_path, streaming):
    """Of which a bad one is refused by its line."""
    for i in range(3):
        grey(i).save(tmp_path / f"{i}.png")

    def opened(*weights: str):
        lines = [f'{{"file_name": "{i}.png", "text": "a"{weight}}}\n' for i, weight in enumerate(weights)]
        (tmp_path / "metadata.jsonl").write_text("".join(lines))
        config = DataConfig(str(tmp_path), weight_column="score", streaming=streaming, lanes=1 if streaming else None)
        rows = open_stream(config) if streaming else map_rows(config)
        return sorted(rows.loss_weight(rows.order(0, 1)[k]) for k in range(3))

    assert opened(', "score": 2', ', "score": 0.5', ', "score": 0') == [0, 0.5, 2]
    for bad, got in ((', "score": "2"', "'2'"), (', "score": true', "True"), (', "score": NaN', "nan"), ("", "None")):
        message = rf"^data.weight_column: .*metadata.jsonl line 2: score: must be a number of 0 or more, got {got}$"
        with pytest.raises(InputError, match=message):
            opened(', "score": 2', bad, ', "score": 1')
    with pytest.raises(InputError, match=r"^data.weight_column: no column 'score' in .*; it has image, text"):
        (tmp_path / "metadata.jsonl").unlink()
        for i in range(3):
            (tmp_path / f"{i}.txt").write_text("a")
        map_rows(DataConfig(str(tmp_path), weight_column="score"))
