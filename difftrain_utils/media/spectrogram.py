"""Pictures of sounds."""

import math

import numpy as np
from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT, FLOOR = 320, 160, -80.0  # of a spectrogram in pixels, and what is black, in dB below a full sine
LEFT, BELOW = 52, 20  # pixels beside it, for the frequencies and the time
FRAME = 0.046  # seconds that are looked at at a time
COLORS = ((0, 0, 4), (81, 18, 124), (183, 55, 121), (252, 137, 97), (252, 253, 191))  # matplotlib's magma, in steps
TICKS = {100: "100 Hz", 500: "500 Hz", 1000: "1 kHz", 2000: "2 kHz", 5000: "5 kHz", 10_000: "10 kHz", 20_000: "20 kHz"}


def spectrogram(samples: np.ndarray, sampling_rate: int) -> Image.Image:
    """The power of the frequencies of a sound, (channels, samples) of which 1 is full scale, from 0 at the bottom to
    half the rate at the top, over its time, with their axes. Frequencies are on the mel scale, which is about even
    below 1 kHz and by octaves above; black is 80 dB below a sine of full scale, and white that."""
    length, nyquist = samples.shape[1], sampling_rate / 2
    level = (10 * np.log10(_power(samples, sampling_rate) + 1e-12) / -FLOOR + 1).clip(0, 1)
    at = np.linspace(0, 1, len(COLORS))
    pixels = np.stack([np.interp(level, at, channel) for channel in zip(*COLORS, strict=True)], -1)
    picture = Image.new("RGB", (LEFT + WIDTH, HEIGHT + BELOW), "white")
    picture.paste(Image.fromarray(pixels.round().astype(np.uint8)[:, ::-1].transpose(1, 0, 2)), (LEFT, 0))
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=12)
    for frequency, label in TICKS.items():
        y = HEIGHT * (1 - mel(frequency) / mel(nyquist))
        if y >= 0:
            draw.line((LEFT - 4, y, LEFT - 1, y), "black")
            draw.text((LEFT - 7, max(y, 6)), label, "black", font, anchor="rm")
    for share, anchor in ((0, "lt"), (0.5, "mt"), (1, "rt")):
        seconds = f"{share * length / sampling_rate:.3g}" + (" s" if share else "")
        draw.text((LEFT + share * (WIDTH - 1), HEIGHT + 5), seconds, "black", font, anchor=anchor)
    return picture


def mel(frequency: np.ndarray | float) -> np.ndarray | float:
    """The mels of a frequency in Hz (O'Shaughnessy 1987)."""
    return 2595 * np.log10(1 + frequency / 700)


def _power(samples: np.ndarray, sampling_rate: int) -> np.ndarray:
    """The power in each column and row of a spectrogram, (WIDTH, HEIGHT), 1 of a sine of full scale: the mean over all
    looks in a column, half a look apart at most, and the channels, and the largest of a row's frequencies."""
    size = max(2, 2 ** round(math.log2(FRAME * sampling_rate)))
    samples, window = samples.astype(np.float32), np.hanning(size).astype(np.float32)
    padded = np.pad(samples, ((0, 0), (size // 2, size)))
    looks = -(-2 * samples.shape[1] // (WIDTH * size))
    starts = np.linspace(0, samples.shape[1], WIDTH * looks, endpoint=False).astype(int)
    power = np.zeros((len(starts), size // 2 + 1))
    for channel in padded:
        frames = np.lib.stride_tricks.sliding_window_view(channel, size)[starts] * window
        power += np.abs(np.fft.rfft(frames)) ** 2 / len(padded) / (window.sum() / 2) ** 2
    power = power.reshape(WIDTH, looks, -1).mean(1)
    highest = mel(sampling_rate / 2)
    edges = 700 * (10 ** (np.linspace(0, highest, HEIGHT + 1) / 2595) - 1) / sampling_rate * size  # in bins
    within = np.linspace(edges[:-1], edges[1:], math.ceil(edges[-1] - edges[-2]) + 1, axis=-1)  # (HEIGHT, places)
    below = within.astype(int).clip(max=size // 2 - 1)
    share = within - below
    return (power[:, below] * (1 - share) + power[:, below + 1] * share).max(-1)
