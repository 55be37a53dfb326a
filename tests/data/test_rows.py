import dataclasses
import inspect
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from helpers import as_rows, data_of, encode, make_data, read_row
from PIL import Image

from difftrain_utils.config.data import DataConfig, SourceConfig
from difftrain_utils.data.rows import Rows, map_rows, split_rows
from difftrain_utils.data.samples import Samples
from difftrain_utils.data.streaming import open_stream
from difftrain_utils.errors import InputError, RowError


class TestMapRows:
    def test_an_image_folder(self, image_folder):
        data = map_rows(DataConfig(dataset=str(image_folder)))
        rows = [json.loads(line) for line in (image_folder / "metadata.jsonl").read_text().splitlines()]
        assert [row.captions for row in data] == [row["text"] for row in rows]
        assert [row.name.rsplit("/")[-1] for row in data] == [row["file_name"] for row in rows]

    def test_caption_lists(self, image_folder, tmp_path):
        (tmp_path / "a.png").write_bytes((image_folder / "000000.png").read_bytes())
        (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "captions": ["one", "two"]}\n')
        data = map_rows(DataConfig(dataset=str(tmp_path), caption_column="captions"))
        assert data[0].captions == ["one", "two"]

    def test_a_folder_of_parquet_files(self, tmp_path):
        images = [Image.new("RGB", (20, 16), (10 * i,) * 3) for i in range(7)]
        make_data(images, [str(i) for i in range(7)]).to_parquet(tmp_path / "train.parquet")
        config = DataConfig(dataset=str(tmp_path))
        data = map_rows(config)
        rows = [read_row(data, i) for i in range(len(data))]
        assert [captions for _, captions in rows] == [[str(i)] for i in range(7)]
        assert all(np.array_equal(row, image) for (row, _), image in zip(rows, images, strict=True))

    @pytest.mark.parametrize("streaming", [False, True])
    def test_a_column_of_class_labels_or_integers(self, tmp_path, streaming):
        """Also in a stream, and beside captions. A label that is missing is none."""
        images = [Image.new("RGB", (20, 16), (10 * i,) * 3) for i in range(4)]
        data = make_data(images, [f"image {i}" for i in range(4)])
        labels = datasets.ClassLabel(names=["tench, Tinca tinca", "crane"])
        data = data.add_column("label", [1, 0, 1, -1], feature=labels).add_column("number", [7, 8, 9, 10])
        data.to_parquet(tmp_path / "train.parquet")

        def captions(column) -> list:
            config = DataConfig(dataset=str(tmp_path), caption_column=column, streaming=streaming, shuffle_buffer=1)
            rows = open_stream(config) if streaming else map_rows(config)
            order = rows.order(0, 1) if streaming else range(4)
            return [rows[order[i]].captions for i in range(4)]

        assert captions("label") == ["crane", "tench, Tinca tinca", "crane", None]
        assert captions("number") == ["7", "8", "9", "10"]
        assert captions(["text", "label"])[2:] == [["image 2", "crane"], ["image 3"]]

    def test_a_folder_with_a_folder_for_each_split(self, image_folder, tmp_path):
        for split in ("train", "test"):
            (tmp_path / split).mkdir()
            (tmp_path / split / "a.png").write_bytes((image_folder / "000000.png").read_bytes())
            (tmp_path / split / "metadata.jsonl").write_text(f'{{"file_name": "a.png", "text": "{split}"}}\n')
        assert map_rows(DataConfig(dataset=str(tmp_path), split="test"))[0].captions == "test"

    @pytest.mark.parametrize(
        ("lines", "message"),
        [
            ("not json", r"metadata.jsonl line 1: not JSON"),
            ('{"text": "no name"}', r'metadata.jsonl line 1: needs a "file_name"'),
            ('{"file_name": "a.png", "text": "x"}\n[1]', r'metadata.jsonl line 2: needs a "file_name"'),
            ('{"file_name": "b.png", "text": "x"}', r"metadata.jsonl line 1: no such file: b.png"),
            ('{"file_name": "a.png", "caption": "x"}', r"data.caption_column: no 'text' in .* line 1; it has caption"),
        ],
    )
    def test_bad_metadata_is_reported_with_its_line(self, image_folder, tmp_path, lines, message):
        (tmp_path / "a.png").write_bytes((image_folder / "000000.png").read_bytes())
        (tmp_path / "metadata.jsonl").write_text(lines + "\n")
        with pytest.raises(InputError, match=message):
            map_rows(DataConfig(dataset=str(tmp_path)))

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"dataset": "builtin:circles"}, "no such builtin: 'builtin:circles'"),
            ({"dataset": "/no/such/folder"}, "data.dataset: cannot load '/no/such/folder'"),
            ({"dataset": "builtin:shapes", "caption_column": "caption"}, "no column 'caption' .* it has image, text"),
            ({"dataset": "builtin:shapes", "image_column": "text"}, "'text' of builtin:shapes does not hold images"),
        ],
    )
    def test_bad_names_are_refused(self, fields, message):
        with pytest.raises(InputError, match=message):
            map_rows(DataConfig(**({"resolution": 8} | fields)))

    def test_no_metadata(self, tmp_path):
        with pytest.raises(InputError, match=r"has no metadata.jsonl"):
            map_rows(DataConfig(dataset=str(tmp_path)))


class TestSplit:
    def split(self, n: int, share: float, first: int = 0) -> tuple[set, set]:
        images = [Image.new("RGB", (4, 4))] * n
        rows = [{"bytes": encode(image), "path": f"/somewhere/{first + i}.png"} for i, image in enumerate(images)]
        data = datasets.Dataset.from_dict({"image": rows, "text": [str(first + i) for i in range(n)]})
        training, validation = split_rows(as_rows(data), DataConfig("memory", validation_split=share))
        return {row.captions for row in training}, {row.captions for row in validation}

    def test_a_share_is_held_out_by_name(self):
        training, validation = self.split(1000, 0.2)
        assert training.isdisjoint(validation) and len(training | validation) == 1000
        assert 160 < len(validation) < 240
        # a row stays on its side when others come and when the share grows
        assert self.split(500, 0.2, first=500)[1] <= validation <= self.split(1000, 0.3)[1]

    def test_another_folder_holds_the_validation_rows(self, image_folder):
        data = map_rows(DataConfig("builtin:shapes", resolution=8))
        config = DataConfig("builtin:shapes", resolution=8, validation_dataset=str(image_folder))
        training, validation = split_rows(data, config)
        assert training is data and len(validation) == 10
        assert split_rows(data, DataConfig("builtin:shapes"))[1] is None

    def test_an_empty_side_is_refused(self):
        for share, leaves, remedy in ((0.001, "3 to train on and 0 to", "larger"), (0.999, "0 to", "smaller")):
            message = f"data.validation_split: {share} of 3 images leaves {leaves} .*: take a {remedy} share, 0, or a "
            with pytest.raises(InputError, match=message):
                self.split(3, share)


class TestFingerprint:
    def fingerprint(self, images, captions) -> str:
        config = DataConfig(dataset="memory")
        data = as_rows(make_data(images, captions))
        return data.inspect(config)["sha256"]

    def test_it_changes_with_one_pixel_one_caption_and_the_order(self):
        images = [Image.new("RGB", (8, 8), (i, 0, 0)) for i in range(3)]
        first = self.fingerprint(images, ["a", "b", "c"])
        assert first == self.fingerprint(images, ["a", "b", "c"])
        assert first != self.fingerprint(images, ["a", "b", "d"])
        changed = [image.copy() for image in images]
        changed[2].putpixel((7, 7), (2, 0, 1))
        assert first != self.fingerprint(changed, ["a", "b", "c"])
        assert first != self.fingerprint(images[::-1], ["a", "b", "c"][::-1])

    def test_it_does_not_change_when_the_folder_moves(self, image_folder, tmp_path):
        moved = tmp_path / "elsewhere"
        moved.mkdir()
        for path in image_folder.iterdir():
            (moved / path.name).write_bytes(path.read_bytes())
        digests = [
            map_rows(config).inspect(config)["sha256"]
            for config in (DataConfig(dataset=str(folder)) for folder in (image_folder, moved))
        ]
        assert digests[0] == digests[1]

    def test_what_is_no_image_or_no_caption_is_refused_by_name(self):
        config = DataConfig(dataset="memory")
        images = [{"bytes": b"no image", "path": "cat.png"}]
        data = datasets.Dataset.from_dict({"image": images, "text": ["a cat"]})
        with pytest.raises(InputError, match=r"cat.png: not an image"):
            as_rows(data).inspect(config)
        data = datasets.Dataset.from_dict(
            {"image": [{"bytes": encode(Image.new("L", (2, 2))), "path": "cat.png"}], "text": [3.5]}
        )
        with pytest.raises(InputError, match=r"cat.png: the caption must be a string or a list of strings, got 3\.5"):
            as_rows(data).inspect(config)

    def test_bad_rows_that_are_skipped_have_a_fingerprint_too(self, image_folder, tmp_path):
        shutil.copytree(image_folder, tmp_path / "data")
        config = DataConfig(dataset=str(tmp_path / "data"), on_bad_row="skip")

        def fingerprint() -> str:
            return map_rows(config).inspect(config)["sha256"]

        stop = DataConfig(dataset=str(tmp_path / "data"))
        digests = [map_rows(stop).inspect(stop)["sha256"]]
        assert fingerprint() == digests[0]  # of good data, whatever the policy
        path = tmp_path / "data" / "000003.png"
        for content in (path.read_bytes()[:20], b"text", b""):
            path.write_bytes(content)
            digests.append(fingerprint())
        path.unlink()
        digests += [fingerprint()]
        assert len(set(digests)) == 5
        assert fingerprint() == digests[-1]

    def test_metadata_that_is_no_json_stops_even_so(self, image_folder, tmp_path):
        shutil.copytree(image_folder, tmp_path / "data")
        path = tmp_path / "data" / "metadata.jsonl"
        path.write_bytes(path.read_bytes() + b"{\n")
        with pytest.raises(InputError, match=r"metadata.jsonl line 11: not JSON"):
            map_rows(DataConfig(dataset=str(tmp_path / "data"), on_bad_row="skip"))
        path.write_bytes(b"\xff\n")
        with pytest.raises(InputError, match=r"metadata.jsonl line 1: not UTF-8"):
            map_rows(DataConfig(dataset=str(tmp_path / "data"), on_bad_row="skip"))


@pytest.mark.parametrize("kind", ["mapped", "streamed"])
class TestProtocol:
    """What `Rows` promises, whichever rows they are. Seven rows in two files; shuffled in windows of three, if they are
    a stream."""

    def open(self, kind: str, folder: Path, seed: int = 0, **fields) -> tuple[Rows, DataConfig]:
        config = DataConfig(str(folder), resolution=8, streaming=kind == "streamed", shuffle_buffer=3, **fields)
        return (map_rows(config) if kind == "mapped" else open_stream(config)), config

    @pytest.fixture
    def folder(self, tmp_path) -> Path:
        return self.write(tmp_path / "data")

    def write(self, folder: Path, spoilt: Sequence[int] = (), first_level: int = 0) -> Path:
        folder.mkdir()
        for file, numbers in enumerate((range(4), range(4, 7))):
            images = {i: encode(Image.new("RGB", (8, 8), (first_level + 10 * i,) * 3)) for i in numbers}
            rows = [{"bytes": b"text" if i in spoilt else images[i], "path": f"{i}.png"} for i in numbers]
            features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
            columns = {"image": rows, "text": [str(i) for i in numbers]}
            datasets.Dataset.from_dict(columns, features).to_parquet(folder / f"{file}.parquet")
        return folder

    def test_its_methods_are_called_alike(self, kind, folder):
        rows, _ = self.open(kind, folder)
        methods = {name: method for name, method in vars(Rows).items() if callable(method) and name[0] != "_"}
        assert methods.keys() == {"loss_weight", "order", "substitutes", "inspect"}
        for name, method in methods.items():
            asked, has = (inspect.signature(each).parameters for each in (method, getattr(type(rows), name)))
            assert [(p.name, p.default) for p in asked.values()] == [(p.name, p.default) for p in has.values()]

    def test_the_order_has_each_row_once_an_epoch(self, kind, folder):
        def captions_of_run(seed: int, num: int = 21) -> list[str]:
            rows, _ = self.open(kind, folder, seed)
            order = rows.order(seed, batch_size=1, buckets=None)
            assert order.epoch_length == 7
            return [rows[order[k]].captions for k in range(num)]

        captions = captions_of_run(0)
        assert {caption: captions.count(caption) for caption in captions} == {str(i): 3 for i in range(7)}
        assert captions == captions_of_run(0) and captions != captions_of_run(1)
        assert captions[:7] != captions[7:14]

    def test_a_sample_is_read_with_its_name_image_and_caption(self, kind, folder):
        rows, config = self.open(kind, folder)
        samples = Samples(data_of(rows), config, 0, 100)
        for k in range(21):
            number = int(samples[k]["caption"])
            assert torch.equal(samples[k]["pixel_values"], torch.full((3, 8, 8), number / 12.75 - 1))
            assert samples.names_of([k]) == [f"{number}.png"]

    def test_substitutes_are_other_rows_for_the_sample_and_the_same_each_time(self, kind, tmp_path):
        folder = self.write(tmp_path / "data", spoilt=(2, 5))
        rows, config = self.open(kind, folder, on_bad_row="skip")
        order, samples, num_skipped = rows.order(0, 1), Samples(data_of(rows), config, 0, 100), 0
        for k in range(21):
            others, words = rows.substitutes(order[k], k, 0, None)
            captions = [rows[other].captions for other in others]
            assert captions == [rows[other].captions for other in rows.substitutes(order[k], k, 0)[0]]
            assert len(captions) == 10 if kind == "mapped" else len(captions) <= 2  # drawn, or the others of the window
            due, readable = rows[order[k]].captions, [caption for caption in captions if caption not in ("2", "5")]
            is_bad = due in ("2", "5")
            if is_bad and not readable:
                with pytest.raises(RowError, match=rf"^{due}.png: not an image .*; nor can {words}$"):
                    samples[k]
                continue
            assert samples[k]["caption"] == (readable[0] if is_bad else due) and samples[k]["skipped"] == is_bad
            num_skipped += is_bad
        assert num_skipped >= 4

    def test_where_none_can_be_read_the_error_says_which(self, kind, tmp_path):
        rows, config = self.open(kind, self.write(tmp_path / "data", spoilt=range(7)), on_bad_row="skip")
        samples = Samples(data_of(rows), config, 0, 100)
        _, words = rows.substitutes(samples.order[4], 4, 0)
        with pytest.raises(RowError, match=rf"^\d.png: not an image that Pillow knows; nor can {words}$"):
            samples[4]

    def test_a_fingerprint_is_of_the_content(self, kind, folder, tmp_path):
        def fingerprint(folder: Path) -> dict:
            rows, config = self.open(kind, folder)
            found = rows.inspect(config)
            assert found == json.loads(json.dumps(found)) and found["dataset"] == str(folder)
            assert found == self.open(kind, folder)[0].inspect(config)
            return found

        moved = shutil.copytree(folder, tmp_path / "moved")
        other = self.write(tmp_path / "other", first_level=1)
        digests = [fingerprint(each)["sha256"] for each in (folder, moved, other)]
        assert digests[0] == digests[1] != digests[2] and all(len(digest) == 64 for digest in digests)

    def test_a_loss_weight_is_that_of_the_source_and_takes_no_reading(self, kind, folder, monkeypatch):
        rows, _ = self.open(kind, folder)
        assert rows.loss_weight(rows.order(0, 1)[4]) == 1
        config = DataConfig(sources=[SourceConfig(str(folder), loss_weight=2.5)])
        rows = map_rows(config) if kind == "mapped" else open_stream(config)
        monkeypatch.setattr(type(rows), "__getitem__", None)
        assert [rows.loss_weight(rows.order(0, 1)[k]) for k in range(7)] == [2.5] * 7

    def test_a_rows_own_weight_comes_on_top_and_is_in_the_fingerprint(self, kind, tmp_path):
        def opened(weights: list, **fields):
            image, numbers = encode(Image.new("RGB", (8, 8))), range(len(weights))
            table = {"image": [{"bytes": image, "path": f"{i}.png"} for i in numbers]}
            table |= {"text": [str(i) for i in numbers], "meta": [{"score": weight} for weight in weights]}
            folder = tmp_path / str(len(list(tmp_path.iterdir())))
            folder.mkdir()
            data = datasets.Dataset.from_dict(table).cast_column("image", datasets.Image())
            data.to_parquet(folder / "train-00000.parquet")
            source = SourceConfig(str(folder), loss_weight=2.0, weight_column="meta.score")
            config = DataConfig(sources=[source], streaming=kind == "streamed", resolution=16, **fields)
            return map_rows(config) if kind == "mapped" else open_stream(config), config

        rows, config = opened([0.5, 3.0, 0.0, 1.0])
        samples = Samples(data_of(rows), config, 0, 20)
        assert all(samples[k]["weight"] == 2 * [0.5, 3, 0, 1][int(samples[k]["caption"])] for k in range(20))
        digests = [opened(weights)[0].inspect(config)["sha256"] for weights in ([0.5, 3.0, 0.0, 1.0], [1.0] * 4)]
        assert digests[0] != digests[1]
        if kind == "mapped":
            training, held_out = split_rows(rows, dataclasses.replace(config, validation_split=0.5))
            weights = {row.captions: part.loss_weight(i) for part in (training, held_out) for i, row in enumerate(part)}
            assert weights == {"0": 1, "1": 6, "2": 0, "3": 2}
        for bad in (-1.0, None, float("inf")):  # of a stream, whose first row is looked at
            message = rf"row 0: meta.score: must be a number of 0 or more, got {bad}$"
            with pytest.raises((InputError, RowError), match=message if kind == "mapped" else message[6:]):
                opened([bad, 1.0])
            rows, config = opened([bad, 1.0], on_bad_row="skip")
            samples = Samples(data_of(rows), config, 0, 20)
            assert [samples[k]["weight"] for k in range(20)] == [2] * 20
