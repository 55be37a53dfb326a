"""ACE-Step against the real pipeline of its own, with tiny real parts: `builtin:tiny-ace-step`."""

import json
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from calls import Calls, audio_config, generators
from diffusers import AceStepPipeline, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from helpers import AUDIO_SCRIPT, launch_two, metrics_without_times, options, pipeline_bytes, train_audio
from torch.distributed.fsdp import FSDPModule

from difftrain_utils.builtins.checkpoints import builtin_checkpoint
from difftrain_utils.builtins.tones import TONES, encode_tone
from difftrain_utils.errors import InputError
from difftrain_utils.families.load import AUDIO_FAMILIES, load_family, read_index, trained_models

NAME, LENGTH = "builtin:tiny-ace-step", 4096
PROMPTS = ["a low tone", "low noise"]  # of 67 and 68 tokens, with all that is around them
SHAPE = 64, 64  # of latents
config_of = partial(audio_config, NAME)


@pytest.fixture(scope="module")
def family():
    return load_family(config_of())


@pytest.fixture(scope="module")
def denoiser(family):
    return family.load_denoiser().eval()


def sounds(family, pipeline, guidance_scale: float = 1.0, steps: int = 2) -> np.ndarray:
    """Of the prompts, by a plain pipeline, or by the family's around a denoiser."""
    if isinstance(pipeline, torch.nn.Module):
        made = family.generate(pipeline, PROMPTS, LENGTH, steps, guidance_scale, 0.0, generators(2))
        return np.stack([sound.samples for sound in made])
    pipeline.set_progress_bar_config(disable=True)
    options = {"audio_duration": LENGTH / 4000, "num_inference_steps": steps, "guidance_scale": guidance_scale}
    pairs = zip(PROMPTS, generators(2), strict=True)
    return np.concatenate([pipeline(prompt, generator=draws, **options).audios for prompt, draws in pairs])


@torch.no_grad()
def test_the_transformer_is_asked_as_its_pipeline_asks_it(denoiser):
    """Hooked on the pipeline's call: the same arguments and outputs to the bit. Here silence is not the same
    throughout, so that which of it is told is seen."""
    family, calls = load_family(config_of()), Calls(denoiser)
    family.silence = family.part("condition_encoder").silence_latent.normal_(generator=generators(1)[0])
    sounds(family, denoiser)
    theirs = calls.pop()
    assert [len(call["encoder_hidden_states"][0]) for call, _ in theirs] == [67, 67, 68, 68]
    assert [call["timestep"].item() for call, _ in theirs] == [1.0, 0.75] * 2, "shifted by 3"
    for number, (call, output) in enumerate(theirs):
        latents = call["hidden_states"].transpose(1, 2)
        given = family.predict(denoiser, latents, call["timestep"], family.encode_prompts([PROMPTS[number // 2]]))
        ((ours, _),) = calls.pop()
        assert ours.keys() == call.keys()
        assert all(torch.equal(ours[name], value) for name, value in call.items())
        assert torch.equal(given, output.transpose(1, 2))


@torch.no_grad()
def test_nothing_is_a_state_of_its_own_as_often_as_a_caption_has_tokens(family, denoiser):
    """One of them is as good; and it is not that of an empty caption."""
    calls = Calls(denoiser)
    sounds(family, denoiser, 3.0, 1)
    theirs, output = calls.pop()[0]
    assert theirs["encoder_hidden_states"].shape[:2] == (2, 67)
    nothing, empty = family.null_conditioning(), family.encode_prompts([""])
    assert nothing.keys() == empty.keys() and nothing["prompt_embeds_mask"].sum() == 1
    assert all(nothing[name].shape == value.shape for name, value in empty.items())
    latents, times = theirs["hidden_states"][1:].transpose(1, 2), theirs["timestep"][1:]
    given = family.predict(denoiser, latents, times, nothing)
    torch.testing.assert_close(given, output[1:].transpose(1, 2), rtol=1e-5, atol=1e-5)
    assert (family.predict(denoiser, latents, times, empty) - given).abs().max() > 1e-2


def test_the_sampler_told_the_true_velocity_makes_the_data(family):
    """So its path, the velocity's sign and the times are the schedule's, and its shift is the one of training."""
    sampler, latents, noise = family.sampler, torch.randn(1, *SHAPE), torch.randn(1, *SHAPE)
    times = AceStepPipeline._get_timestep_schedule(None, 8, dtype=torch.float32)
    even, shift = 1 - torch.arange(8) / 8, family.shift(SHAPE[1])
    torch.testing.assert_close(times, shift * even / (1 + (shift - 1) * even))
    sampler.set_timesteps(sigmas=times.tolist())
    noisy = noise
    for time in sampler.timesteps:
        torch.testing.assert_close(noisy, family.schedule.add_noise(latents, noise, time[None]))
        noisy = sampler.step(family.schedule.target(latents, noise, time[None]), time, noisy).prev_sample
    torch.testing.assert_close(noisy, latents)


@torch.no_grad()
def test_a_caption_counts_as_it_does_alone(family, denoiser, monkeypatch):
    """Whatever is beside it in the batch and the cache, for the denoiser is asked of those of its length; one whose
    weights are shared out as often as there are samples."""
    captions = [None, *PROMPTS, PROMPTS[0]]
    together, latents, times = family.encode_prompts(captions), torch.randn(4, *SHAPE), torch.rand(4)
    cut = {key: value[:, :68] for key, value in together.items()}
    calls = Calls(denoiser)
    cached, direct = (family.predict(denoiser, latents, times, given) for given in (cut, together))
    assert torch.equal(cached, direct)
    assert [len(call["hidden_states"]) for call, _ in calls.pop()] == [1, 2, 1] * 2
    for row, caption in enumerate(captions):
        alone = family.encode_prompts([caption])
        assert all(torch.equal(value[0], together[key][row]) for key, value in alone.items())
        given = family.predict(denoiser, latents[row : row + 1], times[row : row + 1], alone)
        torch.testing.assert_close(direct[row], given[0], rtol=1e-5, atol=1e-5)
    calls.pop()
    monkeypatch.setattr(denoiser, "__class__", type("Shared", (type(denoiser), FSDPModule), {}))
    torch.testing.assert_close(family.predict(denoiser, latents, times, cut), direct, rtol=1e-5, atol=1e-5)
    assert [len(call["hidden_states"]) for call, _ in calls.pop()] == [1] * 4


def test_a_caption_says_how_long_a_window_is(family):
    """So caches of captions are of windows that last as long."""
    longer = load_family(config_of(data__waveform_length=2 * LENGTH))
    ours, its = (each.encode_prompts(PROMPTS)["prompt_embeds"] for each in (family, longer))
    assert ours.shape == its.shape and not torch.equal(ours, its)
    ours, its = (each.describe_parts(*each.text_parts) for each in (family, longer))
    assert {name for name in ours if ours[name] != its[name]} == {"audio_duration"}
    assert {"condition_encoder", "text_encoder"} <= ours.keys()


def test_every_weight_has_a_gradient(family, denoiser):
    latents, conditioning = torch.randn(3, *SHAPE), family.encode_prompts([*PROMPTS, None])
    family.predict(denoiser, latents, torch.tensor([0.0, 0.5, 1.0]), conditioning).square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in denoiser.parameters())
    denoiser.zero_grad()


def test_what_is_saved_is_its_own_pipeline(family, denoiser, tmp_path):
    """Plain diffusers makes of it the sounds that the family makes, with guidance; parts that training has no use for
    are still there."""
    family.save_pipeline(tmp_path, denoiser)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(pipeline) is AceStepPipeline and pipeline.audio_tokenizer is not None
    ours = sounds(family, denoiser, 3.0)
    assert ours.shape == (2, 1, LENGTH) and np.array_equal(sounds(family, pipeline, 3.0), ours)
    assert np.abs(ours).max() == pytest.approx(10 ** (-1 / 20)), "the pipeline's loudness"
    described = AUDIO_FAMILIES["AceStepPipeline"](tmp_path, None, None, read_index(str(tmp_path), None)[1], None, None)
    assert described.max_length_in_s == 240 and described.length_options(pipeline, LENGTH, generators(1))["shift"] == 3
    own = {"transformer", "vae", "text_encoder", "condition_encoder", "audio_tokenizer", "audio_token_detokenizer"}
    assert family.digests(denoiser).keys() == own
    assert not {"audio_tokenizer", "audio_token_detokenizer"} & load_family(config_of())._parts.keys()


def test_plain_diffusers_loads_its_adapters(family, tmp_path):
    config = config_of(model__lora__rank=4, model__lora__alpha=8)
    adapted = trained_models(family, config)["denoiser"].eval()
    pipeline = family.pipeline(family.load_denoiser().eval())
    before = sounds(family, pipeline)
    assert np.array_equal(sounds(family, adapted), before)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if ".lora_B" in name:
                weight.copy_(torch.randn(weight.shape, generator=generators(1)[0]) / 4)
    ours = sounds(family, adapted)
    family.save_lora(tmp_path, adapted)
    pipeline.load_lora_weights(tmp_path)
    assert np.array_equal(sounds(family, pipeline), ours) and not np.array_equal(ours, before)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model__prediction_type": "sample"}, r"^model.prediction_type: must be flow_prediction for a AceStep"),
        ({"scheduler__sampler": "UniPCMultistepScheduler"}, r"^scheduler.sampler: must be FlowMatchEulerDiscrete"),
        ({"scheduler__num_train_timesteps": 1000}, r"^scheduler.num_train_timesteps: must be 1, or null for a Ace"),
        ({"evaluation__guidance_rescale": 0.7}, r"^evaluation.guidance_rescale: a AceStepPipeline has none, got "),
        ({"train__compile": "whole"}, r"^train.compile: not for an AceStepPipeline, whose transformer would be"),
        ({"model__max_sequence_length": 64}, r"^model.max_sequence_length: a AceStepPipeline has none, got 64$"),
    ],
)  # fmt: skip
def test_what_the_pipeline_has_not_is_refused(fields, message):
    with pytest.raises(InputError, match=message):
        load_family(config_of(**fields))


def test_windows_are_of_whole_latents_and_no_longer_than_the_silence(family):
    family.check_waveforms(config_of(data__waveform_length=LENGTH + 64).data)
    with pytest.raises(InputError, match=r"^data.waveform_length: .* a multiple of 64, such as 4096 or 4160, got "):
        family.check_waveforms(config_of(data__waveform_length=4100).data)
    with pytest.raises(InputError, match=r"^data.waveform_length: .* takes 960000 at most, got 1000000$"):
        family.check_waveforms(config_of(data__waveform_length=1000000).data)


def test_the_checkpoint_says_what_it_is(tmp_path):
    """A distilled one; and one whose sampler counts the time otherwise is refused."""
    shutil.copytree(builtin_checkpoint(NAME), tmp_path / "model")
    path = tmp_path / "model/transformer/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"is_turbo": True}))
    fields = {"model__pretrained_model_name_or_path": tmp_path / "model", "model__train_from_scratch": True}
    turbo = load_family(config_of(**fields, scheduler__flow_shift=1.0))
    assert turbo.is_distilled and turbo.shift(64) == 1.0 and turbo.sampler.config.shift == 1.0
    FlowMatchEulerDiscreteScheduler().save_pretrained(tmp_path / "model/scheduler")
    with pytest.raises(InputError, match=r"scheduler: num_train_timesteps must be 1 for an AceStepPipeline, got 1000"):
        load_family(config_of(**fields))


@pytest.mark.slow
def test_it_trains_resumes_and_splits(tmp_path):
    """Two processes with a share of the weights each have captions of unequally many lengths."""
    sounds_folder = tmp_path / "sounds"
    sounds_folder.mkdir()
    with (sounds_folder / "metadata.jsonl").open("w") as lines:
        for number in range(9):
            (sounds_folder / f"{number}.wav").write_bytes(encode_tone(number, LENGTH, 4000)[0])
            lines.write(json.dumps({"file_name": f"{number}.wav", "text": TONES[number]}) + "\n")
    train = {"output_dir": tmp_path / "run", "max_steps": 4, "batch_size": 4, "cpu_threads": 1, "log_every": 1}
    train |= {"save_every": 2, "eval_every": 4, "keep_checkpoints": 0}
    data = {"dataset": sounds_folder, "waveform_length": LENGTH, "sampling_rate": 4000, "audio_channels": 1}
    data |= {"validation_dataset": sounds_folder, "caption_dropout": 0.2, "cache_dir": tmp_path / "cache"}
    evaluation = {"prompts": PROMPTS, "num_inference_steps": 2, "num_validation_samples": 8}
    sections = {"model": {"pretrained_model_name_or_path": NAME}, "data": data, "train": train}
    sections |= {"evaluation": evaluation}
    argv = options({f"{section}.{name}": value for section, of in sections.items() for name, value in of.items()})

    def losses(name: str, **fields) -> list[float]:
        fields |= {"train.output_dir": tmp_path / name}
        return [metrics["loss"] for metrics in metrics_without_times(train_audio([*argv, *options(fields)]))]

    whole = losses("run")
    resumed = ["--output-dir", str(tmp_path / "resumed"), "--resume-from", str(tmp_path / "run/checkpoint-2")]
    assert pipeline_bytes(train_audio([*argv, *resumed])) == pipeline_bytes(tmp_path / "run")
    without = {"train.eval_every": 0, "train.save_every": 0}
    assert losses("parts", **without, **{"train.gradient_accumulation_steps": 4}) == pytest.approx(whole, rel=1e-5)
    caches = {"data.window": "all", "data.cache_latents": True, "data.cache_text": True}
    plain = losses("plain", **without, **{"data.window": "all"})
    assert losses("cached", **without, **caches) == pytest.approx(plain, rel=1e-6)
    shared = {"train.shard": "full", "train.output_dir": tmp_path / "shared"}
    launch_two([*argv, *options(shared)], script=AUDIO_SCRIPT).check_returncode()
    last, other = (metrics_without_times(tmp_path / name) for name in ("shared", "run"))
    assert [metrics["loss"] for metrics in last] == pytest.approx(whole, rel=1e-5)
    assert last[-1]["validation_loss"] == pytest.approx(other[-1]["validation_loss"], rel=1e-5)
