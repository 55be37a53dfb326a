import itertools
from functools import partial

import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
)
from diffusers.training_utils import compute_snr as reference_snr

from difftrain_utils import objectives
from difftrain_utils.objective.schedule import PREDICTION_TYPES, Schedule, append_dims, cosine_betas

SHAPES = [(6, 4, 17), (6, 4, 8, 8), (6, 4, 3, 8, 8)]  # audio, images, video
PAIRS = list(itertools.product(("ddpm", "linear", "cosine"), PREDICTION_TYPES))


def scheduler(prediction_type: str, beta_schedule: str = "scaled_linear", **fields):
    if prediction_type == "flow_prediction":
        return FlowMatchEulerDiscreteScheduler()
    return DDPMScheduler(prediction_type=prediction_type, beta_schedule=beta_schedule, **fields)


def in_float64(path: str, prediction_type: str) -> Schedule:
    alphas_cumprod = scheduler("epsilon").alphas_cumprod.double() if path == "ddpm" else None
    return Schedule(path, prediction_type, alphas_cumprod=alphas_cumprod)


def random_input(shape, dtype=torch.float32, path="ddpm"):
    generator = torch.Generator().manual_seed(sum(shape))
    latents, noise = torch.randn(2, *shape, generator=generator, dtype=dtype)
    timesteps = torch.cat([torch.tensor([0, 999]), torch.randint(1000, (shape[0] - 2,), generator=generator)])
    return latents, noise, timesteps if path == "ddpm" else timesteps.to(dtype) * 0.999 + 0.5


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_diffusers(shape, beta_schedule):
    latents, noise, timesteps = random_input(shape)
    noise_scheduler = scheduler("v_prediction", beta_schedule)
    schedule = Schedule.of(noise_scheduler)
    expected = noise_scheduler.add_noise(latents, noise, timesteps)
    torch.testing.assert_close(schedule.add_noise(latents, noise, timesteps), expected)
    expected = noise_scheduler.get_velocity(latents, noise, timesteps)
    torch.testing.assert_close(schedule.target(latents, noise, timesteps), expected)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_a_fork_gets_the_same_of_a_scheduler_of_diffusers(prediction_type):
    latents, noise, timesteps = random_input((6, 4, 8, 8))
    noise_scheduler = scheduler(prediction_type)
    schedule = Schedule.of(noise_scheduler)
    assert (schedule.prediction_type, schedule.path == "linear") == (prediction_type, prediction_type[0] == "f")
    assert schedule.has_continuous_time == (schedule.path == "linear")
    noisy, target = (
        function(noise_scheduler, latents, noise, timesteps)
        for function in (objectives.add_noise, objectives.get_target)
    )
    assert torch.equal(noisy, schedule.add_noise(latents, noise, timesteps))
    assert torch.equal(target, schedule.target(latents, noise, timesteps))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("path", "prediction_type"), PAIRS)
def test_each_target_gives_back_the_clean_latents_and_the_noise_in_float64(shape, path, prediction_type):
    schedule = in_float64(path, prediction_type)
    latents, noise, timesteps = random_input(shape, torch.float64, path)
    a, s = (append_dims(x, latents) for x in schedule.alphas_and_sigmas(timesteps))
    total = a + s if path == "linear" else a**2 + s**2
    torch.testing.assert_close(total, torch.ones_like(a), rtol=0, atol=1e-15)
    noisy = schedule.add_noise(latents, noise, timesteps)
    target = schedule.target(latents, noise, timesteps)
    recovered = {
        "epsilon": (noisy - s * target) / a,
        "v_prediction": (a * noisy - s * target) / (a**2 + s**2),
        "sample": target,
        "flow_prediction": (noisy - s * target) / (a + s),
    }
    torch.testing.assert_close(recovered[prediction_type], latents, rtol=1e-10, atol=1e-10)
    predicted = schedule.convert(target, noisy, timesteps, "epsilon")
    torch.testing.assert_close(predicted, noise, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("to", PREDICTION_TYPES)
@pytest.mark.parametrize(("path", "prediction_type"), PAIRS)
def test_a_true_prediction_converts_to_the_true_one_of_any_type(path, prediction_type, to):
    schedule = in_float64(path, prediction_type)
    latents, noise, timesteps = random_input((6, 4, 8, 8), torch.float64, path)
    a, s = (append_dims(x, latents) for x in schedule.alphas_and_sigmas(timesteps))
    true = {"epsilon": noise, "v_prediction": a * noise - s * latents, "sample": latents}
    true["flow_prediction"] = noise - latents
    target = schedule.target(latents, noise, timesteps)
    assert torch.equal(target, true[prediction_type])
    converted = schedule.convert(target, a * latents + s * noise, timesteps, to)
    torch.testing.assert_close(converted, true[to], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("path", "prediction_type"), PAIRS)
def test_the_error_scale_is_how_errors_of_predictions_and_of_clean_latents_relate(path, prediction_type):
    schedule = in_float64(path, prediction_type)
    latents, noise, timesteps = random_input((6, 4, 8, 8), torch.float64, path)
    a, s = (append_dims(x, latents) for x in schedule.alphas_and_sigmas(timesteps))
    guess = latents.flip(1)
    implied_noise = (schedule.add_noise(latents, noise, timesteps) - a * guess) / s
    error = schedule.target(guess, implied_noise, timesteps) - schedule.target(latents, noise, timesteps)
    ratio = error.square().flatten(1).sum(1) / (guess - latents).square().flatten(1).sum(1)
    torch.testing.assert_close(schedule.error_scale(timesteps), ratio, rtol=1e-9, atol=0)


@pytest.mark.parametrize("to", PREDICTION_TYPES)
@pytest.mark.parametrize(("path", "prediction_type"), PAIRS)
def test_what_is_converted_is_finite_at_both_ends(path, prediction_type, to):
    alphas_cumprod, ends = torch.tensor([1.0, 0.5, 0.0]), torch.tensor([0, 2])
    schedule = Schedule(path, prediction_type, 2 + (path == "ddpm"), alphas_cumprod if path == "ddpm" else None)
    latents, noise = torch.randn(2, 2, 4, 3, generator=torch.Generator().manual_seed(0))
    noisy, target = schedule.add_noise(latents, noise, ends), schedule.target(latents, noise, ends)
    assert torch.equal(noisy, torch.stack([latents[0], noise[1]]))
    assert schedule.convert(target, noisy, ends, to).isfinite().all()
    assert schedule.error_scale(ends).isfinite().all() and (schedule.error_scale(ends) > 0).all()


@pytest.mark.parametrize(("path", "prediction_type"), PAIRS)
def test_a_time_for_each_frame_is_as_frame_by_frame(path, prediction_type):
    schedule = in_float64(path, prediction_type)
    latents, noise, _ = random_input((2, 4, 5, 3, 3), torch.float64)
    timesteps = random_input((10, 1), torch.float64, path)[2].reshape(2, 1, 5, 1, 1)
    assert append_dims(timesteps, latents).shape == timesteps.shape

    def by_frame(method, *values, **options):
        frames = ([value[:, :, i] for value in values] for i in range(5))
        return torch.stack([method(*frame, timesteps[:, 0, i, 0, 0], **options) for i, frame in enumerate(frames)], 2)

    noisy, target = (method(latents, noise, timesteps) for method in (schedule.add_noise, schedule.target))
    assert torch.equal(noisy, by_frame(schedule.add_noise, latents, noise))
    assert torch.equal(target, by_frame(schedule.target, latents, noise))
    for to in PREDICTION_TYPES:
        converted = schedule.convert(target, noisy, timesteps, to)
        assert torch.equal(converted, by_frame(schedule.convert, target, noisy, to=to))


def test_the_path_cosine_is_that_of_its_betas():
    """In a scheduler of diffusers, which has it at integers; and of no others."""
    noise_scheduler = DDPMScheduler(trained_betas=cosine_betas(1000), prediction_type="v_prediction")
    schedule, timesteps = Schedule.of(noise_scheduler), torch.arange(1, 1000)
    assert (schedule.path, schedule.prediction_type, schedule.has_continuous_time) == ("cosine", "v_prediction", True)
    alphas, sigmas = schedule.alphas_and_sigmas(timesteps.float())
    torch.testing.assert_close(alphas.square(), noise_scheduler.alphas_cumprod[1:], rtol=1e-4, atol=2e-6)
    angles = timesteps.double() * torch.pi / 2000
    torch.testing.assert_close(torch.stack([alphas, sigmas]).double(), torch.stack([angles.cos(), angles.sin()]))
    assert Schedule.of(scheduler("epsilon", "squaredcos_cap_v2")).path == "ddpm"
    assert Schedule.of(DDPMScheduler(trained_betas=[0.1, 0.2, 0.3])).path == "ddpm"


@pytest.mark.parametrize(("path", "slope"), [("linear", "flow_prediction"), ("cosine", "v_prediction")])
def test_noisy_latents_are_differentiable_by_a_continuous_time(path, slope):
    """Their derivative is u on the straight path, and v times the angle's on the circle: by autograd's forward mode."""
    latents, noise, timesteps = random_input((6, 4, 8, 8), torch.float64, path)
    schedule, per_time = in_float64(path, slope), 1 / 1000 if path == "linear" else torch.pi / 2000
    by_time, ones = partial(schedule.add_noise, latents, noise), torch.ones_like(timesteps)
    _, derivative = torch.func.jvp(by_time, (timesteps,), (ones,))
    torch.testing.assert_close(derivative, schedule.target(latents, noise, timesteps) * per_time, rtol=1e-9, atol=1e-12)
    for function in (schedule.snr, schedule.error_scale, lambda t: schedule.convert(noise, latents, t, "epsilon")):
        _, slopes = torch.func.jvp(function, (timesteps,), (ones,))
        assert slopes.isfinite().all() and slopes.any()


def test_flow_agrees_with_diffusers():
    latents, noise, _ = random_input((6, 4, 8, 8))
    noise_scheduler = scheduler("flow_prediction")
    schedule = Schedule.of(noise_scheduler)
    timesteps = noise_scheduler.timesteps[torch.tensor([0, 1, 300, 500, 900, 999])]
    expected = noise_scheduler.scale_noise(latents, timesteps, noise)
    torch.testing.assert_close(schedule.add_noise(latents, noise, timesteps), expected)
    # the straight line's slope
    step = schedule.add_noise(latents, noise, timesteps) + 0.1 * schedule.target(latents, noise, timesteps)
    torch.testing.assert_close(schedule.add_noise(latents, noise, timesteps + 100), step)


def test_the_snr_is_finite_and_positive_at_both_ends():
    betas_to_zero = Schedule.of(scheduler("v_prediction", rescale_betas_zero_snr=True))
    assert betas_to_zero.alphas_cumprod[-1] == 0
    for schedule, ends in (
        (betas_to_zero, torch.tensor([0, 999])),
        (Schedule.of(scheduler("flow_prediction")), torch.tensor([0.0, 1000.0])),
    ):
        snr = schedule.snr(ends)
        assert snr.isfinite().all() and (snr > 0).all() and snr[0] > 100 and snr[1] < 1e-6
    noise_scheduler, timesteps = scheduler("epsilon"), torch.arange(1000)
    torch.testing.assert_close(Schedule.of(noise_scheduler).snr(timesteps), reference_snr(noise_scheduler, timesteps))


def test_v_is_the_derivative_of_the_noisy_latents_by_the_angle():
    # x(φ) = cos φ · x_0 + sin φ · ε, v = dx/dφ (Salimans & Ho 2022, appendix D), by autograd
    latents, noise, timesteps = random_input((6, 4, 8, 8), torch.float64)
    schedule = in_float64("ddpm", "v_prediction")
    a, s = schedule.alphas_and_sigmas(timesteps)
    angle = append_dims(torch.atan2(s, a), latents)
    _, derivative = torch.func.jvp(lambda φ: φ.cos() * latents + φ.sin() * noise, (angle,), (torch.ones_like(angle),))
    torch.testing.assert_close(schedule.target(latents, noise, timesteps), derivative)


@pytest.mark.parametrize(
    "flow_class", [FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, FlowMatchLCMScheduler]
)
def test_the_flow_matching_schedulers_are_known(flow_class):
    schedule = Schedule.of(flow_class(num_train_timesteps=500, shift=3.0))
    assert (schedule.path, schedule.prediction_type) == ("linear", "flow_prediction")
    assert (schedule.num_train_timesteps, schedule.shift, schedule.alphas_cumprod) == (500, 3.0, None)


def test_a_sampler_of_flow_predictions_is_known():
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 2.0}
    schedule = Schedule.of(DPMSolverMultistepScheduler(num_train_timesteps=500, **flow))
    assert (schedule.path, schedule.prediction_type) == ("linear", "flow_prediction")
    assert (schedule.num_train_timesteps, schedule.shift, schedule.alphas_cumprod) == (500, 2.0, None)


def test_flow_sigmas_are_the_linear_path_whatever_is_predicted():
    """As the sampler has them: its x_0 is the one that `convert` gives."""
    sampler = DPMSolverMultistepScheduler(prediction_type="epsilon", use_flow_sigmas=True)
    schedule = Schedule.of(sampler)
    assert (schedule.path, schedule.prediction_type) == ("linear", "epsilon")
    sampler.set_timesteps(4)
    sampler._init_step_index(sampler.timesteps[2])
    noisy, output = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    timesteps = sampler.sigmas[2].double().expand(2) * 1000
    expected = sampler.convert_model_output(output, sample=noisy)
    torch.testing.assert_close(schedule.convert(output, noisy, timesteps, "sample"), expected, rtol=1e-5, atol=1e-5)


def test_an_unknown_prediction_type_is_refused():
    noise_scheduler = scheduler("epsilon")
    noise_scheduler.register_to_config(prediction_type="score")
    for function in (objectives.add_noise, objectives.get_target):
        with pytest.raises(ValueError, match="epsilon, v_prediction, sample, flow_prediction, got 'score'"):
            function(noise_scheduler, *random_input((2, 4, 8, 8)))


def test_a_scheduler_that_does_not_say_what_it_needs_is_refused():
    with pytest.raises(ValueError, match=r"^CMStochasticIterativeScheduler: prediction_type must be .*, got None$"):
        Schedule.of(CMStochasticIterativeScheduler())
    with pytest.raises(ValueError, match=r"^EDMEulerScheduler: it has no alphas_cumprod, and is no flow matching"):
        Schedule.of(EDMEulerScheduler(prediction_type="epsilon"))
