import json
import shutil

import datasets
import numpy as np
import pytest
from helpers import as_rows, encode, make_data
from PIL import Image

from difftrain_utils.config.data import DataConfig
from difftrain_utils.data.fingerprint import inspect_data
from difftrain_utils.data.rows import map_rows, read_row, split_rows
from difftrain_utils.errors import InputError, RowError
from difftrain_utils.media.image import open_image


class TestOpenImage:
    def pixels(self, image: Image.Image, format: str = "PNG", **options) -> np.ndarray:
        opened = open_image(encode(image, format, **options), "test")
        assert opened.mode == "RGB"
        return np.asarray(opened)

    def test_transparency_shows_white(self):
        image = Image.new("RGBA", (4, 4), (255, 0, 0, 255))
        image.putpixel((0, 0), (0, 0, 0, 0))
        image.putpixel((1, 0), (0, 0, 0, 128))
        pixels = self.pixels(image)
        assert pixels[0, 0].tolist() == [255, 255, 255] and pixels[3, 3].tolist() == [255, 0, 0]
        assert abs(int(pixels[0, 1, 0]) - 127) <= 1

    def test_a_palette_is_looked_up_with_its_transparent_colour(self):
        image = Image.new("P", (4, 4), 0)
        image.putpalette([0, 0, 255, 0, 255, 0])
        image.putpixel((0, 0), 1)
        assert self.pixels(image)[0, 0].tolist() == [0, 255, 0]
        pixels = self.pixels(image, transparency=1)
        assert pixels[0, 0].tolist() == [255, 255, 255] and pixels[3, 3].tolist() == [0, 0, 255]

    def test_greyscale_has_three_equal_channels(self):
        assert self.pixels(Image.new("L", (4, 4), 77))[2, 2].tolist() == [77, 77, 77]
        grey = Image.new("LA", (4, 4), (77, 0))
        assert self.pixels(grey)[2, 2].tolist() == [255, 255, 255]

    def test_sixteen_bits_are_scaled(self):
        ramp = np.linspace(0, 65535, 16).astype(np.uint16).reshape(4, 4)
        pixels = self.pixels(Image.fromarray(ramp))
        assert np.abs(pixels[..., 0].ravel().astype(float) - np.linspace(0, 255, 16)).max() <= 1

    def test_an_image_is_turned_upright(self):
        image = Image.new("RGB", (8, 4), "blue")
        image.paste("red", (0, 0, 4, 4))
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned by 90 degrees clockwise
        pixels = self.pixels(image, exif=exif)
        assert pixels.shape == (8, 4, 3)
        assert pixels[0, 0].tolist() == [255, 0, 0] and pixels[7, 0].tolist() == [0, 0, 255]

    def test_cmyk(self):
        assert np.abs(self.pixels(Image.new("CMYK", (8, 8)), "JPEG").astype(int) - 255).max() <= 2

    @pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
    @pytest.mark.parametrize("edge", [11, 15])  # Pillow warns of the first and refuses the second
    def test_what_is_above_pillows_limit_is_refused(self, monkeypatch, edge):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        assert self.pixels(Image.new("L", (10, 10))).shape == (10, 10, 3)
        with pytest.raises(RowError, match=rf"cat.png: an image of {edge**2} pixels; the limit is 100 "):
            open_image(encode(Image.new("L", (edge, edge))), "cat.png")

    def test_what_is_no_image_is_refused_by_name(self):
        with pytest.raises(InputError, match=r"cat.png: not an image"):
            open_image(b"no image", "cat.png")
        rng = np.random.default_rng(0)
        content = encode(Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)))
        with pytest.raises(InputError, match=r"cat.png: cannot decode"):
            open_image(content[: len(content) // 2], "cat.png")


class TestLoadData:
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
        rows = [read_row(data, i, config) for i in range(len(data))]
        assert [captions for _, captions in rows] == [[str(i)] for i in range(7)]
        assert all(np.array_equal(row, image) for (row, _), image in zip(rows, images, strict=True))

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
    def test_bad_metadata_is_told_with_its_line(self, image_folder, tmp_path, lines, message):
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
        with pytest.raises(InputError, match=r"data.validation_split: 0.001 of 3 images leaves 3 to train on and 0 to"):
            self.split(3, 0.001)


class TestFingerprint:
    def fingerprint(self, images, captions) -> str:
        config = DataConfig(dataset="memory")
        data = as_rows(make_data(images, captions))
        return inspect_data(data, config)["sha256"]

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
            inspect_data(map_rows(config), config)["sha256"]
            for config in (DataConfig(dataset=str(folder)) for folder in (image_folder, moved))
        ]
        assert digests[0] == digests[1]

    def test_what_is_no_image_or_no_caption_is_refused_by_name(self):
        config = DataConfig(dataset="memory")
        images = [{"bytes": b"no image", "path": "cat.png"}]
        data = datasets.Dataset.from_dict({"image": images, "text": ["a cat"]})
        with pytest.raises(InputError, match=r"cat.png: not an image"):
            inspect_data(as_rows(data), config)
        data = datasets.Dataset.from_dict(
            {"image": [{"bytes": encode(Image.new("L", (2, 2))), "path": "cat.png"}], "text": [3]}
        )
        with pytest.raises(InputError, match=r"cat.png: the caption must be a string or a list of strings, got 3"):
            inspect_data(as_rows(data), config)

    def test_bad_rows_that_are_skipped_have_a_fingerprint_too(self, image_folder, tmp_path):
        shutil.copytree(image_folder, tmp_path / "data")
        config = DataConfig(dataset=str(tmp_path / "data"), on_bad_row="skip")

        def fingerprint() -> str:
            return inspect_data(map_rows(config), config)["sha256"]

        stop = DataConfig(dataset=str(tmp_path / "data"))
        digests = [inspect_data(map_rows(stop), stop)["sha256"]]
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
