"""`builtin:tones`: short sounds of nine kinds, and a judge that names them by their spectrum over time."""

import io
from collections.abc import Sequence

import numpy as np

from difftrain_utils.keyed_random import generator_for
from difftrain_utils.media.audio import Sound

TONES = [
    *("a low tone", "a high tone", "a low square wave", "a high square wave", "a rising tone", "a falling tone"),
    *("low noise", "high noise", "a beeping tone"),
]
"""The captions."""
LONGER = 1.25  # a sound of the data than those that are trained on, so that its windows differ
LEAST_RATE, LEAST_SECONDS = 4000, 1.0  # of what has all that tells the kinds apart
LOW_NOISE, HIGH_NOISE = 500, 1100  # Hz, up to which and from which on
FRAME, HOP = 0.064, 0.016  # seconds that the judge looks at, and from one look to the next
STRONGEST, NEARLY_ALL = 8, 0.72  # frequencies of a look, and the share of its power that they have of a tone
MOST = 0.8  # of its power, that noise has where its name says


def make_tone(index: int, length: int, sampling_rate: int, seed: int = 0) -> tuple[np.ndarray, str]:
    """Sound `index` of the data set, (length,) float64 within [-0.7, 0.7], and its caption, e.g. "a rising tone".

    The captions take turns; pitch, phase, loudness and pace come from (seed, index). A low tone has 150 to 250 Hz, a
    high one 700 to 1100; one that rises goes from low to high, equally far in equal times.
    """
    caption, generator = TONES[index % len(TONES)], generator_for(seed, "tone", index)
    pitch, phase, loudness, pace = generator.random(4)
    low, high, times = 150 + 100 * pitch, 700 + 400 * pitch, np.arange(length) / sampling_rate
    if "noise" in caption:
        spectrum = np.fft.rfft(generator.standard_normal(length))
        frequencies = np.fft.rfftfreq(length, 1 / sampling_rate)
        spectrum[frequencies > LOW_NOISE if caption == "low noise" else frequencies < HIGH_NOISE] = 0
        samples = np.fft.irfft(spectrum, length)
        samples /= np.abs(samples).max()
    elif "square" in caption:
        hertz = low if "low" in caption else high / 2
        harmonics = np.arange(1, sampling_rate / 2 / hertz, 2)[:, None]
        samples = (np.sin(2 * np.pi * harmonics * (hertz * times + phase)) / harmonics).sum(0)
    elif caption in ("a rising tone", "a falling tone"):
        seconds, octaves = length / sampling_rate, np.log(high / low)
        cycles = low * seconds / octaves * np.expm1(octaves * times / seconds)
        samples = np.sin(2 * np.pi * (cycles + phase))
        samples = samples if caption == "a rising tone" else samples[::-1]
    else:
        hertz = {"a low tone": low, "a high tone": high, "a beeping tone": high / 2}[caption]
        samples = np.sin(2 * np.pi * (hertz * times + phase))
        if caption == "a beeping tone":
            samples *= np.arange(length) / length * LONGER * (3 + pace) % 1 < 0.5
    return (0.3 + 0.4 * loudness) * samples, caption


def encode_tone(index: int, waveform_length: int, sampling_rate: int) -> tuple[bytes, str]:
    """A sound that is `LONGER` than `waveform_length` as a WAV file, the same bytes each time, and its caption."""
    import soundfile  # an extra

    samples, caption = make_tone(index, int(LONGER * waveform_length), sampling_rate)
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, sampling_rate, format="WAV", subtype="PCM_16")
    return buffer.getvalue(), caption


def judge_tone(sound: Sound) -> str | None:
    """Name the kind of a sound; None for silence, and for noise that is neither low nor high.

    Noise has its power in many frequencies, a beeping tone is silent for a quarter of the time, the strongest frequency
    of a tone that rises or falls changes by 1.6 from its first to its last third, a square wave has a third harmonic.
    """
    samples = sound.samples.mean(0, dtype=np.float64)
    size, hop = round(FRAME * sound.sampling_rate), round(HOP * sound.sampling_rate)
    frames = np.lib.stride_tricks.sliding_window_view(samples, size)[::hop] * np.hanning(size)
    power, frequencies = np.abs(np.fft.rfft(frames)) ** 2, np.fft.rfftfreq(size, 1 / sound.sampling_rate)
    loudness = power.sum(1)
    loudest = np.quantile(loudness, 0.8)
    if loudest < 1e-5 * size**2:
        return None
    is_on = np.convolve(np.pad(loudness, 1, mode="edge"), np.ones(3) / 3, "valid") > 0.1 * loudest
    heard = power[is_on] / power[is_on].sum(1, keepdims=True)
    mean, track = heard.mean(0), frequencies[heard.argmax(1)]
    if np.sort(heard, 1)[:, -STRONGEST:].sum(1).mean() < NEARLY_ALL:
        shares = mean[frequencies < 1.2 * LOW_NOISE].sum(), mean[frequencies > 0.85 * HIGH_NOISE].sum()
        return "low noise" if shares[0] > MOST else "high noise" if shares[1] > MOST else None
    if is_on.mean() < 0.75:
        return "a beeping tone"
    third = max(len(track) // 3, 1)
    first, last = np.median(track[:third]), np.median(track[-third:])
    if max(first, last) > 1.6 * min(first, last):
        return "a rising tone" if last > first else "a falling tone"
    hertz = np.median(track)
    first, third = (mean[np.abs(frequencies / hertz - number) < width].sum() for number, width in ((1, 0.25), (3, 0.3)))
    if third > 0.04 * first:
        return "a low square wave" if hertz < 300 else "a high square wave"
    return "a low tone" if hertz < 450 else "a high tone"


def parse(prompt: str) -> str:
    """The caption itself. Raises ValueError for a prompt that is none."""
    if prompt not in TONES:
        raise ValueError(f"{prompt!r:.80} is no caption of builtin:tones, such as {TONES[0]!r}")
    return prompt


def share_right(sounds: Sequence[Sound], prompts: Sequence[str]) -> dict[str, float]:
    """{"tones_right": the share of the sounds that are right}. Raises ValueError for a prompt that is no caption."""
    return {"tones_right": count_right(sounds, prompts) / len(sounds)}


def count_right(sounds: Sequence[Sound], prompts: Sequence[str]) -> int:
    """How many sounds are of the kind that their prompts ("a low tone") ask for. Raises ValueError for a prompt that is
    no caption."""
    return sum(judge_tone(sound) == parse(prompt) for sound, prompt in zip(sounds, prompts, strict=True))
