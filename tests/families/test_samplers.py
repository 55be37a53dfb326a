import json

import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from difftrain_utils.config.data import DataConfig
from difftrain_utils.config.evaluation import EvaluationConfig
from difftrain_utils.config.model import ModelConfig
from difftrain_utils.config.objective import SchedulerConfig
from difftrain_utils.config.text_to_image import TextToImageConfig
from difftrain_utils.errors import InputError
from difftrain_utils.families.samplers import build_schedule
from difftrain_utils.objective.schedule import PREDICTION_TYPES, Schedule, append_dims

FLOW = [FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, FlowMatchLCMScheduler]
SD15 = PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True)


def build(prediction_type=None, checkpoint=SD15, resolution=512, has_init_noise_sigma=True, evaluation=None, **fields):
    """As for Stable Diffusion, whose pipeline asks for `init_noise_sigma`, unless it is said otherwise."""
    config = TextToImageConfig(
        ModelConfig("m", prediction_type=prediction_type), DataConfig("d", resolution=resolution)
    )
    config.scheduler, config.evaluation = SchedulerConfig(**fields), evaluation or EvaluationConfig()
    return build_schedule(type(checkpoint), checkpoint.config, config, has_init_noise_sigma)


def exact_samples(schedule: Schedule, sampler, steps: int, mean: torch.Tensor, sd: torch.Tensor) -> torch.Tensor:
    """What the sampler makes of two draws of noise, -1 and 1, of whose mean and standard deviation are 0 and 1, if it
    is told the optimal prediction for normal data: x_0 = m + a·sd²·d and ε = s·d, d = (x_t - a·m) / (a²·sd² + s²). All
    is linear, so that the mean and deviation of the two are those of as many as one likes."""
    sampler.set_timesteps(steps)
    latents = torch.tensor([-1.0, 1.0], dtype=torch.float64).view(2, 1, 1, 1).expand(2, 3, 1, 1)
    latents = latents * getattr(sampler, "init_noise_sigma", 1.0)
    for timestep in sampler.timesteps:  # what the denoiser is told
        time = timestep[None].to(torch.float32 if schedule.has_continuous_time else torch.int64)
        is_flow = isinstance(sampler, tuple(FLOW))
        noisy = latents if is_flow else sampler.scale_model_input(latents, timestep)
        a, s = (append_dims(x.double(), noisy) for x in schedule.alphas_and_sigmas(time))
        d = (noisy - a * mean) / (a**2 * sd**2 + s**2)
        output = schedule.target(mean + a * sd**2 * d, s * d, time)
        latents = sampler.step(output, timestep, latents).prev_sample
    return latents


@pytest.mark.parametrize(
    ("path", "prediction_type", "fields"),
    [
        *(("linear", prediction_type, {}) for prediction_type in ("epsilon", "sample", "flow_prediction")),
        *(("cosine", prediction_type, {}) for prediction_type in ("epsilon", "sample", "v_prediction")),
        ("ddpm", "v_prediction", {"rescale_betas_zero_snr": True, "sampler": "DPMSolverMultistepScheduler"}),
        ("linear", "sample", {"sampler": "UniPCMultistepScheduler"}),
        ("linear", "flow_prediction", {"flow_shift": 2.0}),
        ("cosine", "v_prediction", {"sampler": "DDIMScheduler"}),
        ("cosine", "v_prediction", {"sampler": "CogVideoXDDIMScheduler"}),
        ("cosine", "epsilon", {"sampler": "EulerDiscreteScheduler"}),
        ("cosine", "sample", {"num_train_timesteps": 500}),
    ],
)
def test_a_sampler_that_is_told_the_optimal_predictions_makes_the_data(path, prediction_type, fields):
    """Of normal data, exactly but for the size of its steps and times that are cut to integers."""
    schedule, sampler = build(prediction_type, path=path, **fields)
    assert (schedule.path, schedule.prediction_type) == (path, prediction_type)
    mean, sd = (torch.tensor(x, dtype=torch.float64).view(3, 1, 1) for x in ([-0.8, 0.0, 1.5], [0.4, 0.7, 1.5]))
    samples = exact_samples(schedule, sampler, 200, mean, sd)
    torch.testing.assert_close((samples.mean(0) - mean) / sd, torch.zeros(3, 1, 1).double(), rtol=0, atol=0.012)
    torch.testing.assert_close(samples.std(0, correction=0) / sd, torch.ones(3, 1, 1).double(), rtol=0, atol=0.012)


@pytest.mark.parametrize("path", ["linear", "cosine"])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_what_a_pipeline_stores_is_the_same_schedule_again(path, prediction_type, tmp_path):
    if prediction_type == {"linear": "v_prediction", "cosine": "flow_prediction"}[path]:
        return
    _, sampler = build(prediction_type, path=path, num_train_timesteps=500)
    sampler.save_pretrained(tmp_path)
    stored = DPMSolverMultistepScheduler.from_pretrained(tmp_path)
    again, kept = build(checkpoint=stored)
    for found in (again, Schedule.of(stored), Schedule.of(DDPMScheduler.from_config(stored.config))):
        assert (found.path, found.prediction_type, found.num_train_timesteps) == (path, prediction_type, 500)
    assert kept.to_json_string() == sampler.to_json_string()


def test_a_checkpoint_of_another_path_keeps_nothing_of_it():
    for checkpoint in (SD15, FlowMatchEulerDiscreteScheduler(shift=3.0)):
        schedule, sampler = build("v_prediction", checkpoint, path="cosine")
        assert schedule.path == "cosine" and isinstance(sampler, DPMSolverMultistepScheduler)
        schedule, sampler = build("epsilon", sampler, path="ddpm", beta_schedule="scaled_linear")
        assert schedule.path == "ddpm" and not sampler.config.trained_betas
        assert torch.equal(schedule.alphas_cumprod, DDPMScheduler(beta_schedule="scaled_linear").alphas_cumprod)
    linear = DPMSolverMultistepScheduler(prediction_type="sample", use_flow_sigmas=True)
    assert build(checkpoint=linear)[0].path == "linear"
    assert not build("v_prediction", linear, path="cosine")[1].config.use_flow_sigmas


def test_another_prediction_stays_on_the_path_of_a_checkpoint_of_flow_matching():
    for gives_sigmas, solver in ((False, DPMSolverMultistepScheduler), (True, UniPCMultistepScheduler)):
        config = TextToImageConfig(ModelConfig("m", prediction_type="sample"), DataConfig("d"))
        own = FlowMatchEulerDiscreteScheduler(shift=3.0)
        schedule, sampler = build_schedule(type(own), own.config, config, gives_sigmas=gives_sigmas)
        assert (schedule.path, schedule.prediction_type, schedule.shift) == ("linear", "sample", 3.0)
        assert isinstance(sampler, solver) and sampler.config.flow_shift == 3.0


def test_latents_are_not_clipped_by_a_sampler_that_would_by_itself():
    of_cosine = build("v_prediction", path="cosine", sampler="DDIMScheduler")[1].config
    assert (of_cosine.clip_sample, of_cosine.steps_offset) == (False, 1)  # of which Stable Diffusion's pipelines warn
    assert not build("v_prediction", sampler="DDIMScheduler")[1].config.clip_sample
    assert build("v_prediction", DDIMScheduler(), sampler="DDPMScheduler")[1].config.clip_sample  # as the checkpoint


def test_more_inference_steps_than_there_are_timesteps_are_refused():
    """Before training, not at the first evaluation; where nothing is generated they do not matter."""
    assert build(num_train_timesteps=10)
    evaluation = EvaluationConfig(prompts=["a"])
    message = r"^evaluation.num_inference_steps: PNDMScheduler refuses 25: there are 10 timesteps$"
    with pytest.raises(InputError, match=message):
        build(num_train_timesteps=10, evaluation=evaluation)
    assert build(num_train_timesteps=25, evaluation=evaluation)


def test_one_step_that_ends_where_it_begins_is_refused_in_one_line(recwarn):
    own = FlowMatchEulerDiscreteScheduler(shift_terminal=0.1)  # LTX-Video's: of one step it makes 0 / 0
    message = r"^evaluation.num_inference_steps: FlowMatchEulerDiscreteScheduler refuses 1: its timesteps are not fin"
    with pytest.raises(InputError, match=message):
        one = EvaluationConfig(prompts=["a"], num_inference_steps=1)
        build(checkpoint=own, has_init_noise_sigma=False, evaluation=one)
    assert not recwarn.list


def test_the_checkpoints_schedule_is_kept():
    schedule, sampler = build()
    assert schedule.path == "ddpm" and isinstance(sampler, PNDMScheduler)
    assert torch.equal(schedule.alphas_cumprod, SD15.alphas_cumprod)
    assert schedule.prediction_type == sampler.config.prediction_type == "epsilon"
    assert schedule.num_train_timesteps == 1000


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_zero_terminal_snr_reaches_the_training_schedule_and_the_sampler(name):
    schedule, sampler = build("v_prediction", rescale_betas_zero_snr=True, sampler=name)
    sampler.set_timesteps(4)
    assert sampler.timesteps[0] == 999  # where there is no signal, and pictures begin
    assert schedule.alphas_cumprod[-1] == 0
    # Lin et al. 2024, arXiv:2305.08891, algorithm 1: sqrt(ᾱ) shifted to end in 0 and scaled to begin as before
    root = SD15.alphas_cumprod.double().sqrt()
    expected = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    torch.testing.assert_close(schedule.alphas_cumprod.double(), expected, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(sampler.alphas_cumprod, schedule.alphas_cumprod, rtol=0, atol=1e-6)


def test_the_config_overrides_the_schedule():
    schedule, sampler = build(beta_schedule="squaredcos_cap_v2", num_train_timesteps=100, sampler="DDIMScheduler")
    assert len(schedule.alphas_cumprod) == schedule.num_train_timesteps == 100 and isinstance(sampler, DDIMScheduler)
    expected = DDPMScheduler(num_train_timesteps=100, beta_schedule="squaredcos_cap_v2").alphas_cumprod
    assert torch.equal(schedule.alphas_cumprod, expected)


def test_flow_has_a_sampler_that_integrates_it():
    schedule, sampler = build("flow_prediction", flow_shift=2.0, flow_base_resolution=256)
    assert schedule.path == "linear" and schedule.prediction_type == "flow_prediction" and schedule.shift == 4
    assert isinstance(sampler, DPMSolverMultistepScheduler)
    # with the true velocity of a single image, x_1 = ε goes to the image
    image, noise = torch.full((1, 4, 8, 8), 0.7), torch.randn(1, 4, 8, 8)
    sampler.set_timesteps(20)
    latents = noise * sampler.init_noise_sigma
    for timestep in sampler.timesteps:
        sigma = sampler.sigmas[sampler.step_index or 0]
        velocity = (latents - image) / sigma
        latents = sampler.step(velocity, timestep, latents).prev_sample
    torch.testing.assert_close(latents, image, rtol=0, atol=1e-3)


def test_a_saved_flow_pipelines_scheduler_is_understood_again():
    _, sampler = build("flow_prediction", flow_shift=3.0)
    for checkpoint in (sampler, FlowMatchEulerDiscreteScheduler(shift=3.0)):  # the latter does not name its type
        schedule, again = build(checkpoint=checkpoint)
        assert (schedule.path, schedule.prediction_type) == ("linear", "flow_prediction") and schedule.shift == 3
        assert again.config.flow_shift == 3 and again.config.prediction_type == "flow_prediction"
    schedule, _ = build(checkpoint=sampler, flow_shift=1.0)
    assert schedule.shift == 1


@pytest.mark.parametrize(
    "checkpoint",
    [*(cls(shift=3.0) for cls in FLOW), FlowMatchEulerDiscreteScheduler(3000, 3.0, use_dynamic_shifting=True)],
)
def test_a_flow_matching_sampler_is_kept_as_it_is_unless_the_pipeline_cannot_use_it(checkpoint):
    steps = checkpoint.config.num_train_timesteps
    for prediction_type in (None, "flow_prediction"):
        for has_init_noise_sigma in (False, True):
            schedule, sampler = build(prediction_type, checkpoint, has_init_noise_sigma=has_init_noise_sigma)
            assert (schedule.path, schedule.prediction_type) == ("linear", "flow_prediction")
            assert (schedule.num_train_timesteps, schedule.shift) == (steps, 3.0)
            if has_init_noise_sigma:
                assert type(sampler) is DPMSolverMultistepScheduler and sampler.config.flow_shift == 3.0
                assert sampler.config.use_flow_sigmas and sampler.config.prediction_type == "flow_prediction"
                assert sampler.config.num_train_timesteps == steps
            else:
                assert sampler.to_json_string() == checkpoint.to_json_string()


def test_the_config_overrides_the_shift_of_a_sampler_that_is_kept():
    checkpoint = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, max_shift=1.3)
    schedule, sampler = build(None, checkpoint, 512, False, flow_shift=2.0, flow_base_resolution=1024)
    own, kept = (json.loads(scheduler.to_json_string()) for scheduler in (checkpoint, sampler))
    assert schedule.shift == 1 and kept == own | {"shift": 1.0, "use_dynamic_shifting": False}


@pytest.mark.parametrize(
    ("prediction_type", "fields", "message"),
    [
        ("flow_prediction", {"path": "ddpm"}, "flow_prediction has no sampler on the path ddpm, .* epsilon, v_pr"),
        ("flow_prediction", {"path": "cosine"}, "flow_prediction has no sampler on the path cosine, .* a . s = 1"),
        ("v_prediction", {"path": "linear"}, "v_prediction has no sampler on the path linear, .*, flow_prediction"),
        ("v_prediction", {"path": "cosine", "rescale_betas_zero_snr": True}, "rescale_betas_zero_snr: goes with the p"),
        (
            "v_prediction",
            {"path": "cosine", "flow_shift": 3.0},
            "^scheduler.flow_shift: goes with the path linear, not ",
        ),
        (None, {"flow_shift": 3.0}, "^scheduler.flow_shift: goes with the path linear, not with ddpm, got 3.0"),
        (
            "flow_prediction",
            {"flow_shift_by_tokens": [[16, 2.0], [64, 3.0]]},
            "flow_shift_by_tokens: needs flow_prediction",
        ),
        ("sample", {"path": "linear", "sampler": "DEISMultistepScheduler"}, "cannot sample sample on .* makes another"),
        (
            "sample",
            {"path": "linear", "sampler": "DDIMScheduler"},
            "scheduler.sampler: DDIMScheduler does not sample the path linear",
        ),
        (None, {"rescale_betas_zero_snr": True}, "epsilon says nothing of the image at pure noise"),
        ("v_prediction", {"rescale_betas_zero_snr": True}, "PNDMScheduler does not know this noise schedule"),
        ("sample", {}, "scheduler.sampler: PNDMScheduler cannot sample sample"),
        (None, {"sampler": "FastScheduler"}, "scheduler.sampler: diffusers has no scheduler 'FastScheduler'"),
        (None, {"sampler": "AutoencoderKL"}, "scheduler.sampler: diffusers has no scheduler 'AutoencoderKL'"),
        ("flow_prediction", {"beta_schedule": "linear"}, "scheduler.beta_schedule: goes with the path ddpm"),
        ("flow_prediction", {"sampler": "DDIMScheduler"}, "scheduler.sampler: DDIMScheduler"),
        (
            "flow_prediction",
            {"sampler": FLOW[0].__name__},
            f"scheduler.sampler: {FLOW[0].__name__} cannot .*init_noise",
        ),
        (
            "flow_prediction",
            {"sampler": FLOW[1].__name__},
            f"scheduler.sampler: {FLOW[1].__name__} cannot .*init_noise",
        ),
        (
            "flow_prediction",
            {"sampler": FLOW[2].__name__},
            f"scheduler.sampler: {FLOW[2].__name__} cannot .*init_noise",
        ),
    ],
)
def test_what_does_not_fit_is_refused(prediction_type, fields, message):
    with pytest.raises(InputError, match=message):
        build(prediction_type, **fields)


def test_euler_fits_as_it_is():
    _, sampler = build("v_prediction", sampler="EulerDiscreteScheduler")
    assert isinstance(sampler, EulerDiscreteScheduler) and sampler.config.prediction_type == "v_prediction"


@pytest.mark.parametrize(
    "checkpoint",
    [
        FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, max_shift=1.3),
        DPMSolverMultistepScheduler(
            solver_order=3, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        DDIMScheduler(clip_sample=False, set_alpha_to_one=False),
    ],
    ids=lambda checkpoint: type(checkpoint).__name__,
)
def test_the_checkpoints_own_sampler_named_once_more_is_still_its_own(checkpoint):
    _, sampler = build(checkpoint=checkpoint, has_init_noise_sigma=False, sampler=type(checkpoint).__name__)
    assert type(sampler) is type(checkpoint)
    own, kept = ({k: v for k, v in s.config.items() if not k.startswith("_")} for s in (checkpoint, sampler))
    assert kept == own


COGVIDEOX = (CogVideoXDDIMScheduler, CogVideoXDPMScheduler)


@pytest.mark.parametrize("own", COGVIDEOX)
@pytest.mark.parametrize("snr_shift_scale", [1.0, 3.0])
def test_cogvideox_trains_on_the_noise_levels_of_its_samplers(own, snr_shift_scale):
    """Which shift signal-to-noise ratios and then end in pure noise; exactly, and either of them samples it."""
    checkpoint = own(
        prediction_type="v_prediction",
        clip_sample=False,
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        snr_shift_scale=snr_shift_scale,
    )
    schedule, sampler = build(checkpoint=checkpoint)
    assert type(sampler) is own and sampler.to_json_string() == checkpoint.to_json_string()
    assert torch.equal(schedule.alphas_cumprod, checkpoint.alphas_cumprod.float()) and schedule.has_zero_terminal_snr
    latents, noise, timesteps = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2), torch.tensor([0, 500, 999])
    assert torch.equal(schedule.add_noise(latents, noise, timesteps), checkpoint.add_noise(latents, noise, timesteps))
    assert torch.equal(schedule.target(latents, noise, timesteps), checkpoint.get_velocity(latents, noise, timesteps))
    for other in COGVIDEOX:
        again, sampler = build(checkpoint=checkpoint, sampler=other.__name__)
        assert type(sampler) is other and torch.equal(again.alphas_cumprod, schedule.alphas_cumprod)
    if snr_shift_scale != 1:
        with pytest.raises(InputError, match=r"DDIMScheduler does not know .*; try CogVideoXDDIMScheduler$"):
            build(checkpoint=checkpoint, sampler="DDIMScheduler")
