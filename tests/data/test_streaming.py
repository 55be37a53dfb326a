import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from helpers import data_of, encode, make_data, metrics_without_times, options, pipeline_bytes, train, write_tar
from PIL import Image

from difftrain_utils import processes
from difftrain_utils.config.data import DataConfig, SourceConfig
from difftrain_utils.config.model import ModelConfig
from difftrain_utils.config.text_to_image import TextToImageConfig
from difftrain_utils.config.training import TrainConfig
from difftrain_utils.data.fingerprint import inspect_splits
from difftrain_utils.data.lanes import Place
from difftrain_utils.data.remote import Reader, find_file
from difftrain_utils.data.rows import split_rows
from difftrain_utils.data.samples import Samples, collate, load_batches
from difftrain_utils.data.streaming import StreamedRows, files_digest, open_stream
from difftrain_utils.errors import FileError, InputError, RowError, RunError
from difftrain_utils.files import sha256sums

SIZES = (5, 3, 4, 1)  # rows of the files: an epoch of 13


def image_of(i: int) -> Image.Image:
    return Image.new("RGB", (20, 16), (10 * i, 255 - 10 * i, 7))


def numbers(sizes=SIZES) -> list[range]:
    """The rows of each file: 0 to 12 over all."""
    ends = list(itertools.accumulate(sizes, initial=0))
    return [range(first, last) for first, last in itertools.pairwise(ends)]


def write_parquet(folder: Path, image=image_of, sizes=SIZES) -> Path:
    folder.mkdir(parents=True)
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    for file, rows in enumerate(numbers(sizes)):
        images = {i: image(i) if isinstance(image(i), bytes) else encode(image(i)) for i in rows}
        columns = {"image": [{"bytes": images[i], "path": f"{i}.png"} for i in rows], "text": [str(i) for i in rows]}
        # row groups of two
        datasets.Dataset.from_dict(columns, features).to_parquet(folder / f"{file}.parquet", batch_size=2)
    return folder


def write_arrow(folder: Path, image=image_of, sizes=SIZES) -> Path:
    folder.mkdir(parents=True)
    for file, rows in enumerate(numbers(sizes)):
        data = make_data([image(i) for i in rows], [str(i) for i in rows])
        data.save_to_disk(folder / "saved")
        shutil.move(next((folder / "saved").glob("*.arrow")), folder / f"{file}.arrow")
        shutil.rmtree(folder / "saved")
    return folder


def write_tars(folder: Path, image=image_of, sizes=SIZES) -> Path:
    folder.mkdir(parents=True)
    for file, rows in enumerate(numbers(sizes)):
        samples = {f"{i:03d}": {"png": encode(image(i)), "txt": str(i).encode()} for i in rows}
        write_tar(folder / f"{file}.tar", samples)
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


def stream(folder: Path, **fields) -> StreamedRows:
    return open_stream(make_config(folder, **fields))


def captions(rows: StreamedRows, keys, batch_size: int = 4, seed: int = 0) -> list[str]:
    order = rows.order(seed, batch_size)
    return [rows[order[k]].captions for k in keys]


@pytest.fixture
def reads(monkeypatch) -> list[tuple[str, int]]:
    """(file, bytes) of each time that a part of a file is read."""
    found, original = [], Reader.read

    def read(self, file, start, stop):
        found.append((file.path, stop - start))
        return original(self, file, start, stop)

    monkeypatch.setattr(Reader, "read", read)
    return found


class TestOrder:
    @pytest.mark.parametrize("kind", WRITERS)
    def test_each_epoch_has_a_row_once_and_leaves_out_others_each_time(self, folders, kind):
        rows = stream(folders[kind])
        epochs = [captions(rows, range(first, first + 12)) for first in range(0, 60, 12)]
        assert all(len(set(epoch)) == 12 for epoch in epochs)
        assert len({({str(i) for i in range(13)} - set(epoch)).pop() for epoch in epochs}) > 1
        assert epochs == [captions(stream(folders[kind]), range(first, first + 12)) for first in range(0, 60, 12)]
        assert epochs[0] != captions(rows, range(12), seed=1)

    def test_any_sample_can_be_asked_for(self, folders):
        forwards = captions(stream(folders["parquet"]), range(40))
        rows = stream(folders["parquet"])
        order = rows.order(0, 4)
        for k in (3, 38, 39, 17, 0, 21, 20, 39):
            assert rows[order[k]].captions == forwards[k]

    def test_what_a_row_is_called_and_has(self, folders):
        rows = stream(folders["tar"])
        order = rows.order(0, 4)
        for k in range(12):
            row = rows[order[k]]
            assert row.name == f"{int(row.captions):03d}.png" and row.image["bytes"] == encode(
                image_of(int(row.captions))
            )

    def test_several_sources_share_a_batch_by_weight(self, folders):
        sources = [
            SourceConfig(str(folders["parquet"]), weight=3.0),
            SourceConfig(str(folders["tar"]), image_column="png", caption_column="txt", weight=1.0, loss_weight=2.0),
        ]
        config = DataConfig(sources=sources, resolution=16, streaming=True, shuffle_buffer=5)
        rows = open_stream(config)
        samples = Samples(data_of(rows, batch_size=4), config, 0, 1000)
        batches = [[samples[k] for k in range(first, first + 4)] for first in range(0, 104, 4)]
        assert all([sample["weight"] for sample in batch] == [1, 1, 1, 2] for batch in batches)
        found = rows.inspect(config)
        assert found["num_files"] == 8 and found["sha256"] not in [opened.sha256 for opened in rows.sources]


class TestReading:
    @pytest.mark.parametrize("kind", ["parquet", "arrow", "tar"])
    def test_a_process_reads_the_units_of_its_lanes_alone_and_once(self, tmp_path, kind, reads):
        """20 rows of 2 kB in each of 8 files. Four processes have one lane of four each."""
        noise = np.random.default_rng(0).integers(0, 256, (160, 26, 26, 3), np.uint8)
        folder = WRITERS[kind](tmp_path / "data", lambda i: Image.fromarray(noise[i]), (20,) * 8)
        size = sum(path.stat().st_size for path in folder.iterdir())
        rows = stream(folder, lanes=4, shuffle_buffer=10)
        for rank in range(4):
            own, order = stream(folder, lanes=4, shuffle_buffer=10), rows.order(0, 8)
            reads.clear()
            found = [own[order[k]].captions for k in range(160) if k % 8 // 2 == rank]
            own._pool.shutdown()
            ahead = (
                2.2 if kind == "arrow" else 1.45
            )  # arrow's units are whole files: the next epoch's first is read, too
            assert len(set(found)) == 40 and sum(count for _, count in reads) < ahead * size / 4

    @pytest.mark.parametrize("workers", [0, 1, 3])
    @pytest.mark.parametrize("processes", [1, 2, 4])
    def test_one_sequence_for_any_number_of_processes_and_workers(self, folders, processes, workers, expected):
        config = make_config(folders["parquet"], lanes=4, random_flip=True, num_workers=workers)
        config = TextToImageConfig(ModelConfig("m"), config, TrainConfig(batch_size=12, gradient_accumulation_steps=1))
        of_processes = []
        for rank in range(processes):
            samples = Samples(data_of(open_stream(config.data), batch_size=12), config.data, 0, 60)
            accelerator = SimpleNamespace(num_processes=processes, process_index=rank, device=torch.device("cpu"))
            of_processes.append(list(load_batches(accelerator, samples, SimpleNamespace(step=1), config)))
        for one, *parts in zip(expected, *of_processes, strict=True):
            assert one["keys"] == [key for part in parts for key in part["keys"]]
            assert one["captions"] == [caption for part in parts for caption in part["captions"]]
            assert torch.equal(one["pixel_values"], torch.cat([part["pixel_values"] for part in parts]))

    @pytest.fixture(scope="class")
    def expected(self, folders) -> list[dict]:
        """The batches after the first."""
        config = make_config(folders["parquet"], lanes=4, random_flip=True)
        samples = Samples(data_of(open_stream(config), batch_size=12), config, 0, 60)
        return [collate([samples[k] for k in range(first, first + 12)]) for first in range(12, 60, 12)]

    def test_units_that_were_found_are_remembered(self, folders, tmp_path, reads):
        fields = {"cache_dir": str(tmp_path)}
        first = captions(stream(folders["tar"], **fields), range(24))
        (kept,) = tmp_path.glob("*-units.safetensors")
        moment = kept.stat().st_mtime_ns
        assert captions(stream(folders["tar"], **fields), range(24)) == first
        assert kept.stat().st_mtime_ns == moment and len(list(tmp_path.iterdir())) == 1


class TestBadRows:
    @pytest.fixture
    def spoilt(self, tmp_path) -> Path:
        """Rows 2, 6 and 7 are damaged; the first row, which is read before training, is not."""
        folder = tmp_path / "parquet"
        return write_parquet(folder, lambda i: b"text" if i in (2, 6, 7) else image_of(i))

    def test_stop_names_the_row(self, spoilt):
        samples = Samples(data_of(stream(spoilt)), make_config(spoilt), 0, 100)
        k = next(k for k in range(13) if samples.rows[samples.order[k]].captions == "6")
        with pytest.raises(RowError, match=r"^6.png: not an image that Pillow knows"):
            samples[k]

    def test_skip_takes_the_next_readable_row_of_the_window(self, spoilt):
        config = make_config(spoilt, on_bad_row="skip")
        samples = Samples(data_of(open_stream(config)), config, 0, 1000)
        rows, order, num_skipped = open_stream(config), samples.order, 0
        for k in range(39):
            window, position = order[k]
            of_window = [rows[Place(window, i)].captions for i in range(len(window))]
            following = of_window[position:] + of_window[:position]
            expected = next((caption for caption in following if caption not in ("2", "6", "7")), None)
            if expected is None:
                with pytest.raises(RowError, match=r"nor can any of the \d rows that are shuffled with"):
                    samples[k]
                continue
            assert samples[k]["caption"] == expected
            assert samples[k]["skipped"] == (following[0] in ("2", "6", "7"))
            num_skipped += samples[k]["skipped"]
        assert num_skipped >= 6

    @pytest.mark.parametrize("kind", ["parquet", "arrow", "tar"])
    def test_a_damaged_file_stops_even_if_rows_are_skipped(self, folders, tmp_path, kind):
        """At the start, or where its units are known already, when it comes."""
        folder = shutil.copytree(folders[kind], tmp_path / "data")
        path = folder / f"2.{kind}"
        rows = stream(folder, on_bad_row="skip")
        content = path.read_bytes()
        path.write_bytes(content[: 2600 if kind == "tar" else -100])
        with pytest.raises(InputError, match=rf"^data.dataset: .*2.{kind}: |data.dataset: cannot load .*"):
            stream(folder, on_bad_row="skip")
        path.write_bytes(content[:200])
        samples = Samples(data_of(rows), rows.config, 0, 100)
        with pytest.raises(FileError, match=rf"2.{kind}: cannot read what comes after \d rows: has only"):
            [samples[k] for k in range(13)]

    def test_what_the_main_process_cannot_read_it_alone_reports(self, monkeypatch):
        outcome = [None, FileError("0.tar: cannot read what comes after 0 rows: gone")]
        monkeypatch.setattr(processes, "broadcast_object_list", lambda _: outcome)
        with pytest.raises(InputError, match=r"^0\.tar: cannot read") as raised:
            processes.on_main_process(SimpleNamespace(is_main_process=False), lambda: None)
        assert type(raised.value) is InputError  # which other processes are silent about

    def test_images_at_urls(self, tmp_path):
        """A row of an image folder on the hub has a URL instead of bytes."""
        import fsspec

        from difftrain_utils.media.image import read_bytes

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
            "train": {"dataset": config.dataset, "streaming": True, "num_files": 4, "sha256": rows.sources[0].sha256}
        }
        moved = shutil.copytree(folders["parquet"], tmp_path / "moved", copy_function=shutil.copyfile)
        assert stream(moved).inspect(config)["sha256"] == fingerprint["train"]["sha256"]
        shutil.rmtree(moved)
        write_parquet(moved, lambda i: image_of(7 if i == 6 else i))
        assert stream(moved).inspect(config)["sha256"] != fingerprint["train"]["sha256"]

    def test_what_the_file_system_knows_is_not_read(self, tmp_path):
        paths = [tmp_path / name for name in ("a", "b")]
        for path in paths:
            path.write_bytes(bytes(range(256)) * 1024)  # 256 KiB: the middle is not read

        def digest(paths: list[Path]) -> str:
            return files_digest([find_file(str(path)) for path in paths], Reader(tmp_path, 0))

        before = digest(paths)
        assert digest(paths[::-1]) != before
        for place, changes in ((0, True), (2**17, False), (2**18 - 1, True)):
            content = bytearray(bytes(range(256)) * 1024)
            content[place] ^= 1
            paths[1].write_bytes(content)
            assert (digest(paths) != before) == changes


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
def test_a_stopped_run_ends_with_the_bytes_of_an_unbroken_one(short_run, folders, tmp_path, kind):
    argv = [*short_run, "--data.dataset", str(folders[kind]), "--data.streaming", "--data.shuffle_buffer", "5"]
    argv += ["--data.num_workers", "1" if kind == "parquet" else "0", "--train.keep_checkpoints", "0"]
    if kind == "tar":
        argv += ["--data.image_column", "png", "--data.caption_column", "txt"]
        argv += options({"train.gradient_accumulation_steps": 2})
    unbroken = train([*argv, "--output-dir", str(tmp_path / "unbroken")])
    for step in (2, 4):  # in the middle of a window; after an epoch
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
    rows = stream(folders["parquet"])
    order = rows.order(0, 4)
    names = [rows[order[k]].name for k in range(4 * step - 4, 4 * step)]
    assert f"({', '.join(names)})" in str(error.value)


def test_epochs_of_a_stream(short_run, folders):
    argv = [*short_run, "--data.dataset", str(folders["parquet"]), "--data.streaming", "--data.epochs", "2"]
    run = train([*argv, "--train.max_steps", "null"])
    assert [entry["step"] for entry in metrics_without_times(run)][-1] == 6  # 2 x 12 samples / 4


def test_a_checkpoint_of_streams_without_lanes_is_not_gone_on_with(short_run, folders):
    argv = [*short_run, "--data.dataset", str(folders["parquet"]), "--data.streaming"]
    run = train([*argv, "--train.max_steps", "2"])
    path = run / "checkpoint-2/training_state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"place": {"stream": "x", "window": 1}}))
    digests = path.with_name("SHA256SUMS")
    digests.write_text(sha256sums(path.parent))
    with pytest.raises(InputError, match=r"^train.resume_from: .*checkpoint-2 is of data.streaming as it was before"):
        train([*argv, "--train.max_steps", "4", "--resume-from", "latest"])
