"""Stable Audio 3 against the real pipeline of its own, with tiny real parts: `builtin:tiny-stable-audio-3`."""

import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from calls import Calls, assert_same, audio_config, generators
from diffusers import AutoencoderSAME, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, StableAudio3Pipeline
from diffusers.pipelines.stable_audio_3.pipeline_stable_audio_3 import logsnr_sigma_schedule
from helpers import metrics_without_times, options, pipeline_bytes, train_audio

from difftrain_utils.builtins.checkpoints import builtin_checkpoint
from difftrain_utils.builtins.tones import TONES, count_right, make_tone
from difftrain_utils.config.model import LoraConfig, ModelConfig
from difftrain_utils.errors import InputError
from difftrain_utils.evaluation.generate import generate
from difftrain_utils.families.load import load_family
from difftrain_utils.families.lora import choose_trained
from difftrain_utils.media.audio import Sound

NAME, RATE, LENGTH, HOP = "builtin:tiny-stable-audio-3", 4000, 4096, 64
PROMPTS = ["a low tone", "a rising tone"]
SHAPE = HOP, LENGTH // HOP  # of latents
config_of = partial(audio_config, NAME)


@pytest.fixture(scope="module")
def family():
    return load_family(config_of())


@pytest.fixture(scope="module")
def denoiser(family):
    return family.load_denoiser().eval()


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Path:
    """A checkpoint with a sampler that draws, and an autoencoder with random blocks: 16 samples at 44.1 kHz are one of
    latents."""
    folder = tmp_path_factory.mktemp("other") / "model"
    shutil.copytree(builtin_checkpoint(NAME), folder)
    FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, stochastic_sampling=True).save_pretrained(
        folder / "scheduler"
    )
    blocks = {"encoder_channels": 32, "encoder_c_mults": (1,), "encoder_strides": (2,), "dim_heads": 16}
    sizes = {"audio_channels": 1, "patch_size": 8, "latent_dim": HOP, "encoder_transformer_depths": (1,)}
    torch.manual_seed(0)
    AutoencoderSAME(**sizes, **blocks).save_pretrained(folder / "vae")
    return folder


def sample(family, denoiser, prompts: list[str], steps: int, guidance_scale: float, length: int = LENGTH) -> np.ndarray:
    sounds = family.generate(denoiser, prompts, length, steps, guidance_scale, 0.0, generators(len(prompts)))
    assert all(sound.sampling_rate == family.sampling_rate for sound in sounds)
    return np.stack([sound.samples for sound in sounds])


@torch.no_grad()
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_the_transformer_is_asked_as_its_pipeline_asks_it(family, denoiser, guidance_scale):
    """Hooked on the pipeline's calls: the same arguments to the bit, and the same output; of no caption, that of the
    empty one, with the duration, whose last bits depend on how many there are."""
    calls, captions = Calls(denoiser), PROMPTS if guidance_scale == 1 else [None, None, *PROMPTS]
    sample(family, denoiser, PROMPTS, 3, guidance_scale)
    conditioning = family.encode_prompts(captions)
    assert torch.equal(family.null_conditioning()["prompt_embeds"], family.encode_prompts([""])["prompt_embeds"])
    asked, exactly = calls.pop(), {"rtol": 0, "atol": 0 if guidance_scale == 1 else 1e-6}
    assert [call["timestep"][0].item() for call, _ in asked] == family.sampler.timesteps.tolist()
    assert asked[0][0]["timestep"][0] == 1, "the time, and not a thousand times that"
    for theirs, output in asked:
        given = family.predict(denoiser, theirs["hidden_states"], theirs["timestep"], conditioning)
        ((ours, _),) = calls.pop()
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name].to(value.dtype), value, **exactly)
        torch.testing.assert_close(given, output, **exactly)


def test_guidance_may_be_left_out_at_some_noise_levels(family, denoiser):
    fields = {"evaluation__guidance_scale": 3.0, "evaluation__num_inference_steps": 3}
    evaluations = [config_of(**fields, evaluation__guidance_interval=interval).evaluation for interval in
                   ([0.0, 0.1], [0.0, 0.99], [0.0, 1.0])]  # fmt: skip
    never, later, always = (
        np.stack([sound.samples for sound in generate(family, denoiser, evaluation, (LENGTH,), PROMPTS, [0, 1])])
        for evaluation in evaluations
    )
    np.testing.assert_allclose(never, sample(family, denoiser, PROMPTS, 3, 1.0), atol=1e-5)
    np.testing.assert_allclose(always, sample(family, denoiser, PROMPTS, 3, 3.0), atol=1e-5)
    assert not np.allclose(later, never, atol=1e-3) and not np.allclose(later, always, atol=1e-3)


@pytest.mark.parametrize("stochastic", [False, True])
def test_the_sampler_told_the_true_velocity_makes_the_data(family, stochastic):
    """At the pipeline's noise levels: so u = ε - x_0, its sign and its time are the schedule's, and so is the mixing of
    the pipeline that begins with a sound."""
    sampler = FlowMatchEulerDiscreteScheduler.from_config(family.sampler.config, stochastic_sampling=stochastic)
    latents, noisy = torch.randn(2, *SHAPE), torch.randn(2, *SHAPE)
    sampler.set_timesteps(sigmas=logsnr_sigma_schedule(8, -6.2, 2.0))
    time, noise = sampler.timesteps[3].expand(2), torch.randn(2, *SHAPE)
    mixed = family.schedule.add_noise(latents, noise, time)
    torch.testing.assert_close(mixed, sampler.scale_noise(latents, time, noise))
    for timestep in sampler.timesteps:
        time = timestep.expand(2)
        alphas, sigmas = (value[:, None, None] for value in family.schedule.alphas_and_sigmas(time))
        velocity = family.schedule.target(latents, (noisy - alphas * latents) / sigmas, time)
        noisy = sampler.step(velocity, timestep, noisy, generator=generators(2)).prev_sample
    torch.testing.assert_close(noisy, latents, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_seconds_of_sound_in_a_window_are_told(family, denoiser):
    """Of a window of a longer sound those of the window, as they are when it is asked for."""
    calls, waveforms = Calls(denoiser), torch.zeros(3, 1, LENGTH)
    seconds = {"seconds_start": torch.tensor([0.0, 1.5, 0.0]), "seconds_total": torch.tensor([1.024, 3.0, 0.6])}
    batch = {"waveforms": waveforms, "keys": [0, 1, 2], "captions": [*PROMPTS, None]} | seconds
    latents, conditioning = family.encode(batch, 0)
    family.predict(denoiser, latents, torch.tensor([0.01, 0.5, 0.99]), conditioning)
    ((given, _),) = calls.pop()
    pipeline = family.pipeline(denoiser)
    for row, duration in enumerate([1.024, 1.024, 0.6]):
        told = pipeline.encode_duration(duration, "cpu", 1, 1)[0]
        torch.testing.assert_close(given["global_hidden_states"][row], told)
        torch.testing.assert_close(given["encoder_hidden_states"][row, -1], told)
    assert given["encoder_attention_mask"][:, -1].all()


@torch.no_grad()
def test_captions_are_the_same_whatever_is_beside_them_and_from_caches(family, denoiser):
    together = family.encode_prompts([None, *PROMPTS])
    for row, caption in enumerate((None, *PROMPTS)):
        for key, value in family.encode_prompts([caption]).items():
            assert torch.equal(together[key][row], value[0]), key
    assert together["prompt_embeds_mask"].sum(1).tolist() == [1, 4, 4], "a word is a token, and the beginning is one"
    assert together["prompt_embeds"].shape[1] == 32
    cut = {key: value[:, :4] for key, value in together.items()}
    cut["prompt_embeds"][0, 1:] = 0.0  # what is not stored
    latents, timesteps = torch.randn(3, *SHAPE), torch.full((3,), 0.5)
    cached, direct = (family.predict(denoiser, latents, timesteps, given) for given in (cut, together))
    assert torch.equal(cached, direct)


def test_every_trained_weight_has_a_gradient_also_with_checkpointing(family, denoiser):
    """At all noise levels, and those of the pipeline for inpainting alone are not trained."""
    denoiser, gradients = family.load_denoiser(), []
    latents, conditioning = torch.randn(3, *SHAPE), family.encode_prompts([*PROMPTS, None])
    assert {name.split(".")[2] for name, weight in denoiser.named_parameters() if not weight.requires_grad} == {
        "to_local_embed"
    }
    for switch in (lambda: None, denoiser.enable_gradient_checkpointing):
        switch()
        denoiser.zero_grad()
        family.predict(denoiser, latents, torch.tensor([0.0, 0.5, 1.0]), conditioning).square().mean().backward()
        gradients.append({name: weight.grad for name, weight in denoiser.named_parameters() if weight.requires_grad})
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients[0].values())
    assert all(gradients[0][name].any() for name in ("prompt_padding_embedding", "memory_tokens"))
    assert_same(*gradients)


@torch.no_grad()
def test_the_autoencoder_is_a_transform_that_loses_nothing(family):
    tones = torch.tensor(np.stack([make_tone(index, LENGTH, RATE, seed=5)[0] for index in range(9)]))[:, None].float()
    mean, std = family.encode_images(tones).unbind(1)
    assert mean.shape == (9, *SHAPE) and not std.any()
    decoded = family.part("vae").decode(mean).sample
    torch.testing.assert_close(decoded, tones, rtol=0, atol=5e-6)
    assert mean.std().item() == pytest.approx(1, abs=0.25)
    assert count_right([Sound(samples.numpy(), RATE) for samples in decoded], TONES) == 9


def test_what_is_saved_is_its_own_pipeline_also_with_adapters(family, tmp_path):
    """Plain diffusers makes of it the sounds that the family makes, and loads no adapters of their own."""
    denoiser = family.load_denoiser().eval()
    lora = LoraConfig(rank=2, merge=True)
    choose_trained(denoiser, ModelConfig(NAME, lora=lora), family.lora_targets, 0)
    adapters = {name: weight for name, weight in denoiser.named_parameters() if weight.requires_grad}
    assert len(adapters) == 2 * 3 * 5, "two of each of a block's layers: to_qkv, to_q, to_kv, and to_out twice"
    for weight in adapters.values():
        torch.nn.init.normal_(weight, std=0.2, generator=torch.Generator().manual_seed(0))
    ours = sample(family, denoiser, PROMPTS, 3, 3.0)
    assert not np.allclose(ours, sample(family, family.load_denoiser().eval(), PROMPTS, 3, 3.0), atol=1e-2)
    family.save_pipeline(tmp_path, denoiser)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    called = {"duration": LENGTH / RATE, "num_inference_steps": 3, "guidance_scale": 3.0}
    theirs = pipeline(PROMPTS, **called, generator=generators(2)).audios
    assert type(pipeline) is StableAudio3Pipeline and theirs.shape == (2, 1, LENGTH)
    np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-5)
    assert family.digests(denoiser).keys() == {"transformer", "vae", "text_encoder", "duration_embedder"}
    with pytest.raises(InputError, match=r"^model.lora: a StableAudio3Pipeline of diffusers loads no adapters; use "):
        load_family(config_of(model__lora={"rank": 2}))


@torch.no_grad()
def test_another_checkpoint_samples_as_its_pipeline_at_any_length(other):
    """Also where the seconds times the rate are a little less or more than the samples."""
    fields = {"model__pretrained_model_name_or_path": other, "data__sampling_rate": 44100}
    family = load_family(config_of(**fields, model__train_from_scratch=True, scheduler__flow_shift=2.0))
    assert (family.hop_length, family.shift(256), family.sampler.config.shift) == (16, 2.0, 1.0)
    assert family.is_distilled and not load_family(config_of()).is_distilled
    denoiser = family.load_denoiser().eval()
    pipeline, calls = family.pipeline(denoiser), Calls(denoiser)
    for length, samples, latents in [(LENGTH, LENGTH, LENGTH), (960, 959, 960), (1440, 1440, 1456)]:
        ours = sample(family, denoiser, PROMPTS, 2, 1.0, length)
        assert ours.shape == (2, 1, length)
        assert all(call["hidden_states"].shape[2] == length // 16 for call, _ in calls.pop())
        theirs = pipeline(PROMPTS, length / 44100, 2, generator=generators(2)).audios
        assert theirs.shape == (2, 1, samples)
        assert all(call["hidden_states"].shape[2] == latents // 16 for call, _ in calls.pop())
        if latents == length:
            assert np.array_equal(ours[..., :samples], theirs.numpy())
    encoded = family.encode_images(torch.randn(2, 1, LENGTH))
    assert encoded.shape == (2, 2, HOP, LENGTH // 16)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data__sampling_rate": 44100}, r"^data.sampling_rate: .* needs 4000, got 44100$"),
        ({"data__waveform_length": 4000}, r"^data.waveform_length: .* a multiple of 64, such as 3968 or 4032, "),
        ({"data__waveform_length": 64000}, r"^data.waveform_length: .* takes 16000 at most, got 64000$"),
        ({"model__prediction_type": "sample"}, r"^model.prediction_type: must be flow_prediction for a StableAudio3P"),
        ({"scheduler__sampler": "DDIMScheduler"}, r"^scheduler.sampler: must be FlowMatchEulerDiscreteScheduler, or "),
        ({"scheduler__num_train_timesteps": 1000}, r"^scheduler.num_train_timesteps: must be null for a StableAudio3P"),
    ],
)  # fmt: skip
def test_what_the_model_cannot_take_is_refused(fields, message):
    config = config_of(**fields)
    with pytest.raises(InputError, match=message):
        load_family(config).check_waveforms(config.data)


def test_a_checkpoint_whose_sampler_its_pipeline_cannot_tell_is_refused(other, tmp_path):
    shutil.copytree(other, tmp_path / "model")
    path = tmp_path / "model/scheduler/scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_dynamic_shifting": True}))
    with pytest.raises(InputError, match=r"scheduler: use_dynamic_shifting must be false for a StableAudio3Pipeline"):
        load_family(config_of(model__pretrained_model_name_or_path=tmp_path / "model"))


@pytest.mark.slow
def test_it_trains_resumes_exactly_and_splits_to_rounding(tmp_path):
    """The promises of the script, for this family: see tests/test_train_audio.py."""
    train = {"max_steps": 4, "batch_size": 4, "cpu_threads": 1, "log_every": 1, "save_every": 2, "keep_checkpoints": 0}
    data = {"dataset": "builtin:tones", "waveform_length": LENGTH, "sampling_rate": RATE, "audio_channels": 1}
    data |= {"window": "all", "caption_dropout": 0.2, "cache_dir": tmp_path / "cache"}
    fields = {f"{section}.{name}": value for section, of in {"train": train, "data": data}.items() for name, value in
              of.items()}  # fmt: skip
    evaluation = {"evaluation.prompts": PROMPTS, "evaluation.num_inference_steps": 2, "train.eval_every": 4}
    argv = options({"model.pretrained_model_name_or_path": NAME} | fields)
    more = {
        "unbroken": evaluation,
        "resumed": evaluation | {"train.resume_from": tmp_path / "unbroken/checkpoint-2"},
        "parts": {"train.gradient_accumulation_steps": 4},
        "cached": {"data.cache_latents": True, "data.cache_text": True},
    }
    runs = {name: train_audio([*argv, *options(own | {"train.output_dir": tmp_path / name})]) for name, own in
            more.items()}  # fmt: skip
    assert pipeline_bytes(runs["resumed"]) == pipeline_bytes(runs["unbroken"])
    assert (runs["unbroken"] / "samples/step-000004-01.wav").is_file()
    losses = {name: [line["loss"] for line in metrics_without_times(run)] for name, run in runs.items()}
    assert len(losses["unbroken"]) == 4 and losses["resumed"] == losses["unbroken"][2:]
    for name in ("parts", "cached"):
        assert losses[name] == pytest.approx(losses["unbroken"], rel=1e-6)
