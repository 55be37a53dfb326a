import io
import resource

import av
import numpy as np
import pytest
import soundfile
import soxr
import torch
from PIL import Image

from difftrain_utils.config.audio_data import AudioDataConfig
from difftrain_utils.errors import RowError, RunError
from difftrain_utils.media.audio import (
    MIDDLE,
    Place,
    Row,
    Sound,
    check,
    describe_found,
    find_problems,
    place,
    read,
    read_header,
    read_window,
    save,
)

RATE, LENGTH = 44100, 5000
FIELDS = {"waveform_length": LENGTH, "sampling_rate": RATE}
CONFIG = AudioDataConfig("memory", **FIELDS)
KINDS = [
    *(("WAV", "PCM_16"), ("WAV", "FLOAT"), ("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("MP3", "MPEG_LAYER_III")),
    *(
        ("WAVEX", "PCM_24"),
        ("WAV", "ALAW"),
        ("WAV", "MS_ADPCM"),
        ("AIFF", "PCM_24"),
        ("AU", "ULAW"),
        ("CAF", "ALAC_20"),
    ),
]
VARIABLE = {"global_quality": str(4 * 118), "flags": "+qscale"}  # LAME's V4


def samples_of(seconds: float, channels: int = 2, rate: int = RATE) -> np.ndarray:
    """Sweeps in noise, (samples, channels): what is elsewhere is not alike."""
    times = np.arange(int(rate * seconds) + 777) / rate
    noise = np.random.default_rng(0).standard_normal((len(times), channels))
    sweeps = np.stack([np.sin(2 * np.pi * (200 + 90 * times) * (times + number)) for number in range(channels)], 1)
    return (0.4 * sweeps + 0.05 * noise).astype(np.float32)


def sound(samples: np.ndarray, rate: int = RATE, format: str = "WAV", subtype: str = "FLOAT") -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=format, subtype=subtype)
    return buffer.getvalue()


def foreign(
    samples: np.ndarray, codec: str = "libmp3lame", rate: int = RATE, quality: dict[str, str] = VARIABLE, **muxer: str
) -> bytes:
    """By FFmpeg."""
    buffer, layout = io.BytesIO(), "stereo" if samples.shape[1] == 2 else "mono"
    format = {"libmp3lame": "mp3", "libopus": "ogg", "aac": "ipod", "flac": "flac"}[codec]
    with av.open(buffer, "w", format=format, options=muxer) as container:
        stream = container.add_stream(codec, rate=rate, layout=layout, options=quality)
        made = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples.T), format="fltp", layout=layout)
        made.sample_rate = rate
        resampler = av.AudioResampler(stream.codec_context.format, layout, rate, stream.codec_context.frame_size)
        for frame in (*resampler.resample(made), *resampler.resample(None), None):
            container.mux(stream.encode(frame))
    return buffer.getvalue()


def with_picture(content: bytes, length: int = 100_000) -> bytes:
    """An MP3 with a tag of so many bytes before it, and those that it had after that."""
    size = bytes(length >> shift & 0x7F for shift in (21, 14, 7, 0))
    return b"ID3\3\0\0" + size + b"APIC" + np.random.default_rng(0).bytes(length - 4) + content


def without_length() -> bytes:
    """An MP3 that has in a later frame what would say its length in the first."""
    content = foreign(samples_of(4), write_xing="0")
    return content[:2000] + b"Info" + content[2004:]


FOREIGN = {
    "MP3 of a variable bit rate": lambda: foreign(samples_of(4)),
    "MP3 with a picture": lambda: with_picture(foreign(samples_of(4))),
    "MP3 with two tags": lambda: with_picture(with_picture(foreign(samples_of(4)), 10_000)),
    "MP3 of 32 kbit/s": lambda: foreign(samples_of(4, 1), quality={"b": "32k"}),
    "MP3 of 8 kbit/s": lambda: foreign(samples_of(4, 1, 16000), rate=16000, quality={"b": "8k"}),
    "FLAC of blocks of 777": lambda: foreign(samples_of(4), "flac", quality={"frame_size": "777"}),
    "Opus": lambda: foreign(samples_of(4, 2, 48000), "libopus", 48000, {"b": "24k", "frame_duration": "60"}),
}


def row_of(content: bytes, name: str = "a.wav", window: int | None = None) -> Row:
    return Row(name, {"bytes": content, "path": name}, "a caption", window)


def config_of(**fields) -> AudioDataConfig:
    return AudioDataConfig("memory", **(FIELDS | fields))


def starts_in(total: int, length: int = LENGTH) -> list[float]:
    """Of a window at the first place, the last, and some between."""
    places = total - length + 1
    return [0.0, *((place + 0.5) / places for place in np.linspace(1, places - 2, 9).astype(int)), 1 - 0.5 / places]


@pytest.mark.parametrize("kind", [*KINDS, *FOREIGN], ids=str)
def test_windows_are_those_of_the_whole_file(kind):
    """Also at the end of Vorbis, where libvorbis misses places by a hundred samples, and of MP3s whose frames take bits
    from many before them; those of MP3 and Opus but for the last bit."""
    content = FOREIGN[kind]() if kind in FOREIGN else sound(samples_of(4), RATE, *kind)
    whole, rate = soundfile.read(io.BytesIO(content), dtype="float32", always_2d=True)
    config = config_of(sampling_rate=rate, audio_channels=whole.shape[1])
    padded = 2048 if kind == ("WAV", "MS_ADPCM") else 0  # its last block is full
    assert 0 <= len(whole) - (4 * rate + 777) <= padded and read_header(row_of(content), config).num_samples == len(
        whole
    )
    last_bit = 2e-7 if kind in FOREIGN and "FLAC" not in kind else 0
    for start in starts_in(len(whole)):
        window = read_window(row_of(content), start, LENGTH, config)
        assert window.first == int(start * (len(whole) - LENGTH + 1)) and window.total == len(whole)
        assert np.abs(window.samples - whole[window.first : window.first + LENGTH].T).max() <= last_bit, window.first
    third = read_window(row_of(content, window=3), 0.7, LENGTH, config)
    assert np.abs(third.samples - whole[3 * LENGTH : 4 * LENGTH].T).max() <= last_bit


@pytest.mark.parametrize(
    "rates", [(44100, 48000), (48000, 44100), (44100, 16000), (44100, 8000), (11025, 44100)], ids=str
)
def test_windows_that_are_resampled_are_those_of_the_whole_file_resampled(rates):
    """But for the last bit of some; without a margin it would be 0.01."""
    rate, to = rates
    content, config = sound(samples_of(2, 1, rate), rate), config_of(sampling_rate=to, audio_channels=1)
    whole = soxr.resample(samples_of(2, 1, rate), rate, to, quality="VHQ")
    total = read_header(row_of(content), config).length_at(to)
    assert abs(total - len(whole)) <= 1
    for start in starts_in(total):
        window = read_window(row_of(content), start, LENGTH, config)
        assert np.abs(window.samples - whole[window.first : window.first + LENGTH].T).max() < 1e-7, window.first


def test_a_resampled_sine_is_a_sine():
    """At its place, at its frequency, and what the lower rate has not is gone."""
    times = np.arange(48000) / 48000
    samples = 0.5 * np.sin(2 * np.pi * 1000 * times) + 0.3 * np.sin(2 * np.pi * 9000 * times)
    config = config_of(sampling_rate=16000, audio_channels=1)
    window = read_window(row_of(sound(samples, 48000)), 0.4, LENGTH, config)
    expected = 0.5 * np.sin(2 * np.pi * 1000 * (window.first + np.arange(LENGTH)) / 16000)
    assert np.abs(window.samples[0] - expected).max() < 1e-5


def test_a_short_sound_is_padded_and_masked():
    """So that the mean of a loss times the mask is that of the sound alone."""
    samples = samples_of(0)  # 777 samples
    row, losses = row_of(sound(samples)), torch.rand(1, LENGTH)
    sample = read(row, Place(0.9), (LENGTH,), CONFIG)
    assert (
        torch.equal(sample["waveforms"][:, :777], torch.from_numpy(samples.T))
        and not sample["waveforms"][:, 777:].any()
    )
    assert (losses * sample["mask"]).mean().item() == pytest.approx(losses[:, :777].mean().item(), rel=1e-5)
    assert sample["seconds_start"] == 0 and sample["seconds_total"].item() == pytest.approx(777 / RATE)
    assert "mask" not in read(row, MIDDLE, (LENGTH,), config_of(mask_padding=False))
    long = read(row_of(sound(samples_of(1))), Place(0.5), (LENGTH,), CONFIG)
    assert (long["mask"] == 1).all() and long["seconds_total"].item() == pytest.approx(1 + 777 / RATE)
    assert long["seconds_start"].item() == pytest.approx(int(0.5 * (RATE + 777 - LENGTH + 1)) / RATE)


@pytest.mark.parametrize(("start", "samples"), [(0.9, LENGTH), (0.0, LENGTH // 2)])
def test_a_window_may_be_all_that_a_model_is_told_of(start, samples):
    """Or its sound is: then where it begins, and how long that is; of what is shorter than a window they agree."""
    content = samples_of(1.0)[: 20000 if samples == LENGTH else samples]
    told = {}
    for seconds_of in ("sound", "window"):
        found = read(row_of(sound(content)), Place(start), (LENGTH,), config_of(seconds_of=seconds_of))
        told[seconds_of] = found["seconds_start"].item(), found["seconds_total"].item()
    first = int(start * (len(content) - LENGTH + 1)) if samples == LENGTH else 0
    assert told["sound"] == pytest.approx((first / RATE, len(content) / RATE))
    assert told["window"] == pytest.approx((0.0, samples / RATE))


def test_channels_and_loudness():
    both = samples_of(0.2)
    mono, stereo = (read(row_of(sound(both)), Place(0.0), (LENGTH,), config_of(audio_channels=number))["waveforms"]
                    for number in (1, 2))  # fmt: skip
    assert torch.equal(mono, stereo.mean(0, keepdim=True)) and torch.equal(stereo, torch.from_numpy(both[:LENGTH].T))
    copied = read(row_of(sound(both[:, :1])), Place(0.0), (LENGTH,), CONFIG)["waveforms"]
    assert torch.equal(copied, stereo[:1].expand(2, -1))
    loud, quiet = (read(row_of(sound(scale * both)), Place(0.0), (LENGTH,), config_of(peak=0.9))["waveforms"]
                   for scale in (1, 0.01))  # fmt: skip
    assert loud.abs().max() == pytest.approx(0.9) and torch.allclose(loud, quiet, atol=1e-6)
    for faint in (0 * both, 1e-3 * both):
        kept = read(row_of(sound(faint)), Place(0.0), (LENGTH,), config_of(peak=0.9))["waveforms"]
        assert torch.equal(kept, torch.from_numpy(faint[:LENGTH].T))
    with pytest.raises(RowError, match=r"^a.wav: 3 channels, where there must be 1 or 2$"):
        read(row_of(sound(samples_of(0.1, 3))), MIDDLE, (LENGTH,), CONFIG)


def test_windows_are_a_function_of_the_seed_and_the_sample():
    starts = {window: [place(config_of(window=window), 0, k).start for k in range(50)] for window in
              ("random", "start", "middle")}  # fmt: skip
    assert set(starts["start"]) == {0.0} and set(starts["middle"]) == {0.5} and len(set(starts["random"])) == 50
    assert starts["random"] == [place(CONFIG, 0, k).start for k in range(50)]
    assert starts["random"] != [place(CONFIG, 1, k).start for k in range(50)]


def damaged(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + b"\x55" * 4000 + content[middle + 4000 :]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda: b"", "an empty file, of 0 bytes$"),
        (
            lambda: foreign(samples_of(0), "aac", quality={}),
            "not a sound that libsndfile knows, such as FLAC, WAV, Ogg and MP3; `ffmpeg -i old new.flac`",
        ),
        (lambda: sound(samples_of(0)[:0]), "it has no samples"),
        (lambda: sound(samples_of(0, 1), RATE, "WAV", "GSM610"), "GSM 6.10, of which no part can be read alone; `ffmp"),
        (lambda: damaged(sound(samples_of(4), RATE, "FLAC", "PCM_16")), "cannot decode the sound at 1.95 s: "),
        (lambda: (c := sound(samples_of(4), RATE, "FLAC", "PCM_16"))[: len(c) * 2 // 3], "cannot decode the sound: "),
        (lambda: (c := sound(samples_of(4), RATE, *KINDS[4]))[: len(c) * 2 // 3], "cut off, it ends at .* of its 4.02"),
        (without_length, "an MP3 that does not say how long it is; `ffmpeg -i"),
        (lambda: sound(np.full((9000, 1), np.nan, np.float32)), "it has samples that are infinite or no number"),
    ],
    ids=["empty", "M4A", "no samples", "GSM", "damaged FLAC", "cut FLAC", "cut MP3", "MP3 without a length", "NaN"],
)  # fmt: skip
def test_what_is_damaged_is_a_bad_row(content, message):
    with pytest.raises(RowError, match=f"^b.flac: {message}"):
        for start in (0.999, 0.49):  # of what is damaged in the middle, other windows can be read
            read(row_of(content(), "b.flac"), Place(start), (LENGTH,), CONFIG)


def test_what_is_short_or_missing_is_a_bad_row(tmp_path):
    config, row = config_of(min_length_in_s=0.5), row_of(sound(samples_of(0.2)), "b.wav")
    short = r"^b.wav: 0.218 s, shorter than data.min_length_in_s, 0.5 \(data.on_bad_row skip leaves such out\)$"
    for reading in (lambda: read(row, MIDDLE, (LENGTH,), config), lambda: check(row, 0, config)):
        with pytest.raises(RowError, match=short):
            reading()
    skipping = config_of(min_length_in_s=0.5, on_bad_row="skip")
    assert check(row, 0, skipping)[0] == "b.wav" and find_problems(row, skipping)[1][0][1].endswith("length_in_s, 0.5")
    assert find_problems(row, config)[1][0][0] == "error"
    for audio, message in ((None, "no sound"), ({"bytes": None, "path": str(tmp_path / "x.wav")}, "No such file")):
        with pytest.raises(RowError, match=f"^x: {message}"):
            read(Row("x", audio, "a caption"), MIDDLE, (LENGTH,), CONFIG)


def test_what_tells_a_row_from_others():
    row = row_of(sound(samples_of(0.2)))
    name, captions, digest, window = check(row, 0, CONFIG)
    assert (name, captions, len(digest), window) == ("a.wav", ["a caption"], 64, None)
    assert check(row_of(sound(samples_of(0.3))), 0, CONFIG)[2] != digest
    assert check(row._replace(window=2), 0, CONFIG)[2:] == [None, 2]


def test_what_is_worth_a_warning():
    """Of all of a sound; what is at its place in a file of whatever ending is none."""
    samples, times = samples_of(1, 1), np.arange(RATE)[:, None] / RATE
    sine = np.sin(2 * np.pi * 100 * times)
    warned = {
        "a.wav: silent": sound(0 * samples),
        "a.wav: almost silent, its largest amplitude is -80 dB": sound(1e-4 * sine),
        "a.wav: its largest amplitude is 100 times full scale": sound(100 * sine),
        "a.wav: clipped": sound((3 * sine).clip(-1, 1), RATE, "MP3", "MPEG_LAYER_III"),
        "a.wav: not centred, a channel's mean is 0.10 of full scale": sound(0.1 + 0.5 * samples),
        "a.wav: 8000 Hz, to be resampled to 44100 Hz": sound(samples, 8000, "FLAC", "PCM_16"),
        "a.wav: cut off, it ends before its header says": sound(samples)[:-1000],
    }
    for message, content in warned.items():
        captions, problems, heard = find_problems(row_of(content), CONFIG)
        assert captions == ["a caption"] and problems == [("warning", message)]
        assert heard.is_clipped == ("clipped" in message or "100 times" in message)
    mp3 = foreign(samples_of(4))
    shorter = [("error", "a.wav: cut off, it ends at 1.99 of its 4.02 s")]
    assert find_problems(row_of(mp3[: len(mp3) // 2]), CONFIG)[1] == shorter
    vorbis = sound(samples_of(4), RATE, "OGG", "VORBIS")
    assert find_problems(row_of(vorbis[: len(vorbis) // 2]), CONFIG)[1][0][1].startswith("a.wav: cut off")
    assert find_problems(row_of(vorbis), CONFIG)[1] == [] == find_problems(row_of(sound(samples)), CONFIG)[1]
    endless = bytearray(sound(samples, subtype="PCM_16"))  # as what is written to a pipe says
    at = endless.index(b"data")
    endless[at + 4 : at + 8] = b"\xff" * 4
    heard = find_problems(row_of(bytes(endless)), CONFIG)[2]
    assert heard.header.num_samples == len(samples) and not heard.is_cut_off
    assert heard.peak == pytest.approx(np.abs(samples).max(), abs=1e-4)
    assert heard.power == pytest.approx((samples**2).mean(), rel=1e-3)


def test_what_sounds_are_in_words():
    long, short = sound(0.5 * np.ones((RATE, 2))), sound(np.zeros((500, 1)), 8000)
    heard = [find_problems(row_of(content), CONFIG)[2] for content in (long, long, short)]
    assert describe_found(heard) == (
        "3 sounds of 0.0625 to 1 s (median 1, 2 s in all), 8 to 44.1 kHz, 1 mono and 2 stereo; largest amplitudes "
        "-6.02 dB (median -6.02); mean levels -6.02 dB (median -6.02); 1 shorter than data.waveform_length, "
        "whose windows are 45% padding; 1 silent; 1 the same as others"
    )


def test_made_sounds_are_wav_files_and_a_picture(tmp_path):
    times = np.arange(8000) / 8000
    sounds = [
        Sound(np.stack([np.sin(2 * np.pi * hertz * times)] * 2).astype(np.float32), 8000) for hertz in (1000, 3000)
    ]
    save(sounds, ["low", "high"], tmp_path / "samples/step-4")
    names = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert names == ["step-4-00.wav", "step-4-01.wav", "step-4.png"]
    for number, made in enumerate(sounds):
        samples, rate = soundfile.read(tmp_path / f"samples/step-4-{number:02d}.wav", dtype="float32")
        assert rate == 8000 and np.abs(samples.T - made.samples).max() < 1.01 * 2**-15
    with Image.open(tmp_path / "samples/step-4.png") as picture:
        assert picture.width > picture.height > 128


def test_a_sound_that_has_no_room_is_an_error_of_ours(tmp_path):
    """soundfile has one of its own for a full disk."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
    try:
        with pytest.raises(RunError, match=r"^cannot write .*/a-00\.wav: File too large$"):
            save([Sound(np.zeros((1, 5000), np.float32), RATE)], ["silence"], tmp_path / "a.png")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert not [*tmp_path.iterdir()]
