"""Folders of photos: what is read of them, in which order and how often, and what is refused."""

import contextlib
import dataclasses
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from helpers import (
    assert_one_line,
    data_of,
    last_wins,
    make_data,
    metrics_without_times,
    options,
    pipeline_bytes,
    read_row,
    train,
    without_dropout,
)
from PIL import Image

from difftrain_utils.commands import check_data
from difftrain_utils.config.data import DataConfig, SourceConfig
from difftrain_utils.data.photos import words_of
from difftrain_utils.data.rows import map_rows, split_rows
from difftrain_utils.data.samples import Samples, collate
from difftrain_utils.data.sources import validation_source
from difftrain_utils.data.streaming import open_stream
from difftrain_utils.errors import InputError


def write(folder: Path, files: dict[str, str | int]) -> DataConfig:
    """Text files, and grey images for numbers."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            (folder / name).write_text(content)
        else:
            Image.new("RGB", (20, 16), (content,) * 3).save(folder / name)
    return DataConfig(str(folder), resolution=8, cache_dir=str(folder.parent / "cache"))


@pytest.fixture
def config(tmp_path) -> DataConfig:
    return write(
        tmp_path / "photos",
        {
            "dog.png": 20,
            "dog.caption": "\ufeff a dog \n",
            "cat.JPG": 10,
            "cat.txt": "a cat\nwhich is not read",
            "in/side.v2.webp": 30,
            "in/side.v2.txt": "",
            # what is no image
            ".hidden.png": 0,
            ".cache/a.png": 0,
            "cat.npz": "latents of kohya's",
            "cat-masklabel.png": 255,
            "notes.md": "",
        },
    )


def captions_of(config: DataConfig) -> list:
    return [row.captions for row in map_rows(config)]


def test_captions_lie_beside_images_which_are_sorted_by_their_paths(config, monkeypatch):
    rows = map_rows(config)
    assert [row.name for row in rows] == [
        f"{config.dataset}/{name}" for name in ("cat.JPG", "dog.png", "in/side.v2.webp")
    ]
    assert [row.captions for row in rows] == ["a cat", "a dog", ""]
    assert [round(np.asarray(read_row(rows, i)[0]).mean() / 10) for i in range(3)] == [1, 2, 3]

    def walk(folder, of_system=os.walk, **options):
        for found in of_system(folder, **options):
            found[1].reverse()
            found[2].reverse()
            yield found

    monkeypatch.setattr(os, "walk", walk)
    assert [row.name for row in map_rows(config)] == [row.name for row in rows]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("red_car.jpg", "red car"),
        ("red_car_02.jpg", "red car"),
        ("red car (2).jpg", "red car"),
        ("red-car-7.v2.jpg", "red-car-7.v2"),
        ("r2d2.jpg", "r2d2"),
        ("0001.jpg", "0001"),
    ],
)
def test_captions_in_file_names(name, words):
    assert words_of(Path("some 3") / name) == words


def test_the_columns_of_captions(config):
    config.caption_column = "file_name"
    assert captions_of(config) == ["cat", "dog", "side.v2"]
    config.caption_column = ["text", "file_name"]
    assert captions_of(config)[0] == ["a cat", "cat"]
    config.caption_column = "caption"
    with pytest.raises(
        InputError, match=r"^data.caption_column: no column 'caption' in .*; it has image, text, file_name"
    ):
        map_rows(config)


def test_a_split_is_a_folder_of_its_name(tmp_path):
    config = write(tmp_path / "photos", {"train/a.png": 1, "train/a.txt": "a", "test/b.png": 1, "test/b.txt": "b"})
    assert captions_of(config) == ["a"]
    config.split = "test"
    assert captions_of(config) == ["b"]
    for split, message in (("other", "data.split: no folder 'other' in "), ("a" * 300, "data.dataset: cannot load ")):
        config.split = split
        with pytest.raises(InputError, match=f"^{message}"):
            map_rows(config)


def test_each_change_of_a_caption_is_another_fingerprint(config):
    folder = Path(config.dataset)

    def fingerprint() -> str:
        return map_rows(config).inspect(config)["sha256"]

    seen = [fingerprint()]
    assert fingerprint() == seen[0]
    (folder / "cat.txt").write_text("a cat\nwhich is still not read")
    assert fingerprint() == seen[0]
    config.default_caption = "a photo"
    assert fingerprint() == seen[0]
    (folder / "cat.txt").write_text("a CAT")
    seen.append(fingerprint())
    (folder / "in/side.v2.txt").unlink()  # the default caption takes its place
    seen.append(fingerprint())
    config.default_caption = "another photo"
    seen.append(fingerprint())
    (folder / "in/side.v2.caption").write_text("new")
    seen.append(fingerprint())
    assert len(set(seen)) == 5


class TestDefaultCaption:
    """One meaning, whatever the data are."""

    def test_photos(self, config):
        (Path(config.dataset) / "cat.txt").unlink()
        config.default_caption = "a photo of sks cat"
        assert captions_of(config) == ["a photo of sks cat", "a dog", ""]

    def test_metadata(self, config):
        lines = [
            {"file_name": "cat.JPG", "text": None},
            {"file_name": "dog.png"},
            {"file_name": "cat.JPG", "text": "c"},
        ]
        Path(config.dataset, "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
        config.default_caption = "default"
        assert captions_of(config) == ["default", "default", "c"]

    @pytest.mark.parametrize("streaming", [False, True])
    def test_other_data_and_streams(self, tmp_path, streaming):
        images = [Image.new("RGB", (20, 16))] * 3
        make_data(images, [None, ["a", "b"], []]).to_parquet(tmp_path / "train.parquet")
        config = DataConfig(str(tmp_path), default_caption="", streaming=streaming, shuffle_buffer=1)
        rows = open_stream(config) if streaming else map_rows(config)
        order = rows.order(0, 1) if streaming else range(3)
        assert [rows[order[i]].captions for i in range(3)] == ["", ["a", "b"], ""]

    @pytest.mark.parametrize("streaming", [False, True])
    def test_data_without_captions(self, tmp_path, streaming):
        """But a column that was asked for has to be there."""
        make_data([Image.new("RGB", (20, 16))], [""]).remove_columns("text").to_parquet(tmp_path / "train.parquet")
        config = DataConfig(str(tmp_path), default_caption="a photo", streaming=streaming, shuffle_buffer=1)
        rows = open_stream(config) if streaming else map_rows(config)
        assert rows[rows.order(0, 1)[0]].captions == "a photo"
        config.caption_column = "caption"
        with pytest.raises(InputError, match=r"^data.caption_column: no column 'caption' in .*; it has image$"):
            open_stream(config) if streaming else map_rows(config)

    def test_each_source_has_its_own(self, config):
        (Path(config.dataset) / "cat.txt").unlink()
        sources = [SourceConfig(config.dataset, default_caption=caption) for caption in ("one", "two")]
        assert captions_of(DataConfig(sources=sources))[::3] == ["one", "two"]


class TestRepeats:
    """kohya's folders, whose names say how often their images come and what is in them."""

    @pytest.fixture
    def config(self, tmp_path) -> DataConfig:
        files = {f"10_sks dog/{i}.png": i for i in range(2)} | {f"1_dog/{i}.png": 100 + i for i in range(20)}
        return write(tmp_path / "photos", files | {"10_sks dog/1.txt": "its own", "sample/readme.txt": ""})

    def test_an_image_comes_as_often_as_its_folder_says(self, config):
        rows = map_rows(config)
        assert [row.captions for row in rows] == ["sks dog", "its own", *["dog"] * 20]
        order = rows.order(seed=0, batch_size=1)
        assert order.epoch_length == 10 * 2 + 1 * 20
        counts = np.bincount([order[k] for k in range(40)])
        assert counts.tolist() == [10, 10, *[1] * 20]
        kept, _ = split_rows(rows, dataclasses.replace(config, validation_split=0.3))
        assert kept.order(seed=0, batch_size=1).epoch_length == 10 * kept.lengths[0] + kept.lengths[1] < 40

    def test_a_default_caption_wins_over_the_folders(self, config):
        config.default_caption = "mine"
        assert [row.captions for row in map_rows(config)][:3] == ["mine", "its own", "mine"]

    def test_beside_other_sources(self, config, tmp_path):
        other = write(tmp_path / "other", {f"{i}.png": i for i in range(4)})
        sources = [
            SourceConfig(config.dataset, weight=3, loss_weight=2),
            SourceConfig(other.dataset, default_caption="other", weight=1),
        ]
        rows = map_rows(DataConfig(sources=sources))
        assert (rows.lengths, rows.weights) == ([2, 20, 4], [1.5, 1.5, 1])
        assert [rows.loss_weight(i) for i in (0, 21, 22)] == [2, 2, 1]
        for source in sources:
            source.weight = None
        assert map_rows(DataConfig(sources=sources)).order(seed=0, batch_size=1).epoch_length == 10 * 2 + 20 + 4

    def test_as_validation_data(self, config):
        config.validation_dataset, config.dataset = config.dataset, "builtin:shapes"
        _, rows = split_rows(map_rows(config), config)
        assert len(rows) == 22 and validation_source(config)[1].dataset == config.validation_dataset

    def test_images_outside_are_refused(self, config):
        write(Path(config.dataset), {"sample/a.png": 1})
        with pytest.raises(InputError, match=r"photos/sample/a.png: outside of the folders <repeats>_<words>"):
            map_rows(config)

    def test_no_repeats_are_refused(self, config):
        write(Path(config.dataset), {"0_none/a.png": 1})
        with pytest.raises(InputError, match=r"photos/0_none: .* must be at least 1"):
            map_rows(config)


class TestRefused:
    def test_photos_without_captions(self, config):
        (Path(config.dataset) / "cat.txt").unlink()
        (Path(config.dataset) / "in/side.v2.txt").unlink()
        with pytest.raises(InputError) as error:
            map_rows(config)
        folder = re.escape(config.dataset)
        assert re.fullmatch(
            rf"data.dataset: {folder}/cat.JPG has no caption \(2 of 3 images have none\): write cat.txt beside it or a "
            r'metadata.jsonl, or take --data.default_caption "a photo of …" for all, or let difftrain caption '
            rf"{folder} --model … write them",
            str(error.value),
        )
        with pytest.raises(
            InputError, match=r"^data.sources\[0\].dataset: .* or take data.sources\[0\].default_caption: "
        ):
            map_rows(DataConfig(sources=[SourceConfig(config.dataset)]))
        config.on_bad_row = "skip"
        assert captions_of(config) == [None, "a dog", None]
        (Path(config.dataset) / "dog.caption").unlink()
        with pytest.raises(InputError, match="3 of 3 images have none"):
            map_rows(config)

    def test_captions_that_cannot_be_read(self, config):
        (Path(config.dataset) / "cat.txt").write_bytes(b"caf\xe9")
        config.default_caption, config.on_bad_row = "a photo", "skip"
        with pytest.raises(InputError, match=r"photos/cat.txt: not UTF-8$"):
            map_rows(config)
        (Path(config.dataset) / "cat.caption").write_text("a cat")
        with pytest.raises(InputError, match=r"photos/cat.txt: a second file of captions beside cat.caption$"):
            map_rows(config)

    def test_no_images(self, tmp_path):
        with pytest.raises(
            InputError, match=r"^data.dataset: .*photos has no metadata.jsonl \(.*, and no images: .png, "
        ):
            map_rows(write(tmp_path / "photos", {"a.txt": "a"}))

    def test_a_photo_that_pillow_does_not_know(self, config):
        write(Path(config.dataset), {"b.heic": "", "b.txt": "b"})
        with pytest.raises(InputError, match=r"photos/b.heic: not an image that Pillow knows"):
            map_rows(config).inspect(config)

    def test_a_stream(self, config):
        config.streaming = True
        with pytest.raises(
            InputError, match=r"^data.streaming: .* is a folder of photos, which is not read as a stream"
        ):
            open_stream(config)


def test_check_data(config, capsys):
    def check() -> list[str]:
        argv = ["--data.dataset", config.dataset, "--data.resolution", "16"]
        with contextlib.suppress(SystemExit):
            check_data.main([*argv, "--model.pretrained_model_name_or_path", "builtin:tiny-stable-diffusion"])
        return [line.replace(config.dataset, "…") for line in capsys.readouterr().out.splitlines()]

    folder = Path(config.dataset)
    (folder / "other.txt").write_text("of no image")
    warnings = [
        "warning: …/other.txt: no image of that name beside it",
        "warning: …/cat.txt: more than one line, of which the first is the caption",
    ]
    row = "… row 2: …/in/side.v2.webp"
    assert check() == [*warnings, f"warning: {row}: an empty caption", "3 images and their captions: 3 warnings"]
    (folder / "in/side.v2.txt").unlink()
    error = f"error: {row}: the caption must be a string or a list of strings, got None"
    assert check() == [*warnings, error, "3 images and their captions: 1 error and 2 warnings"]
    (folder / "other.txt").unlink()
    (folder / "cat.txt").write_bytes(b"\xff")
    assert check()[:-1] == ["error: …/cat.txt: not UTF-8"]


@pytest.fixture
def photo_run(short_run, image_folder, tmp_path) -> list[str]:
    """A run with all that a folder of photos may have: repeats, captions of three kinds, tags and masks."""
    files = sorted(image_folder.glob("*.png"))
    for i, file in enumerate(files[:6]):
        folder = tmp_path / "photos" / ("3_sks shape" if i < 2 else "1_shape")
        folder.mkdir(parents=True, exist_ok=True)
        image = Image.open(file)
        image.save(folder / file.name)
        Image.linear_gradient("L").resize(image.size).save(folder / f"{file.stem}-masklabel.png")
        if i % 2:
            (folder / f"{file.stem}.txt").write_text("red, circle, small, shape")
    fields = {
        "data.dataset": tmp_path / "photos",
        "data.mask_column": "mask",
        "data.caption_prefix": "a ",
        "data.caption_suffix": " photo",
        "data.shuffle_tags": True,
        "data.keep_tags": 1,
        "data.tag_dropout": 0.3,
        "train.max_steps": 4,
        "data.center_crop": True,
        "data.cache_dir": tmp_path / "cache",
    }
    return last_wins([*short_run, *options(fields)])


def test_a_run_resumes_and_splits_exactly(photo_run, short_run, tmp_path):
    unbroken = train([*photo_run, "--output-dir", str(tmp_path / "unbroken"), "--train.keep_checkpoints", "0"])
    resume = [*photo_run, "--output-dir", str(tmp_path / "resumed"), "--resume-from", str(unbroken / "checkpoint-2")]
    resumed = train(resume)
    assert pipeline_bytes(resumed) == pipeline_bytes(unbroken)
    losses = [entry["loss"] for entry in metrics_without_times(unbroken)][2:]
    assert [entry["loss"] for entry in metrics_without_times(resumed)] == losses

    cached = train([*resume, "--output-dir", str(tmp_path / "cached"), "--data.cache_latents", "true"])
    assert [entry["loss"] for entry in metrics_without_times(cached)] == pytest.approx(losses, rel=1e-5)

    model = ["--model.pretrained_model_name_or_path", str(without_dropout(short_run, tmp_path))]
    runs = [
        train([*photo_run, *model, "--output-dir", str(tmp_path / n), "--train.gradient_accumulation_steps", n])
        for n in "12"
    ]
    whole, split = ([entry["loss"] for entry in metrics_without_times(run)] for run in runs)
    assert whole == pytest.approx(split, rel=1e-5)


def test_a_run_without_captions_stops_before_anything_is_written(short_run, config, tmp_path, capsys):
    (Path(config.dataset) / "cat.txt").unlink()
    argv = [*short_run, "--data.dataset", config.dataset]
    assert_one_line(argv, r"data.dataset: .*/cat.JPG has no caption \(1 of 3 images have none\): write cat.txt", capsys)
    assert not (tmp_path / "run").exists()


def test_masks_and_white_masks_in_a_run(photo_run, tmp_path):
    """All white is as without, to the last byte; and the mask of these photos does something."""
    argv = [*photo_run, "--train.max_steps", "2"]  # the first is made at a rate of 0
    masked, plain = (
        train([*argv, "--output-dir", str(tmp_path / name), "--data.mask_column", column])
        for name, column in (("masked", "mask"), ("plain", "null"))
    )
    for path in (tmp_path / "photos").rglob("*-masklabel.png"):
        Image.new("L", Image.open(path).size, 255).save(path)
    white = train([*argv, "--output-dir", str(tmp_path / "white")])
    assert pipeline_bytes(white) == pipeline_bytes(plain) != pipeline_bytes(masked)
    loss, of_all = (metrics_without_times(run)[0]["loss"] for run in (masked, plain))
    assert 0.3 < loss / of_all < 0.7


def test_prior_preservation_is_dreambooths_loss(short_run, image_folder, tmp_path):
    """loss = ½ (loss of the subject + prior_loss_weight · loss of its class), the means over each (Ruiz et al. 2022,
    arXiv:2208.12242), over as many samples of both."""
    for name in ("5_sks shape", "class"):
        (tmp_path / "data" / name).mkdir(parents=True)
    for i, file in enumerate(sorted(image_folder.glob("*.png"))):
        folder = "5_sks shape" if i < 4 else "class"
        Image.open(file).save(tmp_path / "data" / folder / file.name)
    (tmp_path / "subject").mkdir()
    (tmp_path / "data/5_sks shape").rename(tmp_path / "subject/5_sks shape")

    def sources(subject: float, prior: float) -> list[dict]:
        return [
            {"dataset": str(tmp_path / "subject"), "weight": 1, "loss_weight": subject},
            {"dataset": str(tmp_path / "data/class"), "default_caption": "shape", "weight": 1, "loss_weight": prior},
        ]

    def loss(subject: float, prior: float) -> float:
        fields = {"data.dataset": None, "data.sources": sources(subject, prior), "train.max_steps": 1}
        fields |= {
            "train.batch_size": 10,
            "data.caption_dropout": 0.0,
            "train.output_dir": tmp_path / f"{subject}-{prior}",
        }
        return metrics_without_times(train([*short_run, *options(fields)]))[0]["loss"]

    config = DataConfig(sources=[SourceConfig(**source) for source in sources(1, 0.4)], resolution=32)
    samples = Samples(data_of(map_rows(config)), config, 0, 10)  # an epoch
    batch = collate([samples[k] for k in range(10)])
    assert sorted(zip(batch["captions"], batch["weights"].tolist(), strict=True)) == [
        *[("shape", pytest.approx(0.4))] * 5,
        *[("sks shape", 1.0)] * 5,
    ]
    subject, prior, both = loss(1, 0), loss(0, 1), loss(1, 0.4)  # each a sum over ten, of which five have a weight
    mean_of_subject, mean_of_prior = 2 * subject, 2 * prior
    assert both == pytest.approx((mean_of_subject + 0.4 * mean_of_prior) / 2, rel=1e-5)


def test_links_are_followed_and_what_cannot_be_read_is_refused(tmp_path):
    config = write(tmp_path / "photos", {"a.png": 1, "a.txt": "a"})
    write(tmp_path / "elsewhere", {"b.png": 2, "b.txt": "b"})
    (tmp_path / "photos/more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "photos/again").symlink_to(tmp_path / "photos")  # a circle
    assert captions_of(config) == ["a", "b"]
    (tmp_path / "photos/twice").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "photos")
    assert captions_of(config) == ["a", "b", "b"]
    (tmp_path / "photos/metadata.csv").write_text("file_name,text\n")
    with pytest.raises(InputError, match=r"photos/metadata.csv: is not read; make it a metadata.jsonl, or write .txt"):
        captions_of(config)


def test_hidden_files_are_no_data(tmp_path):
    config = write(tmp_path / "photos", {"a.png": 1, "a.txt": "a"})
    (tmp_path / "photos/.cache").mkdir()
    (tmp_path / "photos/.cache/x.parquet").touch()
    assert captions_of(config) == ["a"]
