"""Sounds: a window of samples of a file, of which no more is decoded than that, at the rate and with the channels that
a model takes."""

import contextlib
import io
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch

from difftrain_utils.config.audio_data import AudioDataConfig, AudioSourceConfig
from difftrain_utils.errors import RowError, counted, one_line
from difftrain_utils.files import new_file, write_file
from difftrain_utils.keyed_random import generator_for
from difftrain_utils.media import image
from difftrain_utils.media.captions import captions_in, captions_of, find_caption_problems
from difftrain_utils.media.grids import labelled_grid
from difftrain_utils.media.recordings import STARTS, digest_of, least_to_most, open_file, remedy_for
from difftrain_utils.media.spectrogram import spectrogram

MARGIN = 2048  # samples at the lower rate on both sides of a window that is resampled: with them it is as of the whole
LAST_PAGE = 2**20  # samples at the end of Vorbis, within which libvorbis misses the place that is sought
# Samples before a window from which on it is decoded as it would be from the file's beginning: a frame of an MP3 may
# take bits from 24 frames of 576 before it, and Opus remembers
LEAD_IN = {"MPEG_LAYER_III": 32 * 576, "OPUS": 48000}
TAG, FIRST_FRAME = 10, 4096  # bytes of ID3's header, and those after its tags in which an MP3's first frame begins
SYNC, HEAD = re.compile(rb"\xff[\xe2-\xff]"), 42  # how a frame begins, and bytes of its longest head and what is sought
LENGTHS = (b"Xing", b"Info")
UNKNOWN = (1, 4)  # of libsndfile's errors: a format, and an encoding in one, that it does not know
CUT_OFF = re.compile(r"(\d+) \(should be (\d+)\)|end-of-stream")  # in what libsndfile logs
STREAMED = 2**31 - 2**16  # bytes, from which on a header says that its writer did not know how many
BLOCK = 2**18  # samples that are decoded at once of a whole sound
FULL_SCALE = 0.9999  # from here on an amplitude is as large as a file of 16 bits has them
FAINT = 1e-3  # a sound whose largest amplitude is less is almost silent, which is a warning, and stays so
LOUD = 2.0  # and so is one that is more
OFFSET = 0.05  # a mean from which on a sound is not centred


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
    return f"{counted(number, 'windows')} of {NOUN}" if config.window == "all" else counted(number, NOUN)


def describe_size(config: AudioDataConfig) -> str:
    kind = {1: "mono", 2: "stereo"}[config.audio_channels]
    seconds = config.waveform_length / config.sampling_rate
    return f"{config.waveform_length} samples ({seconds:.3g} s) at {config.sampling_rate} Hz, {kind}"


def read(
    row: Row, place: Place, size: tuple[int], config: AudioDataConfig, has_masks: bool = False
) -> dict[str, torch.Tensor]:
    """The place in a row's sound as a sample of `size` (samples,) has it: "waveforms", (channels, samples) float32, 0
    after the end of a sound that is shorter; where in it the window begins, "seconds_start", and how long all of it is,
    "seconds_total" (see `data.seconds_of`); and with `data.mask_padding` the "mask", (1, samples), 0 after that end,
    and else what makes a mean of 1: a loss times the mask has the mean of the loss of the sound alone.

    Raises:
        RowError: the sound is missing, damaged, cut off before the window ends, too short, of more than two channels,
            or has numbers that are none.
    """
    window = read_window(row, place.start, size[0], config)
    waveforms, mask = torch.zeros(config.audio_channels, *size), torch.zeros(1, *size)
    length = window.samples.shape[1]
    waveforms[:, :length] = torch.from_numpy(window.samples)
    mask[:, :length] = size[0] / length
    first, total = (window.first, window.total) if config.seconds_of == "sound" else (0, length)
    told = {"seconds_start": first, "seconds_total": total}
    seconds = {name: torch.tensor(number / config.sampling_rate) for name, number in told.items()}
    sample = {"waveforms": waveforms} | seconds
    return sample | ({"mask": mask} if config.mask_padding else {})


def find_problems(row: Row, config: AudioDataConfig) -> tuple[list[str], list[tuple[str, str]], "Heard | None"]:
    """The captions as the model is told them, ("error" or "warning", message) for what is wrong with a row, all of
    whose sound is decoded for that, and what its sound is, None if that cannot be read."""
    problems, heard = [], None
    try:
        heard = listen(row, config)
        problems += [("warning", f"{row.name}: {message}") for message in _warnings(heard, config)]
    except RowError as error:
        problems.append(("error", str(error)))
    captions, of_captions = find_caption_problems(row.captions, row.name, config)
    return captions, problems + of_captions, heard


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
    for number, sound in enumerate(made):
        write_sound(sound, path.with_name(f"{path.stem}-{number:02d}.wav"))
    with new_file(path.with_suffix(".png")) as partial:
        labelled_grid([spectrogram(*sound) for sound in made], labels).save(partial, "PNG")


def write_sound(sound: Sound, path: Path, comment: str | None = None) -> None:
    """Write a sound as a WAV file, of 16 bits a sample, that may have a comment. Raises RunError if it cannot."""
    import soundfile  # an extra

    samples, sampling_rate = sound
    kind = {"format": "WAV", "subtype": "PCM_16"}
    buffer = io.BytesIO()  # of a full disk soundfile has an error of its own
    with soundfile.SoundFile(buffer, "w", sampling_rate, len(samples), **kind) as file:
        if comment is not None:
            file.comment = comment
        file.write(samples.T)
    write_file(path, buffer.getvalue())


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
                if sound.subtype.startswith("MPEG") and not _says_length(file):
                    raise RowError(
                        f"{row.name}: an MP3 that does not say how long it is; `ffmpeg -i old.mp3 -c copy new.mp3` "
                        "writes one that does"
                    )
                if not sound.seekable():
                    kind = f"{sound.subtype_info}, of which no part can be read alone"
                    raise RowError(f"{row.name}: {kind}; `ffmpeg -i old new.flac` makes what can")
                _check(header, row.name, config)
                try:
                    yield sound, header
                except soundfile.LibsndfileError as error:
                    at = sound.tell() / header.sampling_rate  # below 0 if libsndfile does not know
                    where = f" at {at:.2f} s" if at >= 0 else ""
                    raise RowError(f"{row.name}: cannot decode the sound{where}: {error.error_string}") from None
        except (MemoryError, RowError):
            raise
        except Exception as error:  # soundfile's have what libsndfile says
            if getattr(error, "code", None) in UNKNOWN:
                if file.seek(0, 2) == 0:
                    raise RowError(f"{row.name}: an empty file, of 0 bytes") from None
                known = "such as FLAC, WAV, Ogg and MP3; `ffmpeg -i old new.flac` makes one"
                raise RowError(f"{row.name}: not a sound that libsndfile knows, {known}") from None
            reason = getattr(error, "error_string", None) or one_line(error)
            raise RowError(f"{row.name}: cannot decode the sound: {reason}") from None


def _says_length(file: BinaryIO) -> bool:
    """Whether the first frame of an MP3, which comes after tags, counts the others: without that libsndfile guesses,
    and leaves out what is beyond (a frame with VBRI it does not read). Leaves the file where it was."""
    was_at, start = file.tell(), 0
    file.seek(0)
    while (tag := file.read(TAG))[:3] == b"ID3":
        size = 0
        for byte in tag[6:]:
            size = size << 7 | byte & 0x7F
        start += TAG + size
        file.seek(start)
    file.seek(start)
    begin = file.read(FIRST_FRAME)
    file.seek(was_at)
    frame = SYNC.search(begin)
    return frame is not None and any(mark in begin[frame.start() : frame.start() + HEAD] for mark in LENGTHS)


def _check(header: Header, name: str, config: AudioDataConfig) -> None:
    """Raise RowError unless a sound is one that can be trained on."""
    if header.channels > 2:
        raise RowError(f"{name}: {header.channels} channels, where there must be 1 or 2")
    if header.length_at(config.sampling_rate) == 0:
        raise RowError(f"{name}: it has no samples")
    if (seconds := header.num_samples / header.sampling_rate) < config.min_length_in_s:
        least = f"data.min_length_in_s, {config.min_length_in_s:g}"
        raise RowError(f"{name}: {seconds:.3g} s, shorter than {least}{remedy_for(config)}")


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
    if config.peak is not None and (peak := np.abs(samples).max()) >= FAINT:
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
    # of soxr's qualities the one whose window is that of the whole: but for the last bit of some samples between usual
    # rates, and within 3e-5 between odd ones (44100 and 44099)
    resampled = soxr.resample(decoded, header.sampling_rate, sampling_rate, quality="VHQ")
    skipped = begin // down * up
    return resampled[first - skipped : first - skipped + length]


def _decoded(sound, header: Header, name: str, first: int, length: int) -> np.ndarray:
    """Samples from `first` on as they are in the file, (length, channels). Raises RowError if it ends before."""
    begin = max(first - LEAD_IN.get(sound.subtype, 0), 0)
    if sound.subtype == "VORBIS":
        begin = min(begin, max(header.num_samples - LAST_PAGE, 0))
    sound.seek(begin)
    samples = sound.read(first - begin + length, dtype="float32", always_2d=True)
    if len(samples) < first - begin + length:
        raise _cut_off(name, begin + len(samples), header)
    return samples[first - begin :]


def _cut_off(name: str, end: int, header: Header) -> RowError:
    ends, seconds = (count / header.sampling_rate for count in (end, header.num_samples))
    return RowError(f"{name}: cut off, it ends at {ends:.2f} of its {seconds:.2f} s")


# ── What all sounds are ──────────────────────────────────────────────────────────────────────────────────────
class Heard(NamedTuple):
    """Of all of a sound: its header, the SHA-256 of its file, its largest amplitude and its power, the mean of the
    squares, of which 1 is full scale, the largest mean of a channel, whether three samples of one after another are at
    full scale, whether its file ends before its header says, and the share of its window that is padding."""

    header: Header
    digest: str
    peak: float
    power: float
    offset: float
    is_clipped: bool
    is_cut_off: bool
    padding: float


def listen(row: Row, config: AudioDataConfig) -> Heard:
    """Decode all of a row's sound. Raises RowError: see `read`."""
    peak, power, sums, length, is_clipped = 0.0, 0.0, 0.0, 0, False
    with open_sound(row, config) as (sound, header):
        while length < header.num_samples:
            block = sound.read(BLOCK, dtype="float32", always_2d=True)  # its `blocks` makes up what the file lacks
            if len(block) == 0:
                raise _cut_off(row.name, length, header)
            if not np.isfinite(block).all():
                raise RowError(f"{row.name}: it has samples that are infinite or no number")
            levels = np.abs(block)
            peak, length = max(peak, float(levels.max())), length + len(block)
            power, sums = power + np.square(block, dtype=np.float64).sum(), sums + block.sum(0, dtype=np.float64)
            is_full = levels >= FULL_SCALE
            is_clipped |= bool((is_full[2:] & is_full[1:-1] & is_full[:-2]).any())
        is_cut_off = any(
            match[1] is None or int(match[2]) < int(match[1]) < STREAMED for match in CUT_OFF.finditer(sound.extra_info)
        )
    padding = max(1 - header.length_at(config.sampling_rate) / config.waveform_length, 0.0)
    power, offset = float(power) / (length * header.channels), float(np.abs(sums).max()) / length
    return Heard(header, digest_of(row.audio, row.name, "sound"), peak, power, offset, is_clipped, is_cut_off, padding)


def _warnings(heard: Heard, config: AudioDataConfig) -> Iterator[str]:
    if heard.is_cut_off:
        yield "cut off, it ends before its header says"
    if heard.header.sampling_rate < config.sampling_rate:
        yield f"{heard.header.sampling_rate} Hz, to be resampled to {config.sampling_rate} Hz"
    if heard.peak == 0:
        yield "silent"
    elif heard.peak < FAINT:
        yield f"almost silent, its largest amplitude is {_decibels(heard.peak**2):.0f} dB"
    if heard.peak > LOUD:
        yield f"its largest amplitude is {heard.peak:.3g} times full scale"
    elif heard.is_clipped:
        yield "clipped"
    if heard.offset >= OFFSET:
        yield f"not centred, a channel's mean is {heard.offset:.2f} of full scale"


def describe_found(heard: Sequence[Heard]) -> str:
    """What sounds are, in words, from the least to the most of each: "40 sounds of 2.1 to 30 s (median 8.4), …"."""
    seconds = [each.header.num_samples / each.header.sampling_rate for each in heard]
    total = f"{sum(seconds) / 3600:.1f} h" if sum(seconds) >= 3600 else f"{sum(seconds):.0f} s"
    rates = least_to_most([each.header.sampling_rate / 1000 for each in heard])
    number = Counter(each.header.channels for each in heard)
    channels = " and ".join(f"{number[n]} {kind}" for n, kind in ((1, "mono"), (2, "stereo")) if number[n])
    parts = [
        f"{len(heard)} sound{'s' * (len(heard) > 1)} of {least_to_most(seconds)} s (median {np.median(seconds):.3g}, "
        f"{total} in all), {rates} kHz, {channels}"
    ]
    if sounding := [each for each in heard if each.peak > 0]:
        for what, powers in (
            ("largest amplitudes", [each.peak**2 for each in sounding]),
            ("mean levels", [each.power for each in sounding]),
        ):
            levels = [_decibels(power) for power in powers]
            parts.append(f"{what} {least_to_most(levels)} dB (median {np.median(levels):.3g})")
    if short := [each.padding for each in heard if each.padding]:
        share = sum(short) / len(short)
        parts.append(f"{len(short)} shorter than data.waveform_length, whose windows are {share:.0%} padding")
    counts = {"silent": len(heard) - len(sounding), "clipped": sum(each.is_clipped for each in heard)}
    counts["the same as others"] = len(heard) - len({each.digest for each in heard})
    return "; ".join([*parts, *(f"{count} {what}" for what, count in counts.items() if count)])


def _decibels(power: float) -> float:
    return 10 * math.log10(power)
