"""Stable Audio against the real pipeline of its own, with tiny real parts: `builtin:tiny-stable-audio`."""

import copy
import dataclasses
import json
import math
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from calls import Calls, audio_config, generators
from diffusers import AutoencoderOobleck, CosineDPMSolverMultistepScheduler, DiffusionPipeline
from diffusers.utils.torch_utils import randn_tensor
from helpers import parse_config

from difftrain_utils.builtins.checkpoints import builtin_checkpoint
from difftrain_utils.builtins.tones import TONES, count_right, make_tone
from difftrain_utils.errors import InputError
from difftrain_utils.evaluation.generate import generate
from difftrain_utils.evaluation.guidance import load_weaker, noise_levels
from difftrain_utils.families.load import load_family
from difftrain_utils.media.audio import Sound
from difftrain_utils.objective.schedule import append_dims

NAME, RATE, LENGTH, HOP = "builtin:tiny-stable-audio", 4000, 4096, 64
PROMPTS = ["a low tone", "a rising tone"]
SHAPE = HOP, LENGTH // HOP  # of latents
config_of = partial(audio_config, NAME)


@pytest.fixture(scope="module")
def family():
    return load_family(config_of())


@pytest.fixture(scope="module")
def denoiser(family):
    return family.load_denoiser().eval()


def sample(family, denoiser, prompts: list[str], steps: int, guidance_scale: float = 1.0) -> np.ndarray:
    sounds = family.generate(denoiser, prompts, LENGTH, steps, guidance_scale, 0.0, generators(len(prompts)))
    assert all(sound.sampling_rate == RATE for sound in sounds)
    return np.stack([sound.samples for sound in sounds])


def times_of(schedule, sampler) -> torch.Tensor:
    """The schedule's timesteps of the noise levels that a sampler was at, in float64."""
    return schedule.num_train_timesteps * 2 / math.pi * sampler.sigmas[:-1].double().atan()


def first_latents(family, count: int) -> torch.Tensor:
    """What the transformer is given first by the pipeline."""
    sigma = family.sampler.config.sigma_max
    noise = randn_tensor((count, *SHAPE), generator=generators(count)) * family.sampler.init_noise_sigma
    return noise / math.sqrt(sigma**2 + 1)


@torch.no_grad()
def test_the_transformer_is_asked_as_its_pipeline_asks_it(family, denoiser):
    """Hooked on the pipeline's call: the same arguments to the bit, but for the noise level, which it tells for all
    samples at once."""
    calls = Calls(denoiser)
    sample(family, denoiser, PROMPTS, 2)
    first, second = calls.pop()
    assert [call["timestep"].item() for call, _ in (first, second)] == family.sampler.timesteps.tolist()
    for (theirs, output), time in zip((first, second), times_of(family.schedule, family.sampler), strict=True):
        latents = theirs["hidden_states"]
        given = family.predict(denoiser, latents, time.expand(2), family.encode_prompts(PROMPTS))
        ((ours, _),) = calls.pop()
        assert ours.keys() == theirs.keys()
        assert torch.equal(ours["encoder_hidden_states"], theirs["encoder_hidden_states"])
        assert torch.equal(ours["global_hidden_states"], theirs["global_hidden_states"])
        assert all(map(torch.equal, ours["rotary_embedding"], theirs["rotary_embedding"]))
        assert torch.equal(ours["timestep"].float(), theirs["timestep"].expand(2))
        torch.testing.assert_close(given, output, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(first[0]["hidden_states"], first_latents(family, 2))


@torch.no_grad()
def test_nothing_is_zeros_for_the_caption_and_for_the_seconds_among_its_tokens(family, denoiser):
    calls = Calls(denoiser)
    sample(family, denoiser, PROMPTS[:1], 1, 3.0)
    ((theirs, output),) = calls.pop()
    nothing = family.encode_prompts([None])
    both, time = family.encode_prompts([None, PROMPTS[0]]), times_of(family.schedule, family.sampler).expand(2)
    ours = family.predict(denoiser, theirs["hidden_states"], time, both)
    ((given, _),) = calls.pop()
    for name in ("encoder_hidden_states", "global_hidden_states"):
        torch.testing.assert_close(given[name], theirs[name], rtol=1e-5, atol=1e-6)
    assert not given["encoder_hidden_states"][0].any() and not theirs["encoder_hidden_states"][0].any()
    assert theirs["global_hidden_states"][0].any() and not nothing["prompt_embeds"].any()
    assert family.encode_prompts([""])["prompt_embeds"].any(), "which is not that of an empty caption"
    torch.testing.assert_close(ours, output, rtol=1e-5, atol=1e-5)


def test_the_sampler_told_the_true_velocity_makes_the_data(family):
    """So v, its sign, and the scale of what the transformer is given are the schedule's: v = cos·ε - sin·x_0."""
    sampler, latents = copy.deepcopy(family.sampler), torch.randn(1, *SHAPE)
    sampler.set_timesteps(20)
    noisy = torch.randn(1, *SHAPE) * sampler.init_noise_sigma
    for timestep, time in zip(sampler.timesteps, times_of(family.schedule, sampler), strict=True):
        given, time = sampler.scale_model_input(noisy, timestep), time[None].float()
        alphas, sigmas = (append_dims(value, latents) for value in family.schedule.alphas_and_sigmas(time))
        velocity = family.schedule.target(latents, (given - alphas * latents) / sigmas, time)
        noisy = sampler.step(velocity, timestep, noisy).prev_sample
    torch.testing.assert_close(noisy, latents, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_the_seconds_of_a_window_are_told(family, denoiser):
    calls, waveforms = Calls(denoiser), torch.zeros(2, 1, LENGTH)
    seconds = {"seconds_start": torch.tensor([0.0, 1.5]), "seconds_total": torch.tensor([1.024, 3.0])}
    batch = {"waveforms": waveforms, "keys": [0, 1], "captions": PROMPTS} | seconds
    latents, conditioning = family.encode(batch, 0)
    family.predict(denoiser, latents, torch.tensor([10.0, 990.0]), conditioning)
    ((given, _),) = calls.pop()
    pipeline = family.pipeline(denoiser)
    for row, (start, end) in enumerate([(0.0, 1.024), (1.5, 3.0)]):
        told = torch.cat(pipeline.encode_duration(start, end, "cpu", False, 1), 1)
        torch.testing.assert_close(given["encoder_hidden_states"][row, -2:], told[0])
        torch.testing.assert_close(given["global_hidden_states"][row, 0], told.flatten())


@torch.no_grad()
def test_captions_are_the_same_whatever_is_beside_them_and_from_caches(family, denoiser):
    together = family.encode_prompts([None, *PROMPTS])
    for row, caption in enumerate((None, *PROMPTS)):
        for key, value in family.encode_prompts([caption]).items():
            assert torch.equal(together[key][row], value[0]), key
    mask = together["prompt_embeds_mask"]
    assert mask.sum(1).tolist() == [0, 4, 4] and mask.shape[1] == 32, "a word is a token, and the end is one"
    cut = {key: value[:, :4] for key, value in together.items()}
    latents, timesteps = torch.randn(3, *SHAPE), torch.full((3,), 500.0)
    cached, direct = (family.predict(denoiser, latents, timesteps, given) for given in (cut, together))
    assert torch.equal(cached, direct)


def test_every_weight_has_a_gradient_at_all_noise_levels(family, denoiser):
    """Also where there is none, and nothing else."""
    latents, conditioning = torch.randn(3, *SHAPE), family.encode_prompts([*PROMPTS, None])
    family.predict(denoiser, latents, torch.tensor([0.0, 500.0, 1000.0]), conditioning).square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in denoiser.named_parameters() if parameter.requires_grad}
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())
    denoiser.zero_grad()


@torch.no_grad()
def test_the_autoencoder_is_a_transform_that_loses_nothing(family, tmp_path):
    """But for half a window at both ends; also after it is loaded, and whatever the signs of its coefficients are, the
    judge knows the sounds."""
    tones = torch.tensor(np.stack([make_tone(index, LENGTH, RATE, seed=5)[0] for index in range(9)]))[:, None].float()
    mean, std = family.encode_images(tones).unbind(1)
    vae = family.part("vae")
    assert mean.shape == (9, *SHAPE) and std.max() < 2e-4
    decoded = vae.decode(mean).sample
    torch.testing.assert_close(decoded[..., HOP:-HOP], tones[..., HOP:-HOP], rtol=0, atol=5e-6)
    assert mean.std().item() == pytest.approx(1, abs=0.25)
    unit = vae.decode(torch.eye(HOP)[:, :, None] * torch.eye(9)[4]).sample[:, 0]  # each coefficient alone
    gram = unit @ unit.T
    torch.testing.assert_close(gram, torch.diag(gram.diagonal()), rtol=0, atol=1e-5)
    vae.save_pretrained(tmp_path)
    again = AutoencoderOobleck.from_pretrained(tmp_path)
    assert torch.equal(again.decode(mean).sample, decoded)
    signs = torch.randint(0, 2, mean.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    sounds = [Sound(samples.numpy(), RATE) for samples in vae.decode(mean * signs).sample]
    assert count_right(sounds, TONES) == 9


def test_the_autoencoder_encodes_in_tiles_of_whole_latents(family):
    """In which a sound has the latents that it has in one piece."""
    tiled = load_family(config_of(model__vae_tiling=True))
    assert tiled.tile_size == (30 * RATE // HOP * HOP,)
    vae, waveforms = tiled.part("vae"), torch.from_numpy(make_tone(4, LENGTH, RATE)[0])[None, None].float()
    vae.tile_sample_min_length, vae.tile_sample_overlap = 1000, 150  # as 30 and 2 seconds are to 2048 samples
    whole, between = family.encode_images(waveforms), tiled.encode_images(waveforms)
    tiled._cut_up(vae)
    of_tiles = tiled.encode_images(waveforms)
    assert vae.tile_sample_min_length == 960 and of_tiles.shape == whole.shape
    assert (of_tiles - whole).abs().max() < 1e-5
    assert between.shape != whole.shape or (between - whole).abs().max() > 0.1  # why they have to be


def test_what_is_saved_is_its_own_pipeline_of_the_runs_length(tmp_path):
    """Plain diffusers makes of it the sounds that the family makes."""
    half = load_family(config_of(data__waveform_length=LENGTH // 2))
    denoiser = half.load_denoiser().eval()
    half.save_pipeline(tmp_path, denoiser)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(pipeline) is half.pipeline_class and pipeline.transformer.config.sample_size == 32
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(PROMPTS, num_inference_steps=2, guidance_scale=3.0, generator=generators(2)).audios
    ours = half.generate(denoiser, PROMPTS, LENGTH // 2, 2, 3.0, 0.0, generators(2))
    assert theirs.shape == (2, 1, LENGTH // 2)
    assert np.array_equal(theirs.numpy(), np.stack([sound.samples for sound in ours]))
    assert half.digests(denoiser).keys() == {"transformer", "vae", "text_encoder", "projection_model"}


@torch.no_grad()
def test_a_sound_has_all_its_samples_where_its_seconds_have_one_less(tmp_path):
    """At 44.1 kHz those of 23 latents of 64 samples times the rate are 1471.99…, and so they are of plain diffusers."""
    shutil.copytree(builtin_checkpoint(NAME), tmp_path / "model")
    path = tmp_path / "model/vae/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sampling_rate": 44100}))
    fields = {"model__pretrained_model_name_or_path": tmp_path / "model", "data__sampling_rate": 44100}
    for whole in (23 * HOP, 24 * HOP):  # the most that the pipeline takes, and less
        family = load_family(config_of(**fields, data__waveform_length=whole))
        denoiser = family.load_denoiser().eval()
        (ours,) = family.generate(denoiser, PROMPTS[:1], 23 * HOP, 2, 1.0, 0.0, generators(1))
        pipeline, end = family.pipeline(denoiser), 23 * HOP / 44100
        options = {"audio_end_in_s": end, "num_inference_steps": 2, "guidance_scale": 1.0}
        theirs = pipeline(PROMPTS[:1], **options, generator=generators(1)).audios
        assert theirs.shape == (1, 1, 23 * HOP - 1) and ours.samples.shape == (1, 23 * HOP)
        assert np.array_equal(ours.samples[:, :-1], theirs[0].numpy())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data__sampling_rate": 44100}, r"^data.sampling_rate: .* needs 4000, got 44100$"),
        ({"data__audio_channels": 2}, r"^data.audio_channels: .* needs 1, got 2$"),
        ({"data__waveform_length": 4000}, r"^data.waveform_length: .* a multiple of 64, such as 3968 or 4032, "),
        ({"data__waveform_length": 64000}, r"^data.waveform_length: .* takes 16000 at most, got 64000$"),
        ({"model__pretrained_model_name_or_path": "builtin:tiny-audio"},
         r"tiny-audio: no such builtin; there is builtin:tiny-stable-audio, .*, builtin:tiny-ace-step$"),
        ({"model__prediction_type": "epsilon"}, r"^model.prediction_type: must be v_prediction for a StableAudio"),
        ({"scheduler__sampler": "DDIMScheduler"}, r"^scheduler.sampler: must be EDMDPMSolverMultistepScheduler, "),
        ({"scheduler__beta_schedule": "linear"}, r"^scheduler.beta_schedule: must be null for a StableAudioPipeline"),
        ({"evaluation__guidance_rescale": 0.7}, r"^evaluation.guidance_rescale: a StableAudioPipeline has none, got "),
    ],
)  # fmt: skip
def test_what_the_model_cannot_take_is_refused(fields, message):
    config = config_of(**fields)
    with pytest.raises(InputError, match=message):
        load_family(config).check_waveforms(config.data)


@torch.no_grad()
def test_a_checkpoint_of_the_other_sampler_is_told_the_noise_as_that_tells_it(tmp_path, denoiser):
    """2 / π · atan(σ), which is the fraction of the schedule."""
    shutil.copytree(builtin_checkpoint(NAME), tmp_path / "model")
    CosineDPMSolverMultistepScheduler(sigma_min=0.3, sigma_max=500.0).save_pretrained(tmp_path / "model/scheduler")
    index = json.loads((tmp_path / "model/model_index.json").read_text())
    index["scheduler"] = ["diffusers", "CosineDPMSolverMultistepScheduler"]
    (tmp_path / "model/model_index.json").write_text(json.dumps(index))
    fields = {"model__pretrained_model_name_or_path": tmp_path / "model", "model__train_from_scratch": True}
    family, calls = load_family(config_of(**fields)), Calls(denoiser)
    timesteps = torch.tensor([0.0, 250.0, 999.0])
    family.predict(denoiser, torch.randn(3, *SHAPE), timesteps, family.encode_prompts([*PROMPTS, None]))
    ((given, _),) = calls.pop()
    torch.testing.assert_close(given["timestep"], timesteps / 1000, rtol=0, atol=1e-6)
    assert sample(family, denoiser, PROMPTS, 2).shape == (2, 1, LENGTH)


def test_it_is_of_sounds_alone(short_run):
    with pytest.raises(InputError, match=r"it is of StableAudioPipeline: train it with train_text_to_audio.py$"):
        load_family(parse_config([*short_run, "--model.pretrained_model_name_or_path", NAME]))


@torch.no_grad()
def test_it_guides_at_the_noise_levels_asked_for_and_by_a_weaker_model(family, denoiser, tmp_path):
    """The interval is of the schedule's noise levels, whatever the sampler calls them."""
    config = dataclasses.replace(config_of().evaluation, num_inference_steps=4, guidance_scale=30.0)

    def draw(weaker=None, **fields) -> np.ndarray:
        made = generate(family, denoiser, dataclasses.replace(config, **fields), (LENGTH,), PROMPTS, [0, 1], weaker)
        return np.stack([sound.samples for sound in made])

    guided, unguided = draw(), draw(guidance_scale=1.0)
    levels, schedule = noise_levels(family.schedule, family.sampler), family.schedule
    alphas, sigmas = schedule.alphas_and_sigmas(times_of(schedule, family.sampler))
    assert levels == pytest.approx((sigmas / (alphas + sigmas)).tolist(), abs=1e-6) and len(levels) == 4
    assert np.array_equal(draw(guidance_interval=[0.0, 1.0]), guided), "everywhere is plain guidance, to the bit"
    between = (levels[1] + levels[2]) / 2
    intervals = [between, between + 1e-6], [between, 1], [0, between]
    nowhere, noisy, rest = (draw(guidance_interval=interval) for interval in intervals)
    np.testing.assert_allclose(nowhere, unguided, atol=1e-5)
    assert all(np.abs(some - other).max() > 0.1 for some in (noisy, rest) for other in (guided, unguided))

    family.save_pipeline(tmp_path, denoiser)
    same = load_weaker(family, family.sampler, str(tmp_path), "cpu", torch.float32)
    np.testing.assert_allclose(draw(same), unguided, atol=1e-5)
    weaker = copy.deepcopy(same)
    for parameter in weaker.parameters():
        parameter.mul_(0.9)
    assert np.abs(draw(weaker) - unguided).max() > 0.1
