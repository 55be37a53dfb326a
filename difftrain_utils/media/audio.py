"""Sounds: a window of samples of a file, of which no more is decoded than that, at the rate and with the channels that
a model takes."""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import Image

from difftrain_utils.config.audio_data import AudioDataConfig, AudioSourceConfig
from difftrain_utils.errors import RowError, one_line
from difftrain_utils.files import new_file
from difftrain_utils.keyed_random import generator_for
from difftrain_utils.media import image
from difftrain_utils.media.captions import captions_in, captions_of, find_caption_problems
from difftrain_utils.media.grids import labelled_grid
from difftrain_utils.media.video import STARTS, digest_of, open_file

MARGIN = 2048  # samples at the lower rate on both sides of a window that is resampled: with them it is as of the whole
LAST_PAGE = 2**20  # samples at the end of Vorbis, within which libvorbis misses the place that is sought
TAG, FIRST_FRAME = 10, 4096  # bytes of ID3's header, and those after its tag in which an MP3 says how long it is
LENGTHS = (b"Xing", b"Info")


# ── What is asked of a medium (media.py) ─────────────────────────────────────────────────────────────────────
NOUN, HAS_CAPTIONS = "sounds", True


class Row(NamedTuple):
    """A row as it is stored: how errors call it, the undecoded `datasets.Audio`, its captions, and which of the windows
    one after another it is, where each is a row of its own (`data.window` all)."""

    name: str
    audio: dict[str, Any] | None
    captions: Any
    window: int | None = None


def file_columns(source: AudioSourceConfig) -> list[tuple[str, str]]:
    return [(source.audio_column, "audio_column")]


def text_columns(source: AudioSourceConfig) -> list[tuple[str, str]]:
    return image.text_columns(source)


def row_of(content: dict[str, Any], name: str, source: AudioSourceConfig, texts: list[tuple[list[str], Any]]) -> Row:
    """A row out of its columns; a sound that is a file is called by its path."""
    audio = content[source.audio_column]
    return Row(image.path_of(audio) or name, audio, captions_in(content, texts, source))


def files(part) -> Iterator[tuple[list[str | None], np.ndarray]]:
    """The paths of sounds, and whether they are files that hold them."""
    return image.paths_in(part, part.source.audio_column)


def limits(config: AudioDataConfig) -> tuple[Any, ...]:
    return config.sampling_rate, config.min_length_in_s


def lasting_names(part) -> Iterator[list[str]]:
    """The sounds' file names without their folders."""
    return image.file_names(part, part.source.audio_column)


def check(row: Row, index: int, config: AudioDataConfig) -> list[Any]:
    """What tells a row from others, having looked at the sound's header: the file's name, so that a moved folder keeps
    its fingerprint, the captions, the digest of the sound, and which of its windows it is; null for what is not there.
    Of windows one after another it is the first that has looked at their sound.

    Raises:
        RowError: a sound that libsndfile does not know, or too short, or of more than two channels, or a caption that
            is no string, unless `data.on_bad_row` is skip.
    """
    digest, captions = None, [row.captions] if isinstance(row.captions, str) else row.captions
    try:
        captions_of(captions, row.name)
        if not row.window:
            digest = digest_of(row.audio, row.name, "sound")
            read_header(row, config)
    except RowError:
        if config.on_bad_row == "stop":
            raise
    return [image.file_name(image.path_of(row.audio), index), captions, digest, row.window]


class Place(NamedTuple):
    """Which part of a sound a sample has: how much of the way, in [0, 1), from the first window that there could be to
    the last."""

    start: float = 0.5


MIDDLE = Place()


def place(config: AudioDataConfig, seed: int, k: int) -> Place:
    """Sample k's."""
    return Place(generator_for(seed, "window", k).random() if config.window == "random" else STARTS[config.window])


def size_of(config: AudioDataConfig) -> tuple[int]:
    """(samples,) of what is trained on."""
    return (config.waveform_length,)


def describe(number: int, config: AudioDataConfig) -> str:
    return f"{number} {'windows of ' if config.window == 'all' else ''}{NOUN}"


def describe_size(config: AudioDataConfig) -> str:
    kind = {1: "mono", 2: "stereo"}[config.audio_channels]
    seconds = config.waveform_length / config.sampling_rate
    return f"{config.waveform_length} samples ({seconds:.3g} s) at {config.sampling_rate} Hz, {kind}"


def read(
    row: Row, place: Place, size: tuple[int], config: AudioDataConfig, has_masks: bool = False
) -> dict[str, torch.Tensor]:
    """The place in a row's sound as a sample of `size` (samples,) has it: "waveforms", (channels, samples) float32, 0
    after the end of a sound that is shorter; where in it the window begins, "seconds_start", and how long all of it is,
    "seconds_total"; and with `data.mask_padding` the "mask", (1, samples), 0 after that end, and else what makes a mean
    of 1: a loss times the mask has the mean of the loss of the sound alone.

    Raises:
        RowError: the sound is missing, damaged, cut off before the window ends, too short, of more than two channels,
            or has numbers that are none.
    """
    window = read_window(row, place.start, size[0], config)
    waveforms, mask = torch.zeros(config.audio_channels, *size), torch.zeros(1, *size)
    length = window.samples.shape[1]
    waveforms[:, :length] = torch.from_numpy(window.samples)
    mask[:, :length] = size[0] / length
    seconds = {
        "seconds_start": window.first / config.sampling_rate,
        "seconds_total": window.total / config.sampling_rate,
    }
    sample = {"waveforms": waveforms} | {name: torch.tensor(value) for name, value in seconds.items()}
    return sample | ({"mask": mask} if config.mask_padding else {})


def find_problems(row: Row, config: AudioDataConfig) -> tuple[list[str], list[tuple[str, str]]]:
    """The captions as the model is told them, and ("error" or "warning", message) for what is wrong with a row, whose
    middle window is decoded for that."""
    problems = []
    try:
        header = read_header(row, config)
        window = read_window(row, MIDDLE.start, config.waveform_length, config)
        if header.sampling_rate < config.sampling_rate:
            low = f"{row.name}: {header.sampling_rate} Hz, to be resampled to {config.sampling_rate} Hz"
            problems.append(("warning", low))
        if not window.samples.any():
            problems.append(("warning", f"{row.name}: its middle is silent"))
    except RowError as error:
        problems.append(("error", str(error)))
    captions, of_captions = find_caption_problems(row.captions, row.name, config)
    return captions, problems + of_captions


def token_problems(name: str, texts: list[str], tokenizer, config: AudioDataConfig) -> Iterator[tuple[str, str]]:
    """The same of captions that have more tokens than the model takes."""
    return image.token_problems(name, texts, tokenizer, config)


class Sound(NamedTuple):
    """Samples, (channels, samples) float32, of which 1 is full scale, and how many of them a second has."""

    samples: np.ndarray
    sampling_rate: int


def save(made: list[Sound], labels: list[str], path: Path) -> None:
    """Write sounds as a WAV file each, `path` with their numbers, and their spectrograms with their labels as one PNG
    file, `path` with that ending. Raises RunError if it cannot."""
    import soundfile  # an extra

    for number, (samples, sampling_rate) in enumerate(made):
        with new_file(path.with_name(f"{path.stem}-{number:02d}.wav")) as partial:
            soundfile.write(partial, samples.T, sampling_rate, format="WAV", subtype="PCM_16")
    with new_file(path.with_suffix(".png")) as partial:
        labelled_grid([spectrogram(sound) for sound in made], labels).save(partial, "PNG")


# ── Files of sounds ──────────────────────────────────────────────────────────────────────────────────────────
class Header(NamedTuple):
    """Of a sound: samples of each channel, how many a second, and channels."""

    num_samples: int
    sampling_rate: int
    channels: int

    def length_at(self, sampling_rate: int) -> int:
        """How many samples it has at another rate."""
        return self.num_samples * sampling_rate // self.sampling_rate


@contextlib.contextmanager
def open_sound(row: Row, config: AudioDataConfig) -> Iterator[tuple[Any, Header]]:
    """A row's sound as a file of soundfile's, and its header, which is checked. Raises RowError if it is none that can
    be trained on, and of what goes wrong with it."""
    import soundfile  # an extra

    with open_file(row.audio, row.name, "sound") as file:
        try:
            with soundfile.SoundFile(file) as sound:
                header = Header(sound.frames, sound.samplerate, sound.channels)
                if sound.format == "MP3" and not _says_length(file):
                    raise RowError(
                        f"{row.name}: an MP3 that does not say how long it is; `ffmpeg -i old.mp3 -c copy new.mp3` "
                        "writes one that does"
                    )
                _check(header, row.name, config)
                yield sound, header
        except (MemoryError, RowError):
            raise
        except Exception as error:  # soundfile's have what libsndfile says
            reason = getattr(error, "error_string", None) or one_line(error)
            raise RowError(f"{row.name}: cannot decode the sound: {reason}") from None


def _says_length(file: BinaryIO) -> bool:
    """Whether the first frame of an MP3 counts the others: without that libsndfile guesses, and leaves out what is
    beyond. Leaves the file where it was."""
    place = file.tell()
    file.seek(0)
    tag = file.read(TAG)
    if tag[:3] == b"ID3":
        size = 0
        for byte in tag[6:]:
            size = size << 7 | byte & 0x7F
        file.seek(TAG + size)
    start = file.read(FIRST_FRAME)
    file.seek(place)
    return any(mark in start for mark in LENGTHS)


def _check(header: Header, name: str, config: AudioDataConfig) -> None:
    """Raise RowError unless a sound is one that can be trained on."""
    if header.channels > 2:
        raise RowError(f"{name}: {header.channels} channels, where there must be 1 or 2")
    seconds = header.num_samples / header.sampling_rate
    if header.length_at(config.sampling_rate) == 0 or seconds < config.min_length_in_s:
        raise RowError(f"{name}: {seconds:.3g} s, shorter than data.min_length_in_s, {config.min_length_in_s:g}")


def read_header(row: Row, config: AudioDataConfig) -> Header:
    """What a row's sound is, of which nothing is decoded. Raises RowError if it is none that can be trained on."""
    with open_sound(row, config) as (_, header):
        return header


def library_versions() -> dict[str, str]:
    """Of what decodes and resamples."""
    import soundfile  # extras
    import soxr

    return {"libsndfile": soundfile.__libsndfile_version__, "soxr": soxr.__version__}


class Window(NamedTuple):
    """A part of a sound: its samples, (channels, samples) float32, the number of the first of them, and how many the
    sound has."""

    samples: np.ndarray
    first: int
    total: int


def read_window(row: Row, start: float, length: int, config: AudioDataConfig) -> Window:
    """At most `length` samples of a row's sound, at the run's rate, with its channels and its peak. The first is
    `start` (in [0, 1)) of the way to the last place that it could be at, or where the row is one of the windows one
    after another (`Row.window`), where that begins.

    No more than that of the file is decoded, with a margin where it is resampled, so that the window is that part of
    the whole file resampled.

    Raises:
        RowError: see `read`.
    """
    with open_sound(row, config) as (sound, header):
        total = header.length_at(config.sampling_rate)
        first = int(start * max(total - length + 1, 1)) if row.window is None else row.window * length
        if first >= total:
            seconds = first / config.sampling_rate
            raise RowError(f"{row.name}: no window of it begins at {seconds:.2f} s")
        samples = _resampled(sound, header, row.name, first, min(length, total - first), config.sampling_rate)
    if not np.isfinite(samples).all():
        raise RowError(f"{row.name}: it has samples that are infinite or no number")
    if config.audio_channels != samples.shape[1]:
        samples = samples.mean(1, keepdims=True) if config.audio_channels == 1 else samples.repeat(2, axis=1)
    if config.peak is not None and (peak := np.abs(samples).max()) > 0:
        samples = samples * np.float32(config.peak / peak)
    return Window(np.ascontiguousarray(samples.T), first, total)


def _resampled(sound, header: Header, name: str, first: int, length: int, sampling_rate: int) -> np.ndarray:
    """Samples from `first` on of the sound at this rate, (length, channels). Raises RowError if it ends before."""
    if header.sampling_rate == sampling_rate:
        return _decoded(sound, header, name, first, length)
    import soxr  # an extra

    divisor = math.gcd(header.sampling_rate, sampling_rate)
    up, down = sampling_rate // divisor, header.sampling_rate // divisor
    margin = MARGIN * max(1, -(-down // up))
    # one that is a sample of both rates
    begin = max(first * down // up - margin, 0) // down * down
    end = min(-(-(first + length) * down // up) + margin, header.num_samples)
    decoded = _decoded(sound, header, name, begin, end - begin)
    # of soxr's qualities the one whose window is that of the whole, but for the last bit of some samples
    resampled = soxr.resample(decoded, header.sampling_rate, sampling_rate, quality="VHQ")
    skipped = begin // down * up
    return resampled[first - skipped : first - skipped + length]


def _decoded(sound, header: Header, name: str, first: int, length: int) -> np.ndarray:
    """Samples from `first` on as they are in the file, (length, channels). Raises RowError if it ends before."""
    begin = min(first, max(header.num_samples - LAST_PAGE, 0)) if sound.subtype == "VORBIS" else first
    sound.seek(begin)
    samples = sound.read(first - begin + length, dtype="float32", always_2d=True)
    if len(samples) < first - begin + length:
        ends, seconds = (count / header.sampling_rate for count in (begin + len(samples), header.num_samples))
        raise RowError(f"{name}: cut off, it ends at {ends:.2f} of its {seconds:.2f} s")
    return samples[first - begin :]


# ── Pictures of sounds ───────────────────────────────────────────────────────────────────────────────────────
WIDTH, HEIGHT, FLOOR = 256, 128, -80.0  # of a spectrogram in pixels, and what is black, in dB below a full sine
FRAME = 0.046  # seconds that a column looks at
COLORS = ((0, 0, 4), (81, 18, 124), (183, 55, 121), (252, 137, 97), (252, 253, 191))  # matplotlib's magma, in steps


def spectrogram(sound: Sound) -> Image.Image:
    """The power of a sound's frequencies, from 0 at the bottom to half the rate at the top, over its time: black is
    80 dB below a sine of full scale, and white that."""
    samples, size = sound.samples.astype(np.float64), max(2, 2 ** round(math.log2(FRAME * sound.sampling_rate)))
    padded = np.pad(samples, ((0, 0), (size // 2, size)))
    window = np.hanning(size)
    starts = np.linspace(0, samples.shape[1], WIDTH, endpoint=False).astype(int)
    frames = np.stack([padded[:, start : start + size] for start in starts], 1) * window
    power = (np.abs(np.fft.rfft(frames)) ** 2).mean(0) / (window.sum() / 2) ** 2  # (columns, frequencies)
    level = (10 * np.log10(power + 1e-12) / -FLOOR + 1).clip(0, 1)
    at = np.linspace(0, 1, len(COLORS))
    pixels = np.stack([np.interp(level, at, channel) for channel in zip(*COLORS, strict=True)], -1)
    picture = Image.fromarray(pixels.round().astype(np.uint8)[:, ::-1].transpose(1, 0, 2))
    return picture.resize((WIDTH, HEIGHT), Image.Resampling.BOX)
