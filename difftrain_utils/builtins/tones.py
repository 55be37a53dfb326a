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

# What the judge goes by
FRAME, HOP = 0.064, 0.016  # seconds of a look, and from one to the next
LEAST = 0.03  # root mean square where a sound is loud; the data have 0.06 and more
IS_ON = 0.2  # of the power of the loud looks; less is a gap
MOST = 0.9  # of the looks
NEAR, NEAR_BY = (40, 0.06), 2.5  # of a pitch: Hz, or a share of it if that is more; and so many times that
NEARLY_ALL, SHARP = 0.77, 0.81  # of a tone's power is near its pitch, and of what it has near by
LOW, HIGH, MIDDLE = (120, 300), (600, 1300), (300, 700)  # Hz, wider than the data have them
ODD, THIRD = range(1, 14, 2), (0.03, 0.3)  # of a square wave: its harmonics, and the third's power to the first's, 1/9
PARTS, STEP, WHOLE = 6, 1.6, 2.0  # of a tone that rises: from each to the next at most, from first to last at least
DENSER, EVEN = 5, 0.1  # of noise: power per Hz to that elsewhere, and the least share of a quarter


def make_tone(index: int, length: int, sampling_rate: int, seed: int = 0) -> tuple[np.ndarray, str]:
    """Sound `index` of the data set, (length,) float64 within [-0.7, 0.7], and its caption, e.g. "a rising tone".

    The captions take turns; pitch, phase, loudness and pace come from (seed, index). A low tone has 150 to 250 Hz, a
    high one 700 to 1100, a high square wave half of that. What changes is of the middle halves of these: a tone rises
    from 175 to 225 Hz to 800 to 1000, equally far in equal times, and beeps have 400 to 500.
    """
    caption, generator = TONES[index % len(TONES)], generator_for(seed, "tone", index)
    pitch, phase, loudness, pace = generator.random(4)
    pitch = pitch / 2 + 0.25 if caption in ("a rising tone", "a falling tone", "a beeping tone") else pitch
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
    """Name the kind of a sound; None for what is of none, or quiet, or not finite.

    It is told by the power in looks of 64 ms, gaps left out; the strongest frequency of each is its pitch.

    - A steady tone has 77 % within 40 Hz (or 6 %) of its pitch, and of what is 2.5 times as far 81 %, where noise of
      100 Hz mostly has less. One of 120 to 300 Hz is low, one of 600 to 1300 high. A square wave has the 77 % near the
      odd multiples of its pitch, at three times that 3 to 30 % of what it has there; it is low as a tone is, or high,
      of 300 to 700 Hz.
    - A tone rises if each sixth of it is higher than the one before, none by more than 1.6 times, and the last one at
      least twice as high as the first.
    - A tone beeps if it is heard three times or more, with 77 % near one pitch of 300 to 700 Hz. All else is heard nine
      tenths of the time.
    - Noise is in all quarters of 0 to 500 Hz, or of 1100 Hz to the highest frequency, five times as much per Hz as
      elsewhere, and no pitch has half of it.

    Right are 900 of 900 sounds of the data; of 360 with white noise of 0.1, 0.3 or 0.5 of their standard deviation all;
    with such noise in the latents of `builtin:tiny-tones` 360, 338 or 307 (high noise, which is quiet, is lost first);
    with random signs of the latents 359.
    """
    samples = sound.samples.mean(0, dtype=np.float64)
    if not np.isfinite(samples).all():
        return None
    samples = samples - samples.mean()
    size, hop = round(FRAME * sound.sampling_rate), round(HOP * sound.sampling_rate)
    window = np.hanning(size)
    frames = np.lib.stride_tricks.sliding_window_view(samples, size)[::hop] * window
    loudness = np.square(frames).sum(1)
    loud = np.quantile(loudness, 0.8)
    if loud < LEAST**2 * np.square(window).sum():
        return None
    is_on = np.convolve(np.pad(loudness, 1, mode="edge"), np.ones(3) / 3, "valid") > IS_ON * loud
    power, frequencies = np.abs(np.fft.rfft(frames[is_on])) ** 2, np.fft.rfftfreq(size, 1 / sound.sampling_rate)
    track = frequencies[power.argmax(1)]
    pitch, times_heard = np.median(track), is_on[0] + (np.diff(is_on.astype(int)) == 1).sum()

    def share(pitches: np.ndarray | float, multiples: Sequence[int] = (1,), width: float = 1.0) -> float:
        """How much of the power is near multiples of a pitch, or of each look's."""
        pitches = np.reshape(pitches, (-1, 1))
        distance = np.min([np.abs(frequencies - number * pitches) for number in multiples], 0)
        return (power * (distance < width * np.maximum(NEAR[0], NEAR[1] * pitches))).sum() / power.sum()

    def is_within(limits: tuple[float, float]) -> bool:
        return ((track >= limits[0]) & (track <= limits[1])).mean() >= MOST

    along_track = share(track)
    if is_on.mean() < MOST:
        is_beeping = times_heard >= 3 and share(pitch) >= NEARLY_ALL and is_within(MIDDLE)
        return "a beeping tone" if is_beeping else None
    first, third = share(pitch), share(pitch, (3,))
    if first >= SHARP * share(pitch, width=NEAR_BY):
        if third < THIRD[0] * first and first >= NEARLY_ALL:
            return "a low tone" if is_within(LOW) else "a high tone" if is_within(HIGH) else None
        if THIRD[0] <= third / first <= THIRD[1] and share(pitch, ODD) >= NEARLY_ALL:
            return "a low square wave" if is_within(LOW) else "a high square wave" if is_within(MIDDLE) else None
    if along_track >= NEARLY_ALL:
        parts = np.array([np.median(part) for part in np.array_split(track, PARTS)])
        for caption, pitches in (("a rising tone", parts), ("a falling tone", parts[::-1])):
            if LOW[0] <= pitches[0] and pitches[-1] <= HIGH[1] and pitches[-1] >= WHOLE * pitches[0]:
                steps = pitches[1:] / pitches[:-1]
                return caption if (steps > 1).all() and (steps < STEP).all() else None
    mean = power.mean(0)
    for caption, low, high in (("low noise", 0, LOW_NOISE), ("high noise", HIGH_NOISE, frequencies[-1])):
        within = mean[(frequencies >= low) & (frequencies <= high)]
        beyond = mean[(frequencies < low - NEAR[0]) | (frequencies > high + NEAR[0])]
        is_even = min(part.sum() for part in np.array_split(within, 4)) > EVEN * within.sum()
        if is_even and within.mean() > DENSER * beyond.mean() and along_track < 0.5:
            return caption
    return None


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
