import io

import numpy as np
import pytest
import soundfile
from helpers import ROOT, metrics_without_times, options, train_audio
from transformers import AutoTokenizer

from difftrain_utils.builtins.checkpoints import builtin_checkpoint
from difftrain_utils.builtins.tones import LONGER, TONES, count_right, encode_tone, judge_tone, make_tone
from difftrain_utils.config.audio_data import AudioDataConfig
from difftrain_utils.media.audio import Row, Sound, read_window

RATE, LENGTH = 4000, 4096
CONFIG = AudioDataConfig("memory", waveform_length=LENGTH, sampling_rate=RATE, audio_channels=1)


@pytest.fixture(scope="module")
def tones() -> list[tuple[np.ndarray, str]]:
    """Ten of each kind, as a run reads them: the first window of a file, the last, and those between."""
    found = []
    for index in range(90):
        content, caption = encode_tone(index, LENGTH, RATE)
        row = Row("", {"bytes": content, "path": None}, caption)
        found.append((read_window(row, index / 90, LENGTH, CONFIG).samples, caption))
    return found


def right(tones, change=lambda samples: samples) -> int:
    return count_right([Sound(change(samples), RATE) for samples, _ in tones], [caption for _, caption in tones])


def test_the_judge_names_what_was_made_and_decoded(tones):
    assert {caption for _, caption in tones} == set(TONES) and len(set(TONES)) == 9
    assert right(tones) == len(tones)


@pytest.mark.parametrize("rate", [8000, 44100])
def test_the_kinds_are_the_same_at_other_rates(rate):
    made = [make_tone(index, rate, rate, seed=1) for index in range(18)]
    assert count_right([Sound(samples[None], rate) for samples, _ in made], [caption for _, caption in made]) == 18


def test_a_sound_is_a_function_of_its_index_and_seed(tones):
    assert encode_tone(5, LENGTH, RATE) == encode_tone(5, LENGTH, RATE) != encode_tone(14, LENGTH, RATE)
    samples, _ = make_tone(5, int(LONGER * LENGTH), RATE)
    stored, rate = soundfile.read(io.BytesIO(encode_tone(5, LENGTH, RATE)[0]))
    assert rate == RATE and np.abs(stored - samples).max() < 2**-15 and np.abs(samples).max() <= 0.7
    assert not np.array_equal(samples, make_tone(5, int(LONGER * LENGTH), RATE, seed=1)[0])


def test_the_judge_hears_through_some_noise(tones):
    """Of half the standard deviation, that is, and with as much as there is sound it names few."""
    generator = np.random.default_rng(0)

    def noisy(level: float):
        return lambda samples: samples + level * samples.std() * generator.standard_normal(samples.shape)

    assert right(tones, noisy(0.5)) == len(tones) and right(tones, noisy(1.0)) <= 10
    for rate in (RATE, 44100):
        assert judge_tone(Sound(0.3 * generator.standard_normal((1, rate)), rate)) is None


TIMES = np.arange(LENGTH) / RATE
IS_ON = TIMES * 3.5 % 1 < 0.5


def sine(*hertz: float) -> np.ndarray:
    """One after another, each for as long."""
    return 0.5 * np.sin(2 * np.pi * np.cumsum(np.repeat(hertz, -(-LENGTH // len(hertz)))[:LENGTH]) / RATE)


def noise(low: float, high: float) -> np.ndarray:
    spectrum, frequencies = np.fft.rfft(np.random.default_rng(0).standard_normal(LENGTH)), np.fft.rfftfreq(LENGTH)
    spectrum[(frequencies < low / RATE) | (frequencies > high / RATE)] = 0
    samples = np.fft.irfft(spectrum, LENGTH)
    return 0.5 * samples / np.abs(samples).max()


IMPOSTORS = {
    "nothing": np.zeros(LENGTH),
    "no number": np.where(TIMES == 0, np.nan, sine(200)),
    "infinite": np.where(TIMES == 0, np.inf, sine(200)),
    "quiet": 0.04 * sine(200),
    "constant": np.full(LENGTH, 0.5),
    "a step": 0.5 * (TIMES > 0.5),
    "a click": (TIMES == 0.5) * 1.0,
    **{f"{hertz} Hz": sine(hertz) for hertz in (5, 20, 440, 460, 1500, 1900)},
    "one beep": sine(450) * ((TIMES > 0.3) & (TIMES < 0.6)),
    "a tone that stops": sine(450) * (TIMES < 0.7),
    "a short tone that rises": 0.5 * np.sin(400 * np.pi / 3 * np.expm1(3 * TIMES)) * (TIMES < 0.4),
    "up and down": sine(200, 1500, 400),
    "a jump up": sine(200, 500),
    "a jump down": sine(500, 200),
    "a jump between rises": sine(150, 180, 210, 700, 800, 900),
    "a small rise": sine(*np.linspace(400, 700, 64)),
    "two tones": (sine(200) + sine(900)) / 2,
    "a tone and its third harmonic": (sine(200) + sine(600)) / 2,
    "a sawtooth": TIMES * 200 % 1 - 0.5,
    **{f"noise of {low} to {high} Hz": noise(low, high) for low, high in ((0, 60), (0, 100), (0, 200), (0, 1000))},
    **{f"noise of {low} to {high} Hz": noise(low, high) for low, high in ((200, 300), (1400, 2000), (1500, 1600))},
    "low noise that beeps": noise(0, 500) * IS_ON,
    "high noise that beeps": noise(1100, 2000) * IS_ON,
    "a low tone that beeps": sine(200) * IS_ON,
    "beeps of two pitches": sine(*[400, 480] * 7) * IS_ON,
    "a tone through all of low noise": 0.5 * np.sin(2 * np.pi * (10 * TIMES + 235 * TIMES**2)),
}


@pytest.mark.parametrize("name", IMPOSTORS)
def test_what_is_no_sound_of_the_data_has_no_name(name):
    assert judge_tone(Sound(IMPOSTORS[name][None], RATE)) is None


def test_the_judge_hears_what_is_early_and_what_is_late(tones):
    opposite = {"a rising tone": "a falling tone", "a falling tone": "a rising tone"}
    for samples, caption in tones[:36]:
        assert judge_tone(Sound(samples[:, ::-1], RATE)) == opposite.get(caption, caption)
        halves = np.roll(samples, LENGTH // 2, 1)
        assert (judge_tone(Sound(halves, RATE)) == caption) == (caption not in opposite)


def test_a_prompt_that_is_no_caption_is_refused(tones):
    with pytest.raises(ValueError, match="'a song' is no caption of builtin:tones, such as 'a low tone'"):
        count_right([Sound(tones[0][0], RATE)], ["a song"])


def test_the_checkpoint_tells_all_captions_apart():
    """Each word is a token, and none is cut off."""
    tokenizer = AutoTokenizer.from_pretrained(builtin_checkpoint("builtin:tiny-tones"), subfolder="tokenizer")
    tokens = [tuple(tokenizer(caption).input_ids) for caption in TONES]
    assert len(set(tokens)) == len(TONES)
    assert all(len(ids) == len(caption.split()) + 1 for ids, caption in zip(tokens, TONES, strict=True))
    assert max(map(len, tokens)) <= tokenizer.model_max_length


@pytest.mark.slow
def test_a_shorter_quickstart_learns(tmp_path, monkeypatch):
    """By its loss on sounds that it is not trained on, which is 1 where nothing is known."""
    monkeypatch.setattr("difftrain_utils.data.sounds.NUM_TONES", 360)
    fields = {"train.max_steps": 200, "train.eval_every": 200, "train.save_every": 0, "train.cpu_threads": 1}
    fields |= {"train.output_dir": tmp_path / "run", "data.cache_dir": tmp_path / "cache", "evaluation.prompts": []}
    fields |= {"evaluation.shapes_judge": False, "evaluation.num_validation_samples": 64}
    run = train_audio(["--config", str(ROOT / "configs/quickstart_audio.yaml"), *options(fields)])
    assert metrics_without_times(run)[-1]["validation_loss"] < 0.9
