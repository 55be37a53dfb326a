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
    """Of 0.3 of the standard deviation, that is, and of 1.0 it names nothing, as of white noise alone."""
    generator = np.random.default_rng(0)

    def noisy(level: float):
        return lambda samples: samples + level * samples.std() * generator.standard_normal(samples.shape)

    assert right(tones, noisy(0.3)) >= 89 and right(tones, noisy(1.0)) == 0
    assert judge_tone(Sound(0.3 * generator.standard_normal((1, LENGTH)), RATE)) is None
    assert judge_tone(Sound(np.zeros((1, LENGTH)), RATE)) is None


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
