import numpy as np
import pytest

from difftrain_utils.media.spectrogram import HEIGHT, LEFT, WIDTH, mel, spectrogram


def test_a_sine_is_a_line_at_its_frequency():
    times = np.arange(8000) / 8000
    sines = [np.stack([np.sin(2 * np.pi * hertz * times)] * 2) for hertz in (1000, 3000)]
    shown = [np.asarray(spectrogram(samples, 8000).convert("L"))[:HEIGHT, LEFT + WIDTH // 2] for samples in sines]
    heights = [HEIGHT * (1 - mel(hertz) / mel(4000)) for hertz in (1000, 3000)]
    assert [column.argmax() for column in shown] == pytest.approx(heights, abs=2)
    assert min(column.max() for column in shown) > 200, "a sine of full scale is white"
    assert np.asarray(spectrogram(np.zeros((1, 800)), 8000))[:HEIGHT, LEFT:].max() <= 4
