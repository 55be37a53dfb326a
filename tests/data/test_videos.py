"""Videos as rows: folders, parquet, tar files and streams of them, and clips one after another."""

import contextlib
import importlib.util
import io
import json
import re
import wave
from types import SimpleNamespace

import datasets
import fsspec
import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from helpers import ROOT, data_of, encode, options, write_tar
from PIL import Image

from difftrain_utils.commands import check_data, generate, plan
from difftrain_utils.config import command_line
from difftrain_utils.config.config import require_of
from difftrain_utils.config.data import DataConfig
from difftrain_utils.config.text_to_video import TextToVideoConfig
from difftrain_utils.config.video_data import VideoDataConfig
from difftrain_utils.data.caches import describe_crops, load_caches
from difftrain_utils.data.clips import (
    ClipBuckets,
    count_short,
    fit_clips,
    fit_held_out,
    refuse_short,
    spread_clips,
    video_sizes,
)
from difftrain_utils.data.fingerprint import inspect_splits
from difftrain_utils.data.load import load_data
from difftrain_utils.data.photos import find_problems
from difftrain_utils.data.rows import MappedRows, map_rows
from difftrain_utils.data.samples import Samples, collate, scale_pixels
from difftrain_utils.data.streaming import open_stream
from difftrain_utils.errors import InputError, RowError
from difftrain_utils.families.load import load_family
from difftrain_utils.media.video import (
    FOR_BROWSERS,
    LOSSLESS,
    Header,
    check_length,
    lasting_names,
    library_versions,
    write_video,
)

FIELDS = {"num_frames": 5, "fps": 12.0, "height": 32, "width": 32}
LENGTHS = {"a.mp4": 12, "b.webm": 30, "sub/c.avi": 17}
STREAM = {"streaming": True, "shuffle_buffer": 4, "lanes": 1}


def film(name: str, num_frames: int) -> bytes:
    ways = {
        "mp4": FOR_BROWSERS,
        "webm": {"codec": "libvpx-vp9", "pix_fmt": "yuv420p", "format": "webm"},
        "avi": LOSSLESS,
    }
    frames, buffer = [Image.new("RGB", (48, 32), (8 * i, 128, 0)) for i in range(num_frames)], io.BytesIO()
    write_video(frames, 12, buffer, **ways[name.rpartition(".")[2]])
    return buffer.getvalue()


@pytest.fixture(scope="module")
def films() -> dict[str, bytes]:
    return {name: film(name, length) for name, length in LENGTHS.items()}


@pytest.fixture
def folder(films, tmp_path):
    """Videos of several kinds, and a still, with their captions."""
    lines = [{"file_name": name, "text": f"caption of {name}"} for name in (*films, "d.png")]
    (tmp_path / "films/sub").mkdir(parents=True)
    for name, content in (films | {"d.png": encode(Image.new("RGB", (40, 40), "red"))}).items():
        (tmp_path / "films" / name).write_bytes(content)
    (tmp_path / "films/metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path / "films"


def config_of(dataset, tmp_path, **fields) -> VideoDataConfig:
    config = VideoDataConfig(str(dataset), cache_dir=str(tmp_path / "cache"), **(FIELDS | fields))
    config.check(require_of(config, "data"))
    return config


def captions(rows: MappedRows) -> list[str]:
    return [rows[i].captions for i in range(len(rows))]


def test_a_folder_with_metadata(folder, tmp_path):
    """Of all that FFmpeg knows, whatever its ending; an image is a clip of one frame."""
    config = config_of(folder, tmp_path, num_frames=1)
    rows = map_rows(config)
    assert captions(rows) == [f"caption of {name}" for name in (*LENGTHS, "d.png")]
    assert rows[0].name == str(folder / "a.mp4") and not rows.has_masks
    assert list(lasting_names(rows.parts[0])) == [["a.mp4", "b.webm", "c.avi", "d.png"]]
    batch = collate([Samples(data_of(rows), config, 0, 8)[k] for k in range(8)])
    assert batch["pixel_values"].shape == (8, 3, 1, 32, 32) and batch["masks"] is None
    found = rows.inspect(config)
    assert found["num_videos"] == 4 and rows.inspect(config) == found
    (folder / "a.mp4").write_bytes((folder / "sub/c.avi").read_bytes())
    assert map_rows(config).inspect(config)["sha256"] != found["sha256"]


def test_a_folder_is_checked_again_for_longer_clips(films, tmp_path):
    """What is remembered of it holds for one length and rate."""
    (tmp_path / "films").mkdir()
    (tmp_path / "films/a.mp4").write_bytes(films["a.mp4"])
    found = map_rows(config := config_of(tmp_path / "films", tmp_path, default_caption="x")).inspect(config)
    for fields, short in (({"num_frames": 41}, "41 frames at 12 a"), ({"fps": 0.001}, "5 frames at 0.001 a")):
        longer = config_of(tmp_path / "films", tmp_path, default_caption="x", **fields)
        with pytest.raises(RowError, match=rf"a.mp4: 1.00 s, too short for {short} second, which take more t"):
            map_rows(longer).inspect(longer)
    assert map_rows(config).inspect(config) == found


def test_a_still_is_no_clip_of_several_frames(folder, tmp_path):
    for policy, error in (("stop", RowError), ("skip", None)):
        config = config_of(folder, tmp_path, on_bad_row=policy)
        samples = Samples(data_of(map_rows(config)), config, 0, 4)
        if error:
            with pytest.raises(error, match=r"d.png: an image, which is one frame and no 5; data.bu"):
                [samples[k] for k in range(4)]
        else:
            assert [samples[k]["skipped"] for k in range(4)].count(True) == 1


def test_captions_lie_beside_videos_and_stills(films, tmp_path):
    """As beside photos, and kohya's folders repeat them."""
    for name, content in (films | {"d.png": encode(Image.new("RGB", (40, 40), "red"))}).items():
        path = tmp_path / "films/2_of a dog" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        path.with_suffix(".txt").write_text(f"caption of {name}\nnot read")
    config = config_of(tmp_path / "films", tmp_path, num_frames=1)
    (rows,) = map_rows(config).parts
    assert captions(rows) == [f"caption of {name}" for name in ("a.mp4", "b.webm", "d.png", "sub/c.avi")]
    assert rows.repeats == 2 and rows[0].name == str(tmp_path / "films/2_of a dog/a.mp4")
    batch = scale_pixels(collate([Samples(data_of(MappedRows([rows])), config, 0, 8)[k] for k in range(8)]))
    assert batch["pixel_values"].shape == (8, 3, 1, 32, 32) and batch["pixel_values"].dtype == torch.float32
    folder = tmp_path / "films/2_of a dog"
    config = config_of(folder, tmp_path, num_frames=1)
    (folder / "a.txt").rename(folder / "e.txt")
    (folder / "b-masklabel.png").write_bytes(b"")
    assert [message.removeprefix(f"{folder}/") for _, message in find_problems(folder, "video")] == [
        "b-masklabel.png: not used, videos have no masks",
        "e.txt: no video of that name beside it",
        *(f"{name}.txt: more than one line, of which the first is the caption" for name in ("b", "d", "sub/c")),
    ]
    with pytest.raises(InputError, match=r"a.mp4 has no caption \(1 of 4 videos have none\): write a.txt .* for all$"):
        map_rows(config)
    assert captions(map_rows(config_of(folder, tmp_path, default_caption="a dog")))[0] == "a dog"
    (folder / "d.png").unlink()
    with pytest.raises(InputError, match=r"^data.dataset: .* holds videos and no images: train with train_text_to_v"):
        map_rows(DataConfig(str(folder)))
    with pytest.raises(InputError, match=r"^data.streaming: .* is a folder of videos without a metadata.jsonl, which"):
        open_stream(config_of(folder, tmp_path, streaming=True, shuffle_buffer=4, lanes=1))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"has no metadata.jsonl \(and no parquet, .* and no videos: .mp4, "):
        map_rows(config_of(tmp_path / "empty", tmp_path))


def test_what_cannot_be_read_is_named_or_skipped_and_counted(films, tmp_path):
    """A video that is short, cut off, empty or none, a sound, and one that is not there."""
    sound = io.BytesIO()
    with wave.open(sound, "wb") as file:
        file.setnchannels(1), file.setsampwidth(2), file.setframerate(8000)
        file.writeframes(bytes(16000))
    film = films["sub/c.avi"]
    bad = {
        "cut.avi": (film[: len(film) // 3], r"(cut off, it ends before|no video that FFmpeg can read)"),
        "empty.mp4": (b"", "no video that FFmpeg can read"),
        "junk.mp4": (b"junk" * 99, "no video that FFmpeg can read"),
        "short.avi": (films["a.mp4"], r"1.00 s, too short for 17 frames at 12 a second"),
        "sound.mp4": (sound.getvalue(), "a file without moving pictures"),
    }
    for name, content in ({name: content for name, (content, _) in bad.items()} | {"z.avi": film}).items():
        (tmp_path / name).write_bytes(content)
    config = config_of(tmp_path, tmp_path.with_name("other"), num_frames=17, default_caption="x")
    rows = map_rows(config)
    for index, (name, (_, reason)) in enumerate(bad.items()):
        with pytest.raises(RowError, match=rf"^{tmp_path}/{name}: {reason}") as error:
            Samples(data_of(rows.take(np.array([index]))), config, 0, 1)[0]
        assert "\n" not in str(error.value)
    skipping = config_of(tmp_path, tmp_path.with_name("other"), num_frames=17, default_caption="x", on_bad_row="skip")
    samples = Samples(data_of(rows), skipping, 0, 6)
    assert sum(samples[k]["skipped"] for k in range(6)) == len(bad)
    known = len(bad) - 1  # what is cut off has the header of what is whole
    assert known <= count_short(rows, skipping) <= len(bad) and count_short(rows, config) == 0


@pytest.mark.parametrize("noun", ["videos", "held-out videos"])
def test_where_all_would_be_skipped_there_is_no_run(folder, films, tmp_path, capsys, noun):
    """Which is said before anything is written, and not when the first of them is due."""
    (tmp_path / "short").mkdir()
    (tmp_path / "short/a.mp4").write_bytes(films["a.mp4"])
    fields = {"dataset": folder, "validation_dataset": tmp_path / "short", "default_caption": "x"}
    fields |= {"on_bad_row": "skip", "cache_dir": tmp_path / "cache", "fps": 12, "height": 32, "width": 32}
    fields |= {"num_frames": 13} if noun == "held-out videos" else {"num_frames": 41}
    model = {"model.pretrained_model_name_or_path": "builtin:tiny-wan", "model.max_sequence_length": 40}
    argv = options(model | {f"data.{field}": value for field, value in fields.items()})
    config, accelerator = command_line.parse_config(TextToVideoConfig, argv), Accelerator(cpu=True)
    family, number = load_family(config), {"videos": 4, "held-out videos": 1}[noun]
    why = f"unreadable or too short for {config.data.num_frames} frames at 12 a second; none is left"
    with pytest.raises(InputError, match=f"^data.on_bad_row: {number} of {number} {noun} are skipped, {why}$"):
        load_data(accelerator, family, config)
    if noun == "held-out videos":
        assert "data.on_bad_row: 2 of 4 videos are skipped, unreadable or too short for 13 f" in capsys.readouterr().out
        config.train.eval_every = 0
        assert len(load_data(accelerator, family, config).validation_rows) == 1, "what is not looked at may be short"


def test_a_clip_is_a_function_of_the_seed_and_the_sample(folder, tmp_path):
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "b.webm", "text": "x"}))
    config = config_of(folder, tmp_path, random_flip=True)
    samples, again = (Samples(data_of(map_rows(config)), config, 0, 16) for _ in range(2))
    clips = [samples[k]["pixel_values"] for k in range(16)]
    assert all(torch.equal(again[k]["pixel_values"], clips[k]) for k in (15, 3, 8))
    first = {clip[0, 0, 0, 0].item() for clip in clips}
    assert len(first) > 8, "the windows begin at many places"
    assert all((clip[0].float().mean((1, 2)).diff() - 8).abs().max() < 2.6 for clip in clips), "frame by frame"


def test_what_is_wrong_with_a_folder(folder, tmp_path):
    with pytest.raises(InputError, match=r'metadata.jsonl line 1: needs a "film_file_name", got '):
        map_rows(config_of(folder, tmp_path, video_column="film"))
    (folder / "a.mp4").unlink()
    with pytest.raises(InputError, match=r"metadata.jsonl line 1: no such file: a.mp4$"):
        map_rows(config_of(folder, tmp_path))
    plain = tmp_path / "plain"
    plain.mkdir()
    datasets.Dataset.from_dict({"video": [1], "text": ["x"]}).to_parquet(plain / "train.parquet")
    with pytest.raises(InputError, match=r"^data.video_column: column 'video' of .* does not hold videos, but Value"):
        map_rows(config_of(plain, tmp_path))


def write_parquet(path, films):
    columns = {"video": [{"bytes": content, "path": name} for name, content in films.items()], "text": [*films]}
    features = datasets.Features({"video": datasets.Video(decode=False), "text": datasets.Value("string")})
    datasets.Dataset.from_dict(columns, features).to_parquet(path)


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_with_the_bytes_of_videos(films, tmp_path, streaming):
    (tmp_path / "parquet").mkdir()
    write_parquet(tmp_path / "parquet/train.parquet", films)
    fields = STREAM if streaming else {}
    config = config_of(tmp_path / "parquet", tmp_path, **fields)
    rows = open_stream(config) if streaming else map_rows(config)
    samples = Samples(data_of(rows), config, 0, 3)
    assert sorted(samples[k]["caption"] for k in range(3)) == sorted(films)
    assert samples[0]["pixel_values"].shape == (3, 5, 32, 32)


def test_a_stream_of_a_folder_and_of_tar_files(films, folder, tmp_path):
    (tmp_path / "tar").mkdir()
    samples = {f"{i:03d}": {"mp4": films["a.mp4"], "txt": f"caption {i}".encode()} for i in range(3)}
    write_tar(tmp_path / "tar/train.tar", samples)
    of_tar = config_of(tmp_path / "tar", tmp_path, **STREAM, video_column="mp4", caption_column="txt")
    samples = Samples(data_of(open_stream(of_tar)), of_tar, 0, 3)
    assert sorted(samples[k]["caption"] for k in range(3)) == ["caption 0", "caption 1", "caption 2"]
    of_folder = config_of(folder, tmp_path, **STREAM, num_frames=1)
    samples = Samples(data_of(open_stream(of_folder)), of_folder, 0, 4)
    assert {samples[k]["caption"] for k in range(4)} == {f"caption of {name}" for name in (*LENGTHS, "d.png")}


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_a_stream_of_another_machine(films, tmp_path, kind):
    file, fields = tmp_path / kind, STREAM
    if kind == "parquet":
        write_parquet(file, films)
    else:
        samples = {f"{i}": {"mp4": films["a.mp4"], "txt": name.encode()} for i, name in enumerate(films)}
        write_tar(file, samples)
        fields = STREAM | {"video_column": "mp4", "caption_column": "txt"}
    fsspec.filesystem("memory").pipe(f"/videos-{kind}/train.{kind}", file.read_bytes())
    config = config_of(f"memory://videos-{kind}", tmp_path, **fields)
    samples = Samples(data_of(open_stream(config)), config, 0, 3)
    assert sorted(samples[k]["caption"] for k in range(3)) == sorted(films)
    assert samples[0]["pixel_values"].shape == (3, 5, 32, 32)


def test_what_a_metadata_jsonl_of_another_machine_names_is_refused(films, tmp_path):
    lines = [json.dumps({"file_name": name, "text": name}) for name in films]
    fsspec.filesystem("memory").pipe("/videos/metadata.jsonl", "\n".join(lines).encode())
    message = r"^data.dataset: memory://.* has no files that end in .*; a folder with a met"
    with pytest.raises(InputError, match=message):
        open_stream(config_of("memory://videos", tmp_path, **STREAM))


def test_clips_one_after_another_are_rows(folder, tmp_path, capsys):
    """Each with all that fits of a video; a still, or what is too short, is a bad row once. What is left out, 4 of 60
    frames, is said."""
    config = config_of(folder, tmp_path, window="all", center_crop=True, on_bad_row="skip")
    accelerator = Accelerator(cpu=True)
    rows = spread_clips(accelerator, map_rows(config), config)
    told = "data.window all: 12 windows of 4 videos; 7% of their length is left out, the rests after the last windows"
    assert capsys.readouterr().out.strip() == told
    assert [(rows[i].captions[-5:], rows[i].window) for i in range(len(rows))] == [
        *(("a.mp4", window) for window in range(12 // 5)),
        *((".webm", window) for window in range(30 // 5)),
        *(("c.avi", window) for window in range(17 // 5)),
        ("d.png", 0),
    ]
    samples = Samples(data_of(rows), config, 0, 24)
    sample = next(samples[k] for k in range(24) if samples.order[k] == 10)  # the last of c.avi
    assert sample["pixel_values"][0, :, 0, 0].tolist() == [80, 88, 96, 104, 112]
    assert rows.inspect(config)["num_videos"] == len(rows) == 12
    with pytest.raises(RowError, match=r"a.mp4: 12 frames at 12 a second, too short for 60 \(data.on_bad_row skip"):
        spread_clips(accelerator, map_rows(config), config_of(folder, tmp_path, window="all", num_frames=60))


def test_each_video_has_the_bucket_of_most_frames_and_of_its_shape(folder, tmp_path):
    """Stills and videos in one run, each batch of one size."""
    buckets = [[1, 32, 32], [9, 32, 32], [9, 32, 64], [17, 32, 32], [29, 32, 64]]
    config = config_of(folder, tmp_path, buckets=buckets, on_bad_row="skip")
    (folder / "e.mp4").write_bytes(b"junk")
    lines = (
        (folder / "metadata.jsonl").read_text() + "\n" + json.dumps({"file_name": "e.mp4", "text": "caption of e.mp4"})
    )
    (folder / "metadata.jsonl").write_text(lines)
    rows = map_rows(config)
    found = ClipBuckets(video_sizes(rows, config), config.buckets, 1)
    sizes = [None if found.of_row[i] < 0 else found.size_of(i) for i in range(len(rows))]
    assert sizes == [(9, 32, 64), (29, 32, 64), (17, 32, 32), (1, 32, 32), None]
    assert found.sizes == sorted(map(tuple, buckets[:1] + buckets[2:])), "a bucket without a batch is left out"
    assert found.describe_sizes() == (
        "in 4 sizes: 1 of 1 frame of 32x32, 1 of 9 frames of 32x64, 1 of 17 frames of 32x32, 1 of 29 frames of 32x64"
    )
    one_size = ClipBuckets(np.full((6, 3), 64), [(9, 64, 64)], 4)
    assert one_size.describe_sizes() == "in 1 size: 9 frames of 64x64" and one_size.remainder == 2
    assert ClipBuckets(video_sizes(rows, config), config.buckets, 2).counts.min() >= 2
    run = SimpleNamespace(data=config, train=SimpleNamespace(batch_size=1))
    family = SimpleNamespace(check_frames=lambda *_: None, check_size=lambda *_: None)
    kept, buckets = fit_clips(Accelerator(cpu=True), family, rows, run)
    assert captions(kept) == captions(rows)[:4]
    samples = Samples(data_of(kept, buckets=buckets), config, 0, 8)
    shapes = {samples.order[k]: tuple(samples[k]["pixel_values"].shape[1:]) for k in range(8)}
    assert shapes == dict(enumerate(sizes[:4]))
    with pytest.raises(RowError, match=r"a.mp4: 12 frames at 12 a second, too short for 13 \(data.on_bad_row skip"):
        config = config_of(folder, tmp_path, buckets=[[13, 32, 32]])
        refuse_short(rows, np.array([[12, 32, 48]]), config)


def test_sizes_are_remembered_of_a_rate_and_of_what_read_them(folder, tmp_path, monkeypatch):
    """23.976 is not 24000 / 1001, and another FFmpeg may read what this one cannot."""
    film = (folder / "a.mp4").read_bytes()
    (folder / "a.mp4").write_bytes(b"junk")
    configs = [config_of(folder, tmp_path, fps=fps, on_bad_row="skip") for fps in (23.976, 24000 / 1001)]
    found = [video_sizes(map_rows(config), config) for config in configs]
    assert len(list((tmp_path / "cache").rglob("*-videos-*.npy"))) == 2 and not found[0][0].any()
    newer = library_versions() | {"libavcodec": (999, 0, 0)}
    monkeypatch.setattr("difftrain_utils.data.clips.library_versions", lambda: newer)
    monkeypatch.setattr("difftrain_utils.media.video.open_file", lambda *_: contextlib.nullcontext(io.BytesIO(film)))
    assert video_sizes(map_rows(configs[0]), configs[0])[0].tolist() == [24, 32, 48]


def test_held_out_videos_have_sizes_that_are_trained_at(folder, tmp_path, capsys):
    config = config_of(folder, tmp_path, buckets=[[5, 32, 32], [17, 32, 32]], on_bad_row="skip")
    trained = ClipBuckets(np.full((3, 3), 32), config.buckets, 1)  # of the most frames alone
    rows = fit_held_out(Accelerator(), map_rows(config), trained, config)
    assert captions(rows) == ["caption of b.webm", "caption of sub/c.avi"]
    assert [rows.buckets.size_of(row) for row in range(2)] == [(17, 32, 32)] * 2
    assert "2 of 4 held-out videos are left out, unreadable or of fewer than 17 frames" in capsys.readouterr().out
    with pytest.raises(
        InputError, match=r"^data.buckets: no held-out video has 17 frames, the fewest that are trained"
    ):
        fit_held_out(Accelerator(), map_rows(config).take(np.array([0, 3])), trained, config)


def test_the_builtin_set_is_drawn_at_the_runs_size(tmp_path, monkeypatch):
    monkeypatch.setattr("difftrain_utils.data.videos.NUM_MOVING_SHAPES", 6)
    config = config_of("builtin:moving-shapes", tmp_path)
    rows = map_rows(config)
    assert captions(rows)[0] == "a red circle moving left" and len(rows) == 6
    assert Samples(data_of(rows), config, 0, 1)[0]["pixel_values"].shape == (3, 5, 32, 32)
    with pytest.raises(
        InputError, match=r"^data.dataset: no such builtin: 'builtin:shapes'; there is builtin:moving-s"
    ):
        map_rows(config_of("builtin:shapes", tmp_path))
    with pytest.raises(InputError, match=r"^data.height: builtin:moving-shapes is square, got 32 x 48$"):
        map_rows(config_of("builtin:moving-shapes", tmp_path, width=48))


@pytest.mark.parametrize(("name", "window"), [("tiny-wan", "middle"), ("tiny-wan-i2v", "start"), ("tiny-ltx", "all")])
def test_latents_and_prompts_from_caches_are_those_of_the_encoders(folder, tmp_path, name, window):
    size = {"num_frames": 5, "fps": 12, "height": 32, "width": 32}
    fields = {"dataset": folder, "window": window, "center_crop": True, "random_flip": True, "on_bad_row": "skip"}
    fields |= size | {"cache_latents": True, "cache_text": True, "cache_dir": tmp_path / "cache"}
    length = 512 if name == "tiny-wan-i2v" else 40
    argv = options({"model.pretrained_model_name_or_path": f"builtin:{name}", "model.max_sequence_length": length} | {
        f"data.{field}": value for field, value in fields.items()})  # fmt: skip
    config, accelerator = command_line.parse_config(TextToVideoConfig, argv), Accelerator(cpu=True)
    family = load_family(config)
    data = load_data(accelerator, family, config)
    caches = load_caches(accelerator, family, data, inspect_splits(data.rows, None, config.data), config)
    plain, cached = Samples(data, config.data, 0, 8), Samples(data, config.data, 0, 8, caches)
    keys = [k for k in range(8) if not plain[k]["skipped"]][:4]
    batches = [scale_pixels(collate([samples[k] for k in keys])) for samples in (cached, plain)]
    encoded = [family.encode(batch, 0) for batch in batches]
    (latents, conditioning), (their_latents, their_conditioning) = encoded
    torch.testing.assert_close(latents, their_latents, rtol=1e-5, atol=1e-5)  # a clip alone rounds otherwise than four
    embeds, theirs = (given["prompt_embeds"] * given["prompt_embeds_mask"][..., None] for given in
                      (conditioning, their_conditioning))  # fmt: skip
    for first in conditioning.keys() - {"prompt_embeds", "prompt_embeds_mask"}:
        torch.testing.assert_close(conditioning[first], their_conditioning[first], rtol=1e-5, atol=1e-5)
    assert conditioning.keys() == their_conditioning.keys() and ("image_embeds" in conditioning) == (length == 512)
    assert embeds.shape[1] < 40 and torch.equal(embeds, theirs[:, : embeds.shape[1]])
    assert not theirs[:, embeds.shape[1] :].any()
    assert {cached[k]["key"]: cached[k]["skipped"] for k in range(8)} == {k: plain[k]["skipped"] for k in range(8)}


def test_the_name_of_a_cache_has_all_that_decides_its_clips(tmp_path, monkeypatch):
    """The window, frames a second, size and FFmpeg's libraries."""

    def key(**fields) -> str:
        config = config_of("films", tmp_path, **{"window": "middle", "center_crop": True} | fields)
        return json.dumps(describe_crops(SimpleNamespace(buckets=None), "of the data", config, {}))

    others = ({"window": "start"}, {"fps": 8.0}, {"num_frames": 9}, {"height": 48}, {"width": 48})
    found = [key(), *(key(**fields) for fields in others)]
    newer = library_versions() | {"libavcodec": (999, 0, 0)}
    monkeypatch.setattr("difftrain_utils.media.video.library_versions", lambda: newer)
    assert len({*found, key()}) == len(found) + 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_frames": 0}, r"^data.num_frames: must be from 1 to 16384"),
        ({"fps": 0}, r"^data.fps: must be above 0"),
        (
            {"cache_latents": True, "center_crop": True},
            r"^data.cache_latents: needs a data.window that is not random \(one clip",
        ),
        ({"buckets": [[5, 32]]}, r"^data.buckets: must be sizes \[frames, height, width\]"),
        ({"buckets": [[5, 32, 32], [5, 64, 64]]}, r"^data.buckets: must have different frames or aspect ratios"),
        ({"streaming": True, "window": "all", "dataset": "films"}, r"^data.window: cannot go with data.streaming"),
    ],
)
def test_fields_that_cannot_be(fields, message, tmp_path):
    with pytest.raises(InputError, match=message):
        config_of(fields.pop("dataset", "builtin:moving-shapes"), tmp_path, **fields)


@pytest.mark.parametrize("command", ["check-data", "plan", "generate"])
def test_without_pyav_commands_say_so(command, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *of: None if name == "av" else find(name, *of))
    monkeypatch.chdir(tmp_path)
    fields = {"model.pretrained_model_name_or_path": "builtin:tiny-wan", "data.dataset": "builtin:moving-shapes"}
    argv = options(fields | {f"data.{name}": value for name, value in FIELDS.items()})
    calls = {"check-data": lambda: check_data.main(argv)}
    calls["plan"] = lambda: plan.main(["--gpus", "1", "--gpu", "h100", *argv])
    calls["generate"] = lambda: generate.main(["builtin:tiny-wan", "a red circle", "--num-frames", "5"])
    culprit = "--output generated.mp4" if command == "generate" else "data"
    with pytest.raises(InputError, match=rf"^{culprit}: av is not installed \(pip install "):
        calls[command]()


def test_check_data_says_what_is_wrong_and_what_videos_are(folder, tmp_path, capsys):
    (folder / "b.webm").write_bytes(b"nothing")
    with (folder / "metadata.jsonl").open("a") as lines:
        lines.write("\n" + json.dumps({"file_name": "a.mp4", "text": ""}))
    fields = {"data.dataset": folder, "model.pretrained_model_name_or_path": "builtin:tiny-wan"}
    with pytest.raises(SystemExit) as stopped:
        check_data.main(options(fields | {f"data.{name}": value for name, value in (FIELDS | {"width": 64}).items()}))
    out = capsys.readouterr().out
    assert stopped.value.code == 2
    metadata = folder / "metadata.jsonl"
    assert f"error: {metadata} line 5: a.mp4: the same file as in line 1; several captions of a video go" in out
    assert f"error: {metadata} line 2: b.webm: " in out
    assert f"error: {metadata} line 4: d.png: an image, which is one frame and no 5" in out
    assert f"warning: {metadata} line 1: a.mp4: 48 × 32 pixels, to be enlarged to 64 × 32" in out
    assert f"{folder}: 3 videos of 1 to 1.42 s (median 1), 12 frames a second, 48x32 pixels; 1 image\n" in out


@pytest.mark.parametrize("name", ["wan21_lora", "ltx_lora"])
def test_the_configs_say_how_long_videos_have_to_be(name):
    """81 frames at 16 a second are more than 5 s: the last of them begins there."""
    content = (ROOT / f"configs/{name}.yaml").read_text()
    bound, seconds = re.search(r"(at least|more than)[\s#]+(\d+) seconds", content).groups()
    config = VideoDataConfig(**yaml.safe_load(content)["data"])
    check_length(Header(int(seconds) + 0.01 * (bound == "more than"), 480, 832), "a.mp4", config)
    if bound == "more than":
        with pytest.raises(RowError):
            check_length(Header(float(seconds), 480, 832), "a.mp4", config)
