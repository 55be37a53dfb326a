import math

import pytest
import torch
from diffusers import DDPMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_loss_weighting_for_sd3

from difftrain_utils.config.objective import LossConfig
from difftrain_utils.objective.loss import (
    VANISHING,
    LearnedUncertainty,
    clean_weight,
    elementwise_loss,
    huber_threshold,
    loss_weights,
    sample_losses,
)
from difftrain_utils.objective.schedule import PREDICTION_TYPES, Schedule, append_dims

WEIGHTINGS = ["snr", "min_snr", "soft_min_snr", "p2", "debiased", "edm", "flow", "sigma_sqrt", "cosmap"]


def schedule_of(prediction_type: str, **fields) -> Schedule:
    if prediction_type == "flow_prediction":
        return Schedule.of(FlowMatchEulerDiscreteScheduler())
    return Schedule.of(DDPMScheduler(prediction_type=prediction_type, beta_schedule="scaled_linear", **fields))


def all_timesteps(prediction_type: str) -> torch.Tensor:
    return torch.arange(1, 1000).float() if prediction_type == "flow_prediction" else torch.arange(1000)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_a_weighted_loss_is_the_stated_weight_on_the_clean_latents_error(prediction_type, weighting):
    """A model that says x̂_0 in its own parametrisation, at a given x_t: the weighted losses agree."""
    config, schedule = LossConfig(weighting=weighting, edm_sigma_data=0.5), schedule_of(prediction_type)
    generator = torch.Generator().manual_seed(0)
    latents, noise, guess = torch.randn(3, 50, 4, 8, 8, generator=generator, dtype=torch.float64)
    timesteps = all_timesteps(prediction_type)[torch.linspace(0, 998, 50).long()]
    noisy = schedule.add_noise(latents, noise, timesteps)
    a, s = (append_dims(x.double(), latents) for x in schedule.alphas_and_sigmas(timesteps))
    implied_noise = (noisy - a * guess) / s
    output = schedule.target(guess, implied_noise, timesteps)
    target = schedule.target(latents, noise, timesteps)
    loss = (output - target).square().flatten(1).mean(1) * loss_weights(config, schedule, timesteps)
    clean_error = (guess - latents).square().flatten(1).mean(1)
    expected = clean_weight(config, schedule.snr(timesteps)) * clean_error
    torch.testing.assert_close(loss, expected, rtol=2e-4, atol=0)
    assert torch.equal(sample_losses(config, schedule, output, target, timesteps), loss)


class TestMasks:
    FIELDS = (
        {},
        {"weighting": "min_snr"},
        {"type": "huber", "huber_schedule": "snr", "weighting": "debiased"},
        {"type": "l1"},
    )

    def draw(self) -> tuple[torch.Tensor, ...]:
        generator = torch.Generator().manual_seed(0)
        output, target = torch.randn(2, 3, 4, 2, 2, generator=generator)
        return output, target, torch.tensor([10, 500, 990])

    @pytest.mark.parametrize("fields", FIELDS)
    def test_where_all_is_white_nothing_changes(self, fields):
        config, arguments = LossConfig(**fields), self.draw()
        losses = sample_losses(config, schedule_of("epsilon"), *arguments)
        for side in (2, 16):
            white = torch.ones(3, 1, side, side)
            assert torch.equal(sample_losses(config, schedule_of("epsilon"), *arguments, white), losses)

    @pytest.mark.parametrize("fields", FIELDS)
    def test_each_element_counts_as_its_mask_says(self, fields):
        config, schedule, (output, target, timesteps) = LossConfig(**fields), schedule_of("epsilon"), self.draw()
        masks = torch.tensor([[[1.0, 0.0], [0.0, 0.5]], [[0.0, 0.0], [0.0, 0.0]], [[1.0, 1.0], [1.0, 1.0]]])[:, None]
        losses = sample_losses(config, schedule, output, target, timesteps, masks)
        elements = elementwise_loss(config, schedule, output, target, timesteps)[0]
        expected = (elements[:, 0, 0] + elements[:, 1, 1] / 2).sum() / 16 * loss_weights(config, schedule, timesteps)[0]
        whole = sample_losses(config, schedule, output, target, timesteps)[2]  # on its mean the mask does nothing
        torch.testing.assert_close(losses, torch.stack([expected, torch.tensor(0.0), whole]))

    def test_of_the_images_size_they_count_by_the_mean_over_an_area(self):
        config, schedule, arguments = LossConfig(), schedule_of("epsilon"), self.draw()
        masks = torch.zeros(3, 1, 16, 16)
        masks[:, :, :8, 4:8] = 1  # half of the first of four
        small = torch.tensor([[0.5, 0.0], [0.0, 0.0]]).expand(3, 1, 2, 2)
        losses = [sample_losses(config, schedule, *arguments, each) for each in (masks, small)]
        assert torch.equal(*losses) and (losses[0] > 0).all()

    def test_the_loss_of_a_padded_sound_is_the_mean_over_the_sound(self):
        """Whose masks have a mean of 1; in the latents that its end falls into the part that is sound counts."""
        config, schedule, (output, target, timesteps) = LossConfig(), schedule_of("epsilon"), self.draw()
        output, target = output.flatten(2), target.flatten(2)  # (3, 4, 4)
        masks = torch.zeros(3, 1, 16)
        masks[:, :, :6] = 16 / 6  # of four samples each, one and a half
        losses = sample_losses(config, schedule, output, target, timesteps, masks)
        parts = elementwise_loss(config, schedule, output, target, timesteps).mean(1)
        torch.testing.assert_close(losses, (parts[:, 0] + parts[:, 1] / 2) / 1.5)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize(
    "fields", [{}, {"weighting": "min_snr"}, {"type": "huber", "huber_schedule": "snr", "weighting": "debiased"}]
)
def test_a_time_for_each_frame_gives_the_mean_of_the_frames_losses(prediction_type, fields):
    config, schedule = LossConfig(**fields), schedule_of(prediction_type)
    generator = torch.Generator().manual_seed(0)
    output, target = torch.randn(2, 2, 4, 5, 3, 3, generator=generator, dtype=torch.float64)
    timesteps = all_timesteps(prediction_type)[torch.randint(999, (2, 1, 5, 1, 1), generator=generator)]
    losses = sample_losses(config, schedule, output, target, timesteps)
    frames = [
        sample_losses(config, schedule, output[:, :, i], target[:, :, i], timesteps[:, 0, i, 0, 0]) for i in range(5)
    ]
    assert losses.shape == (2,)
    torch.testing.assert_close(losses, torch.stack(frames).mean(0), rtol=1e-6, atol=0)


def test_the_weights_are_the_papers():
    timesteps = torch.arange(1000)
    for prediction_type in ("epsilon", "v_prediction", "sample"):
        schedule = schedule_of(prediction_type)
        snr = schedule.snr(timesteps)

        def weights(weighting, schedule=schedule, **fields):
            return loss_weights(LossConfig(weighting=weighting, edm_sigma_data=0.5, **fields), schedule, timesteps)

        scale = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}[prediction_type]
        torch.testing.assert_close(weights("min_snr"), torch.minimum(snr, torch.tensor(5.0)) / scale)
        torch.testing.assert_close(weights("soft_min_snr", snr_gamma=4.0), 4 * snr / (4 + snr) / scale)
        torch.testing.assert_close(weights("debiased"), snr.sqrt() / scale)
        assert (weights("uniform") == 1).all()
        if prediction_type == "epsilon":
            torch.testing.assert_close(weights("snr"), torch.ones(1000))
            torch.testing.assert_close(weights("p2", p2_gamma=0.5, p2_k=2.0), (2 + snr) ** -0.5)
            torch.testing.assert_close(weights("debiased"), snr**-0.5)
    flow, timesteps = schedule_of("flow_prediction"), torch.arange(1, 1000).float()
    for weighting in ("sigma_sqrt", "cosmap"):
        expected = compute_loss_weighting_for_sd3(weighting, timesteps / 1000)
        weights = loss_weights(LossConfig(weighting=weighting, edm_sigma_data=0.5), flow, timesteps)
        torch.testing.assert_close(weights, expected, rtol=1e-4, atol=0)


def test_sigma_sqrt_is_bounded_near_the_clean_end():
    flow, timesteps = schedule_of("flow_prediction"), torch.tensor([0.01, 0.1, 0.999, 1.0, 10.0])
    weights = loss_weights(LossConfig(weighting="sigma_sqrt"), flow, timesteps)
    torch.testing.assert_close(weights, torch.tensor([1e6, 1e6, 1e6, 1e6, 1e4]), rtol=1e-3, atol=0)


def test_flow_weighs_clean_latents_as_the_velocity_is():
    """(x_t - x̂_0) / σ is a velocity, with σ at least 0.05: 1 on its own loss, 1 / σ² on that of x_0."""
    sigmas = torch.tensor([0.02, 0.05, 0.3, 0.9])
    timesteps, linear = 1000 * sigmas, Schedule("linear", "sample")
    weights = loss_weights(LossConfig(weighting="flow"), linear, timesteps)
    torch.testing.assert_close(weights, sigmas.clamp(min=0.05) ** -2)
    velocities = loss_weights(LossConfig(weighting="flow"), schedule_of("flow_prediction"), timesteps)
    torch.testing.assert_close(velocities, torch.tensor([0.16, 1.0, 1.0, 1.0]))
    # as its code has it, of z = t·x + (1 - t)·e
    x, noise, predicted = torch.randn(3, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    z, floored = linear.add_noise(x, noise, timesteps), append_dims(sigmas, x).clamp(min=0.05)
    expected = ((x - z) / floored - (predicted - z) / floored).square().flatten(1).mean(1)
    config = LossConfig(weighting="flow")
    torch.testing.assert_close(sample_losses(config, linear, predicted, x, timesteps), expected, rtol=1e-4, atol=0)


def test_edm_gives_unit_weight_to_edms_own_parametrisation():
    # Karras et al. 2022: λ(σ)·c_out(σ)² = 1, c_out = σ·σ_d / sqrt(σ² + σ_d²)
    sigmas = torch.logspace(-2, 2, 50)
    weights = clean_weight(LossConfig(weighting="edm", edm_sigma_data=0.7), sigmas**-2)
    torch.testing.assert_close(weights * (sigmas * 0.7) ** 2 / (sigmas**2 + 0.7**2), torch.ones(50))


@pytest.mark.parametrize("sigma_data", [0.5, 1.0, 2.0])
def test_edm_is_v_on_the_cosine_path_of_data_divided_by_sigma_data(sigma_data):
    """diffusers' preconditioning of a network F (Karras et al. 2022, table 1) at y + σ·ε: what goes into it is our
    noisy latents of y / σ_d at the angle atan(σ / σ_d), what it makes of the output our x_0, and its loss ours."""
    cosine, generator = Schedule("cosine", "v_prediction"), torch.Generator().manual_seed(0)
    data, noise, output = torch.randn(3, 20, 4, 8, 8, generator=generator, dtype=torch.float64)
    data, sigmas = data * sigma_data, torch.logspace(-2, 2, 20, dtype=torch.float64)
    edm, like = EDMEulerScheduler(sigma_data=sigma_data, prediction_type="v_prediction"), sigmas[:, None, None, None]
    timesteps = torch.atan(sigmas / sigma_data) / (math.pi / 2) * 1000
    ours = cosine.add_noise(data / sigma_data, noise, timesteps)
    torch.testing.assert_close(edm.precondition_inputs(data + like * noise, like), ours, rtol=1e-10, atol=1e-12)
    denoised = edm.precondition_outputs(data + like * noise, output, like)
    clean = cosine.convert(output, ours, timesteps, "sample") * sigma_data
    torch.testing.assert_close(clean, denoised, rtol=1e-10, atol=1e-12)
    weights = (sigmas**2 + sigma_data**2) / (sigmas * sigma_data) ** 2
    expected = weights * (denoised - data).square().flatten(1).mean(1)
    target = cosine.target(data / sigma_data, noise, timesteps)
    for config in (LossConfig(), LossConfig(weighting="edm", edm_sigma_data=1.0)):
        torch.testing.assert_close(sample_losses(config, cosine, output, target, timesteps), expected)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample", "flow_prediction"])
def test_weights_are_finite_at_both_ends(prediction_type, weighting):
    schedule = schedule_of(prediction_type, **({} if prediction_type[0] == "f" else {"rescale_betas_zero_snr": True}))
    ends = torch.tensor([0.0, 1000.0]) if prediction_type == "flow_prediction" else torch.tensor([0, 999])
    weights = loss_weights(LossConfig(weighting=weighting, edm_sigma_data=0.5), schedule, ends)
    assert weights.isfinite().all() and (weights >= 0).all()


class TestElementwise:
    def loss(self, difference, timesteps=None, **fields):
        target = torch.randn(len(difference), 1, 1, dtype=torch.float64)
        timesteps = torch.full((len(difference),), 500) if timesteps is None else timesteps
        output = target + difference.double().reshape(-1, 1, 1)
        return elementwise_loss(LossConfig(**fields), schedule_of("epsilon"), output, target, timesteps).flatten()

    def test_mse_and_l1(self):
        difference = torch.linspace(-3, 3, 31, dtype=torch.float64)
        torch.testing.assert_close(self.loss(difference), difference**2)
        torch.testing.assert_close(self.loss(difference, type="l1"), difference.abs())

    def test_huber_is_quadratic_near_zero_and_linear_far_away(self):
        near, far, c = torch.tensor([1e-4, -1e-4]), torch.tensor([1e4, -1e4]), 0.1
        for name, scale in (("huber", 1), ("smooth_l1", 1 / c)):
            torch.testing.assert_close(
                self.loss(near, type=name, huber_c=c), scale * near.double() ** 2, rtol=1e-4, atol=0
            )
            expected = scale * 2 * c * far.double().abs()
            torch.testing.assert_close(self.loss(far, type=name, huber_c=c), expected, rtol=1e-4, atol=0)

    def test_huber_is_the_stated_formula(self):
        difference = torch.linspace(-3, 3, 30, dtype=torch.float64)
        expected = 2 * 0.3 * ((difference**2 + 0.3**2).sqrt() - 0.3)
        torch.testing.assert_close(self.loss(difference, type="huber", huber_c=0.3), expected, rtol=1e-6, atol=1e-9)

    def test_thresholds(self):
        schedule, timesteps = schedule_of("epsilon"), torch.tensor([0, 500, 999])
        constant = huber_threshold(LossConfig(type="huber"), schedule, timesteps)
        torch.testing.assert_close(constant, torch.full((3,), 0.1))
        config = LossConfig(type="huber", huber_schedule="exponential", huber_c=0.01)
        expected = torch.tensor([math.exp(math.log(0.01) * t / 1000) for t in (0, 500, 999)])
        torch.testing.assert_close(huber_threshold(config, schedule, timesteps), expected)
        config = LossConfig(type="huber", huber_schedule="snr", huber_c=0.01)
        sigmas = ((1 - schedule.alphas_cumprod) / schedule.alphas_cumprod).sqrt()[timesteps]
        torch.testing.assert_close(huber_threshold(config, schedule, timesteps), 0.99 / (1 + sigmas) ** 2 + 0.01)


class TestLearnedUncertainty:
    def test_it_starts_as_the_loss_itself(self):
        losses, snr = torch.rand(20), torch.logspace(-6, 6, 20)
        assert torch.equal(LearnedUncertainty()(losses, snr), losses)

    def test_it_learns_the_loss_of_each_noise_level(self):
        """At the minimum of E[loss / exp(u) + u], exp(u) = E[loss]: weighted, all levels are alike."""
        uncertainty, generator = LearnedUncertainty(), torch.Generator().manual_seed(0)
        optimizer = torch.optim.Adam(uncertainty.parameters(), lr=0.05)
        for _ in range(400):
            snr = torch.exp(4 * torch.randn(256, generator=generator))
            losses = (0.1 + 1 / (1 + snr)) * torch.empty(256).exponential_(generator=generator)
            optimizer.zero_grad()
            uncertainty(losses, snr).mean().backward()
            optimizer.step()
        snr = torch.exp(torch.linspace(-6, 6, 9))
        with torch.no_grad():
            zero, one = (uncertainty(torch.full((9,), value), snr) for value in (0.0, 1.0))
        learned = 1 / (one - zero)
        torch.testing.assert_close(learned, 0.1 + 1 / (1 + snr), rtol=0.3, atol=0)
        torch.testing.assert_close(zero, learned.log())


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_a_timestep_without_signal_is_trained(prediction_type, weighting):
    """As the code of Min-SNR has it; the others are as they were."""
    timesteps = torch.arange(1000)
    zero = schedule_of(prediction_type, rescale_betas_zero_snr=True)
    weights = loss_weights(LossConfig(weighting=weighting, edm_sigma_data=0.5), zero, timesteps)
    assert weights[-1] > 1e-3 and (weighting not in VANISHING or weights[-1] == 1)
    assert weights.isfinite().all()
    same = clean_weight(LossConfig(weighting=weighting, edm_sigma_data=0.5), zero.snr(timesteps)) / zero.error_scale(
        timesteps
    )
    assert torch.equal(weights[:-1], same[:-1])
