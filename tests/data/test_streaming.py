import io
import itertools
import json
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import torch
from helpers import data_of, encode, make_data, metrics_without_times, options, pipeline_bytes, train
from PIL import Image

from difftrain_utils.config.data import DataConfig
from difftrain_utils.config.model import ModelConfig
from difftrain_utils.config.text_to_image import TextToImageConfig
from difftrain_utils.data.fingerprint import inspect_splits
from difftrain_utils.data.rows import split_rows
from difftrain_utils.data.samples import Samples, collate
from difftrain_utils.data.streaming import StreamedRows, files_digest, open_stream
from difftrain_utils.errors import InputError, RowError, RunError

SIZES = (5, 3, 4, 1)  # rows of the files: an epoch of 13


def image_of(i: int) -> Image.Image:
    return Image.new("RGB", (20, 16), (10 * i, 255 - 10 * i, 7))


def numbers() -> list[range]:
    """The rows of each file: 0 to 12 over all."""
    ends = list(itertools.accumulate(SIZES, initial=0))
    return [range(first, last) for first, last in itertools.pairwise(ends)]


def write_parquet(folder: Path, image=lambda i: encode(image_of(i))) -> Path:
    folder.mkdir(parents=True)
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    for file, rows in enumerate(numbers()):
        columns = {"image": [{"bytes": image(i), "path": f"{i}.png"} for i in rows], "text": [str(i) for i in rows]}
        # row groups of two: a place may lie in the middle of one
        datasets.Dataset.from_dict(columns, features).to_parquet(folder / f"{file}.parquet", batch_size=2)
    return folder


def write_arrow(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for file, rows in enumerate(numbers()):
        data = make_data([image_of(i) for i in rows], [str(i) for i in rows])
        data.save_to_disk(folder / "saved")
        shutil.move(next((folder / "saved").glob("*.arrow")), folder / f"{file}.arrow")
        shutil.rmtree(folder / "saved")
    return folder


def write_tars(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for file, rows in enumerate(numbers()):
        with tarfile.open(folder / f"{file}.tar", "w") as tar:
            for i in rows:
                for kind, content in (("png", encode(image_of(i))), ("txt", str(i).encode())):
                    member = tarfile.TarInfo(f"{i:03d}.{kind}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return folder


def write_images(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for i in range(sum(SIZES)):
        image_of(i).save(folder / f"{i}.png")
    lines = [json.dumps({"file_name": f"{i}.png", "text": str(i)}) for i in range(sum(SIZES))]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


WRITERS = {"parquet": write_parquet, "arrow": write_arrow, "tar": write_tars, "images": write_images}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("streams")
    return {kind: write(root / kind) for kind, write in WRITERS.items()}


def make_config(folder: Path, **fields) -> DataConfig:
    columns = {"image_column": "png", "caption_column": "txt"} if next(folder.glob("*.tar"), None) else {}
    fields = {"resolution": 16, "streaming": True, "shuffle_buffer": 5} | columns | fields
    return DataConfig(dataset=str(folder), **fields)


def stream(folder: Path, seed: int = 0, **fields) -> StreamedRows:
    return open_stream(make_config(folder, **fields))


def captions(rows: StreamedRows, keys) -> list[str]:
    return [rows[k].captions for k in keys]


@pytest.fixture
def reads(monkeypatch) -> list[tuple[int, int]]:
    """(file, row from which it is read on, rows read) of each time that a file is opened."""
    opened, original = [], StreamedRows._read_file

    def read_file(self, index, row):
        opened.append([index, row, 0])
        for content in original(self, index, row):
            opened[-1][2] += 1
            yield content

    monkeypatch.setattr(StreamedRows, "_read_file", read_file)
    return opened


class TestOrder:
    @pytest.mark.parametrize("kind", WRITERS)
    def test_each_epoch_has_each_row_once(self, folders, kind):
        rows = stream(folders[kind])
        windows = [captions(rows, range(first, first + 5)) for first in range(0, 65, 5)]  # five epochs
        # windows of 5 and epochs of 13: sorted back by epoch, as far as windows lie in one
        assert sorted(itertools.chain(*windows)) == sorted([str(i) for i in range(13)] * 5)
        for epoch in range(5):
            inside = [w for i, w in enumerate(windows) if 13 * epoch <= 5 * i and 5 * i + 5 <= 13 * (epoch + 1)]
            assert inside and len(set(itertools.chain(*inside))) == 5 * len(inside)

    def test_a_window_is_a_shuffle_of_rows_that_follow_each_other_and_crosses_epochs(self, folders):
        rows = stream(folders["parquet"])
        unshuffled = captions(stream(folders["parquet"], shuffle_buffer=1), range(39))
        for epoch in range(3):  # whole files, in another order each time
            files = [[str(i) for i in file] for file in numbers()]
            order = [file for caption in unshuffled[13 * epoch :][:13] for file in files if file[0] == caption]
            assert list(itertools.chain(*order)) == unshuffled[13 * epoch :][:13]
        assert unshuffled[:13] != unshuffled[13:26]
        windows = [captions(rows, range(first, first + 5)) for first in range(0, 35, 5)]
        expected = [unshuffled[first : first + 5] for first in range(0, 35, 5)]
        assert [sorted(w) for w in windows] == [sorted(w) for w in expected]
        assert sum(w != e for w, e in zip(windows, expected, strict=True)) >= 6
        assert sorted(windows[2]) == sorted(unshuffled[10:13] + unshuffled[13:15])  # the end of an epoch in the middle

    def test_the_order_is_a_function_of_the_seed_and_stays_as_it_is(self, folders):
        assert captions(stream(folders["parquet"], 1), range(26)) == captions(stream(folders["parquet"], 1), range(26))
        assert captions(stream(folders["parquet"], 1), range(26)) != captions(stream(folders["parquet"]), range(26))
        # a run of another version has to go on with the same samples
        assert (
            " ".join(captions(stream(folders["parquet"]), range(20))) == "0 1 3 2 4 9 8 11 5 10 6 8 9 7 12 10 11 6 5 7"
        )

    def test_any_sample_can_be_asked_for(self, folders):
        forwards = captions(stream(folders["parquet"]), range(40))
        rows = stream(folders["parquet"])
        for k in (3, 38, 39, 17, 0, 21, 20, 39):
            assert rows[k].captions == forwards[k]

    def test_a_buffer_that_is_larger_than_the_data(self, folders):
        rows = captions(stream(folders["tar"], shuffle_buffer=30), range(60))
        assert {caption: rows[:30].count(caption) for caption in rows[:30]}.keys() == {str(i) for i in range(13)}
        assert sorted(rows[:30] + captions(stream(folders["tar"], shuffle_buffer=1), range(30, 39))) == sorted(
            [str(i) for i in range(13)] * 3
        )


class TestResume:
    @pytest.mark.parametrize("kind", WRITERS)
    @pytest.mark.parametrize("buffer", [1, 4, 5, 30])
    def test_from_any_sample(self, folders, kind, buffer):
        whole = stream(folders[kind], shuffle_buffer=buffer)
        expected = captions(whole, range(60))
        again = stream(folders[kind], shuffle_buffer=buffer)
        for k in range(0, 45, 4):
            place = json.loads(json.dumps(again.place(k)))
            resumed = stream(folders[kind], shuffle_buffer=buffer)
            resumed.load_place(place)
            assert resumed.place(k) == place
            assert captions(resumed, range(k, k + 15)) == expected[k : k + 15]
            assert captions(resumed, [0, k]) == [expected[0], expected[k]]  # what lies before is still there

    @pytest.mark.slow
    def test_it_reads_no_more_the_later_it_is(self, folders, reads):
        early = stream(folders["parquet"]).place(6)
        late = stream(folders["parquet"]).place(6004)
        assert late["epoch"] == 461 and early["epoch"] == 0
        for place, k in ((early, 6), (late, 6004)):
            rows = stream(folders["parquet"])
            rows.load_place(place)
            reads.clear()
            rows[k]
            assert sum(count for *_, count in reads) == 5  # one window
            assert reads[0][1] == place["row"] and len(reads) <= 4

    def test_going_on_opens_each_file_once_an_epoch(self, folders, reads):
        rows = stream(folders["parquet"])
        reads.clear()
        captions(rows, range(26))
        assert [file for file, *_ in reads[:4]] == sorted({0, 1, 2, 3}, key=[file for file, *_ in reads].index)
        assert all(first == 0 for _, first, _ in reads) and 26 <= sum(count for *_, count in reads) <= 30

    def test_the_place_in_another_stream_is_not_taken(self, folders, capsys):
        place = stream(folders["parquet"]).place(21)
        for seed, fields in ((1, {}), (0, {"shuffle_buffer": 6})):
            rows = stream(folders["parquet"], seed, **fields)
            capsys.readouterr()
            rows.load_place(place)
            assert "of another stream; this one is read from its beginning" in capsys.readouterr().err
            assert captions(rows, range(21, 30)) == captions(stream(folders["parquet"], seed, **fields), range(21, 30))


def loaded(samples: Samples, keys: range, **arguments) -> list[dict]:
    loader = torch.utils.data.DataLoader(samples, sampler=keys, collate_fn=collate, **arguments)
    return list(loader)


class TestSamples:
    def samples(self, folder: Path, **fields) -> Samples:
        config = make_config(folder, random_flip=True, **fields)
        return Samples(data_of(open_stream(config)), config, 0, 1000)

    @pytest.mark.parametrize("kind", WRITERS)
    def test_they_are_the_same_with_any_number_of_workers(self, folders, kind):
        batches = [
            loaded(self.samples(folders[kind]), range(4, 40), batch_size=4, num_workers=workers)
            for workers in (0, 1, 2)
        ]
        for one, *others in zip(*batches, strict=True):
            for other in others:
                assert other["keys"] == one["keys"] and other["captions"] == one["captions"]
                assert torch.equal(other["pixel_values"], one["pixel_values"])
                assert other["place"] == one["place"]
        captions_of_13 = [caption for batch in batches[2] for caption in batch["captions"]][22:35]  # samples 26 to 38
        assert len(batches[0]) == 9 and len(set(captions_of_13)) > 8

    def test_two_processes_share_them_out(self, folders):
        """As accelerate does with split_batches: the first half of each batch to one, the second to the other."""
        whole = loaded(self.samples(folders["tar"]), range(32), batch_size=8)
        halves = [
            loaded(self.samples(folders["tar"]), [k for k in range(32) if k % 8 // 4 == rank], batch_size=4)
            for rank in (0, 1)
        ]
        for batch, *parts in zip(whole, *halves, strict=True):
            assert batch["keys"] == [k for part in parts for k in part["keys"]]
            assert torch.equal(batch["pixel_values"], torch.cat([part["pixel_values"] for part in parts]))
            # the first process writes the place: it must not lie behind the next batch's first sample
            assert parts[0]["place"]["window"] <= (batch["keys"][-1] + 1) // 5

    def test_the_place_of_a_batch_is_enough_for_the_next(self, folders):
        batches = loaded(self.samples(folders["parquet"]), range(40), batch_size=4)
        for before, batch in itertools.pairwise(batches):
            samples = self.samples(folders["parquet"])
            samples.rows.load_place(before["place"])
            (again,) = loaded(samples, batch["keys"], batch_size=4)
            assert again["captions"] == batch["captions"] and torch.equal(again["pixel_values"], batch["pixel_values"])
            assert samples.names_of([batch["keys"][0]]) == self.samples(folders["parquet"]).names_of([batch["keys"][0]])


class TestBadRows:
    @pytest.fixture
    def spoilt(self, tmp_path) -> Path:
        """Rows 2, 6 and 7 are damaged; the first row, which is read before training, is not."""
        folder = tmp_path / "parquet"
        return write_parquet(folder, lambda i: b"text" if i in (2, 6, 7) else encode(image_of(i)))

    def test_stop_names_the_row(self, spoilt):
        samples = Samples(data_of(stream(spoilt)), make_config(spoilt), 0, 100)
        k = next(k for k in range(13) if samples.rows[k].captions == "6")
        with pytest.raises(RowError, match=r"^6.png: not an image that Pillow knows"):
            samples[k]

    def test_skip_takes_the_next_readable_row_of_the_window(self, spoilt):
        config = make_config(spoilt, on_bad_row="skip")
        samples = Samples(data_of(open_stream(config)), config, 0, 1000)
        rows = stream(spoilt, on_bad_row="skip")
        num_skipped = 0
        for first in range(0, 130, 5):
            window = captions(rows, range(first, first + 5))
            for position, caption in enumerate(window):
                expected = next(c for c in window[position:] + window[:position] if c not in ("2", "6", "7"))
                sample = samples[first + position]
                assert sample["caption"] == expected and sample["skipped"] == (caption in ("2", "6", "7"))
                num_skipped += sample["skipped"]
        assert num_skipped == 30

    def test_a_window_without_a_readable_row_stops(self, spoilt):
        config = make_config(spoilt, on_bad_row="skip", shuffle_buffer=1)
        samples = Samples(data_of(open_stream(config)), config, 0, 100)
        k = next(k for k in range(13) if samples.rows[k].captions == "6")
        with pytest.raises(
            RowError, match=r"^6.png: not an image .*; nor can any of the 1 rows that are shuffled with"
        ):
            samples[k]

    @pytest.mark.parametrize("kind", ["parquet", "arrow", "tar"])
    def test_a_damaged_file_stops_even_if_rows_are_skipped(self, folders, tmp_path, kind):
        folder = shutil.copytree(folders[kind], tmp_path / "data")
        order = captions(stream(folder, shuffle_buffer=1), range(13))
        # the columns are those of the first file, and the first row is read before training
        last = max((1, 2), key=lambda file: order.index(str(numbers()[file][0])))
        path = folder / f"{last}.{kind}"
        path.write_bytes(path.read_bytes()[: 2600 if kind == "tar" else -100])
        rows = stream(folder, on_bad_row="skip")
        samples = Samples(data_of(rows), rows.config, 0, 100)
        with pytest.raises(RowError, match=rf"{last}.{kind}: cannot read what comes after \d rows: "):
            [samples[k] for k in range(13)]

    def test_images_at_urls(self, tmp_path):
        """A row of an image folder on the hub has a URL instead of bytes."""
        import fsspec

        from difftrain_utils.data.rows import read_bytes

        fsspec.filesystem("memory").pipe("/cat.png", b"content")
        assert read_bytes({"bytes": None, "path": "memory://cat.png"}, "cat") == b"content"
        with pytest.raises(RowError, match=r"^dog: .*dog.png"):
            read_bytes({"bytes": None, "path": "memory://dog.png"}, "dog")


class TestFingerprint:
    def test_it_is_of_the_files(self, folders, tmp_path):
        config = make_config(folders["parquet"])
        rows = open_stream(config)
        fingerprint = inspect_splits(*split_rows(rows, config), config)
        assert fingerprint == {
            "train": {"dataset": config.dataset, "streaming": True, "num_files": 4, "sha256": rows.sha256}
        }
        moved = shutil.copytree(folders["parquet"], tmp_path / "moved", copy_function=shutil.copyfile)
        assert stream(moved).sha256 == rows.sha256
        shutil.rmtree(moved)
        write_parquet(moved, lambda i: encode(image_of(7 if i == 6 else i)))
        assert stream(moved).sha256 != rows.sha256

    def test_what_the_file_system_knows_is_not_read(self, tmp_path):
        paths = [tmp_path / name for name in ("a", "b")]
        for path in paths:
            path.write_bytes(bytes(range(256)) * 1024)  # 256 KiB: the middle is not read
        files = [str(path) for path in paths]
        before = files_digest(files)
        assert files_digest(files[::-1]) != before
        for place, changes in ((0, True), (2**17, False), (2**18 - 1, True)):
            content = bytearray(bytes(range(256)) * 1024)
            content[place] ^= 1
            paths[1].write_bytes(content)
            assert (files_digest(files) != before) == changes


class TestRefusals:
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            (
                {"validation_split": 0.1},
                r"data.validation_split: cannot go with streaming \(validation_dataset can\), got 0.1",
            ),
            ({"dataset": "builtin:shapes"}, "data.dataset: streaming is for folders and the hub, got 'builtin:shapes'"),
            ({"shuffle_buffer": 0}, "data.shuffle_buffer: must be at least 1, got 0"),
        ],
    )
    def test_settings(self, fields, message):
        data = replace(DataConfig("somewhere", streaming=True), **fields)
        with pytest.raises(InputError, match=message):
            TextToImageConfig(ModelConfig("builtin:tiny-stable-diffusion"), data).check()

    def test_data(self, folders, tmp_path):
        empty = tmp_path / "empty"
        empty.mkdir()
        no_rows = tmp_path / "no_rows"
        no_rows.mkdir()
        features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
        datasets.Dataset.from_dict({"image": [], "text": []}, features).to_parquet(no_rows / "0.parquet")
        spoilt = write_parquet(tmp_path / "spoilt", lambda i: b"text")
        no_caption = shutil.copytree(folders["images"], tmp_path / "no_caption")
        (no_caption / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "0"}\n{"file_name": "1.png"}\n')
        cut = shutil.copytree(folders["parquet"], tmp_path / "cut")
        (cut / "0.parquet").write_bytes(b"PAR1")
        for config, message in (
            (
                make_config(empty),
                r"data.dataset: .*empty has no metadata.jsonl \(and no parquet, arrow or tar files, and no images",
            ),
            (make_config(tmp_path / "none"), "data.dataset: cannot load '.*none', which is no folder here: "),
            (make_config(no_rows), "data.dataset: .*no_rows has no images"),
            (make_config(spoilt), r"\d+.png: not an image that Pillow knows"),
            (make_config(cut), "data.dataset: cannot load '.*cut': "),
            (
                make_config(no_caption),
                "data.caption_column: no 'text' in .*metadata.jsonl line 2; it has only file_name",
            ),
            (make_config(folders["parquet"], split="test"), "data.dataset: cannot load '.*parquet': .*test"),
            (
                make_config(folders["tar"], caption_column="text"),
                "data.caption_column: no column 'text' in .*tar; it has",
            ),
            (
                make_config(folders["parquet"], image_column="text"),
                "data.image_column: column 'text' of .* does not hold",
            ),
        ):
            with pytest.raises(InputError, match=message):
                open_stream(config)


@pytest.mark.parametrize("kind", ["parquet", pytest.param("tar", marks=pytest.mark.slow)])
def test_a_stopped_run_ends_with_the_bytes_of_an_unbroken_one(short_run, folders, tmp_path, reads, kind):
    argv = [*short_run, "--data.dataset", str(folders[kind]), "--data.streaming", "--data.shuffle_buffer", "5"]
    argv += ["--data.num_workers", "1" if kind == "parquet" else "0", "--train.keep_checkpoints", "0"]
    if kind == "tar":
        argv += ["--data.image_column", "png", "--data.caption_column", "txt"]
        argv += options({"train.gradient_accumulation_steps": 2})
    unbroken = train([*argv, "--output-dir", str(tmp_path / "unbroken")])
    for step in (2, 4):  # in the middle of a window; after an epoch
        place = json.loads((unbroken / f"checkpoint-{step}/training_state.json").read_text())["place"]
        assert place["window"] == (4 * step - 1) // 5 and place["epoch"] == (step == 4 and place["window"] * 5 >= 13)
        branch = tmp_path / f"branch-{step}"
        train([*argv, "--output-dir", str(branch), "--resume-from", str(unbroken / f"checkpoint-{step}")])
        assert pipeline_bytes(branch) == pipeline_bytes(unbroken)
        expected = [entry for entry in metrics_without_times(unbroken) if entry["step"] > step]
        assert metrics_without_times(branch) == expected
    assert json.loads((unbroken / "run_manifest.json").read_text())["data"]["train"]["num_files"] == 4


@pytest.mark.parametrize("workers", [0, 1])
def test_a_gradient_that_is_not_finite_is_reported_with_the_rows_of_its_step(
    short_run, folders, tmp_path, workers, monkeypatch
):
    monkeypatch.setattr("difftrain_utils.run.state.RUINED", torch.inf)  # the update would be blamed, and rightly
    argv = [*short_run, "--data.dataset", str(folders["parquet"]), "--data.streaming", "--data.shuffle_buffer", "5"]
    argv += options({"data.num_workers": workers, "optimizer.init_args.lr": 1e30, "lr_scheduler.num_warmup_steps": 0})
    with pytest.raises(RunError, match="is nan at step ") as error:
        train(argv)
    step = int(str(error.value).split("at step ")[1].split(",")[0])
    names = [stream(folders["parquet"])[k].name for k in range(4 * step - 4, 4 * step)]
    assert f"({', '.join(names)})" in str(error.value)
    place = json.loads((tmp_path / f"run/checkpoint-{step - 1}/training_state.json").read_text())["place"]
    assert place["window"] == max(4 * step - 5, 0) // 5
