import math
from functools import partial

import pytest
import torch

from difftrain_utils.config.few_step import FewStepMethodConfig
from difftrain_utils.config.objective import TimestepsConfig
from difftrain_utils.keyed_random import keyed_rand
from difftrain_utils.objective.few_step import (
    adaptive_weights,
    consistency_target,
    guided_velocity,
    mean_flow_target,
    probing,
    sample_times,
    shortcut_target,
)
from difftrain_utils.objective.schedule import Schedule, append_dims

LINEAR, COSINE = Schedule("linear", "flow_prediction"), Schedule("cosine", "v_prediction")
KEYS = range(4000)


@pytest.fixture
def batch() -> tuple[torch.Tensor, ...]:
    """Latents, noise and timesteps, and gaps that are shorter than these, in float64."""
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 6, 3, 4, generator=generator, dtype=torch.float64)
    times = torch.tensor([0.2, 0.35, 0.5, 0.7, 0.9, 1.0], dtype=torch.float64)
    gaps = times * torch.tensor([0.0, 1.0, 0.3, 0.5, 1.0, 0.8], dtype=torch.float64)
    return latents, noise, 1000 * times, gaps


class Net(torch.nn.Module):
    """A smooth function of all that a denoiser is told."""

    def __init__(self, width: int = 4, hidden: int = 32):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(width + 2, hidden), torch.nn.Tanh(), torch.nn.Linear(hidden, hidden), torch.nn.Tanh(),
            torch.nn.Linear(hidden, width),
        )  # fmt: skip

    def predict(self, noisy_latents, timesteps, conditioning):
        told = torch.stack([timesteps / 1000, conditioning.get("gap", torch.zeros_like(timesteps))], -1)
        told = append_dims(told, noisy_latents).movedim(1, -1).expand(*noisy_latents.shape[:-1], 2)
        return self.layers(torch.cat([noisy_latents, told], -1))


def as_mean_velocity(spread: float):
    """That of data N(0, spread²), or of the single point 0: their flow multiplies by the standard deviation of x_t."""

    def predict(noisy_latents, timesteps, conditioning):
        at = lambda t: ((1 - t) ** 2 * spread**2 + t**2).sqrt() if spread else t  # noqa: E731
        times, gaps = timesteps / 1000, conditioning["gap"]
        rate = (1 - at(times - gaps) / at(times)) / gaps
        return append_dims(rate, noisy_latents) * noisy_latents

    return predict


def test_mean_flows_target_has_the_derivative_along_the_path(batch):
    latents, noise, timesteps, gaps = batch
    net, ends, velocity = Net().double(), timesteps / 1000 - gaps, noise - latents

    def at(t):
        noisy = LINEAR.add_noise(latents, noise, 1000 * t)
        return net.predict(noisy, 1000 * t, {"gap": t - ends})

    h = 1e-6
    derivative = (at(timesteps / 1000 + h) - at(timesteps / 1000 - h)) / (2 * h)
    noisy = LINEAR.add_noise(latents, noise, timesteps)
    target = mean_flow_target(LINEAR, net.predict, noisy, velocity, timesteps, gaps, {})
    torch.testing.assert_close(target, velocity - append_dims(gaps, latents) * derivative, rtol=0, atol=1e-7)
    assert torch.equal(target[0], velocity[0])  # flow matching, without a gap


@pytest.mark.parametrize("spread", [0.0, 0.5, 1.7])
def test_mean_flows_target_of_the_mean_velocity_is_itself(batch, spread):
    _, noise, timesteps, gaps = (values[1:] for values in batch)
    predict = as_mean_velocity(spread)
    # of all samples at the same place: that of an infinitely short step
    velocity = predict(noise, timesteps, {"gap": torch.full_like(gaps, 1e-7)})
    target = mean_flow_target(LINEAR, predict, noise, velocity, timesteps, gaps, {})
    torch.testing.assert_close(target, predict(noise, timesteps, {"gap": gaps}), rtol=1e-5, atol=1e-6)


def test_a_shortcuts_target_are_two_steps_of_half_its_length(batch):
    _, noise, timesteps, _ = batch
    config, predict = FewStepMethodConfig("shortcut", num_steps=4), as_mean_velocity(0.5)
    steps = torch.tensor([0.0, 0.0, 0.5, 0.5, 0.5, 1.0], dtype=torch.float64)
    velocity = torch.ones_like(noise)
    target = shortcut_target(config, LINEAR, predict, noise, velocity, timesteps, steps, {}, {})
    assert torch.equal(target[:2], velocity[:2])
    # a mean velocity is that of its halves
    told = {"gap": steps[5:]}
    torch.testing.assert_close(target[5:], predict(noise[5:], timesteps[5:], told))

    def no_mean(noisy_latents, timesteps, conditioning):
        seen.append(conditioning)
        return noisy_latents * append_dims(1 + timesteps, noisy_latents)

    seen = []
    told = {"places": torch.arange(6.0)}
    target = shortcut_target(config, LINEAR, no_mean, noise, velocity, timesteps, steps, told, {})
    halves = append_dims(steps / 2, noise)
    first = noise * append_dims(1 + timesteps, noise)
    second = (noise - halves * first) * append_dims(1 + timesteps - 500 * steps, noise)
    torch.testing.assert_close(target[2:], ((first + second) / 2)[2:])
    # half of the shortest step is told as none, and each is told what is its own
    assert seen[0]["gap"].tolist() == seen[1]["gap"].tolist() == [0, 0, 0, 0.5]
    assert seen[0]["places"].tolist() == [2, 3, 4, 5]


def test_a_shortcuts_guidance_is_that_of_its_shortest_steps(batch):
    """Of a velocity c·x with a caption, and of one without, where a step multiplies x by 1 - c·its length."""
    _, noise, timesteps, _ = batch
    config = FewStepMethodConfig("shortcut", num_steps=4, guidance=1.5)
    steps = torch.tensor([0.0, 0.5, 0.5, 0.5, 1.0, 1.0], dtype=torch.float64)
    rates = torch.tensor([2.0, 2, 3, 5, 2, 3], dtype=torch.float64)  # the fourth has no caption

    def predict(noisy_latents, timesteps, conditioning):
        return noisy_latents * append_dims(conditioning["c"].flatten(), noisy_latents)

    velocity, told, nothing = torch.ones_like(noise), {"c": rates[:, None]}, {"c": rates.new_full((1, 1), 5.0)}
    target = shortcut_target(config, LINEAR, predict, noise, velocity, timesteps, steps, told, nothing)
    guided = torch.tensor([5 + 1.5 * (2 - 5), 5 + 1.5 * (3 - 5), 5, 2, 3], dtype=torch.float64)
    lengths = steps[1:]
    expected = (1 - (1 - guided * lengths / 2) ** 2) / lengths
    torch.testing.assert_close(target[1:], append_dims(expected, noise) * noise[1:])
    assert torch.equal(target[0], velocity[0])


def test_a_consistency_functions_target_has_the_derivative_along_the_path(batch):
    latents, noise, timesteps, _ = (values[:5] for values in batch)
    config, net = FewStepMethodConfig("consistency", warmup_steps=0), Net().double()
    rate = 1000 / (math.pi / 2)
    angles = timesteps / rate
    cos, sin = (append_dims(x, latents) for x in (angles.cos(), angles.sin()))
    noisy, velocity = cos * latents + sin * noise, cos * noise - sin * latents
    torch.testing.assert_close(COSINE.add_noise(latents, noise, timesteps), noisy)

    def at(angles):
        """f(x, t) = cos(t)·x - sin(t)·F(x, t)"""
        cos, sin = (append_dims(x, latents) for x in (angles.cos(), angles.sin()))
        noisy = cos * latents + sin * noise
        return cos * noisy - sin * net.predict(noisy, rate * angles, {})

    h = 1e-6
    tangent = cos * (at(angles + h) - at(angles - h)) / (2 * h)
    norm = append_dims(tangent.flatten(1).square().mean(1).sqrt(), tangent)
    expected = net.predict(noisy, timesteps, {}) + tangent / (norm + 0.1)
    target = partial(consistency_target, schedule=COSINE, predict=net.predict, conditioning={})
    where = {"noisy_latents": noisy, "velocity": velocity, "timesteps": timesteps}
    torch.testing.assert_close(target(config, **where, step=0), expected, rtol=0, atol=1e-6)
    # at the first step of a warm-up the network is taken for one that is the same everywhere
    config = FewStepMethodConfig("consistency", warmup_steps=100)
    cold = -cos.square() * (net.predict(noisy, timesteps, {}) - velocity)
    norm = append_dims(cold.flatten(1).square().mean(1).sqrt(), cold)
    expected = net.predict(noisy, timesteps, {}) + cold / (norm + 0.1)
    torch.testing.assert_close(target(config, **where, step=0), expected)
    assert torch.equal(target(config, **where, step=200), target(config, **where, step=100))


def test_what_is_consistent_is_left_alone():
    """f(x, t) is where the flow of N(0, 1/4) has x at time 0, so it does not change along it."""

    def predict(noisy_latents, timesteps, conditioning):
        angles = append_dims(timesteps, noisy_latents) * (math.pi / 2) / 1000
        at_0 = noisy_latents * 0.5 / (angles.cos().square() * 0.25 + angles.sin().square()).sqrt()
        return (angles.cos() * noisy_latents - at_0) / angles.sin()

    torch.manual_seed(0)
    noisy, timesteps = torch.randn(4, 3, dtype=torch.float64), torch.tensor([100.0, 300, 600, 950]).double()
    angles = append_dims(timesteps, noisy) * (math.pi / 2) / 1000
    variance = angles.cos().square() * 0.25 + angles.sin().square()
    velocity = noisy * angles.sin() * angles.cos() * 0.75 / variance  # of all samples at the place
    config = FewStepMethodConfig("consistency", warmup_steps=0)
    target = consistency_target(config, COSINE, predict, noisy, velocity, timesteps, {}, 0)
    torch.testing.assert_close(target, predict(noisy, timesteps, {}))


def test_times_and_steps():
    density = TimestepsConfig("logit_normal", stratified=True)
    draw = lambda config: sample_times(config, density, LINEAR, 0, KEYS, 100)  # noqa: E731
    learns_flow = keyed_rand(0, "learns_flow", KEYS) < 0.75
    timesteps, gaps = draw(FewStepMethodConfig("mean_flow"))
    assert torch.equal(gaps == 0, learns_flow) and (gaps >= 0).all() and (1000 * gaps <= timesteps).all()
    # of two times with the density the later one and the earlier one have the mean of both
    ends = timesteps - 1000 * gaps
    assert (timesteps + ends)[~learns_flow].mean().item() / 2 == pytest.approx(500, rel=0.03)
    later = timesteps[~learns_flow].mean().item()  # which it is also of those that learn the velocity
    assert later > 550 and timesteps[learns_flow].mean().item() == pytest.approx(later, rel=0.03)

    timesteps, gaps = draw(FewStepMethodConfig("shortcut", num_steps=8))
    assert torch.equal(gaps == 0, learns_flow)
    for gap in (1.0, 0.5, 0.25):  # each as often, from each of its multiples
        of_gap = gaps == gap
        assert of_gap.sum().item() == pytest.approx((~learns_flow).sum().item() / 3, rel=0.15)
        places = timesteps[of_gap] / (1000 * gap)
        assert sorted(places.unique().tolist()) == [1 + i for i in range(round(1 / gap))]
        assert places.mean().item() == pytest.approx((1 + 1 / gap) / 2, rel=0.1)
    assert (gaps[~learns_flow] >= 0.25).all()


def test_guidance_is_of_what_has_a_caption(batch):
    latents, noise, timesteps, _ = batch
    velocity, conditioning, nothing = noise - latents, {"c": torch.full((6, 1), 2.0)}, {"c": torch.full((1, 1), 5.0)}
    dropped = [True, *[False] * 5]
    seen = []

    def predict(noisy_latents, timesteps, conditioning):
        assert conditioning["gap"].shape == (6,) and not conditioning["gap"].any()
        seen.append(conditioning["c"])
        return torch.full_like(noisy_latents, conditioning["c"][0].item())

    def guided(**fields):
        config = FewStepMethodConfig(**fields)
        return guided_velocity(config, predict, noise, velocity, timesteps, conditioning, nothing, dropped)

    assert guided() is velocity and not seen
    torch.testing.assert_close(guided(guidance=1.5)[1:], 1.5 * velocity[1:] - 0.5 * 5)
    mixed = guided(guidance=1.5, guidance_mix=0.25)
    torch.testing.assert_close(mixed[1:], 1.5 * velocity[1:] + 0.25 * 2 - 0.75 * 5)
    assert torch.equal(mixed[0], velocity[0])
    assert [len(c) for c in seen] == [6, 6, 6]


def test_adaptive_weights():
    errors = torch.tensor([0.5, 2.0])
    weights = adaptive_weights(FewStepMethodConfig("mean_flow"), errors, 10)
    torch.testing.assert_close(weights * errors, 10 * errors / (10 * errors + 1e-3))  # the paper's, of the sum
    weights = adaptive_weights(FewStepMethodConfig("mean_flow", adaptive_power=0.5), errors, 10)
    torch.testing.assert_close(weights[0] / weights[1], ((20 + 1e-3) / (5 + 1e-3)) ** torch.tensor(0.5))
    assert adaptive_weights(FewStepMethodConfig("shortcut"), errors, 10).tolist() == [1, 1]


def test_a_probe_leaves_the_model_as_it_was():
    net = Net()
    with probing(net):
        assert not net.training and not torch.is_grad_enabled()
    assert net.training and torch.is_grad_enabled()
    with pytest.raises(ZeroDivisionError), probing(net):
        1 / 0  # noqa: B018
    assert net.training


def test_a_compiled_model_is_probed_uncompiled(batch):
    net, plain = Net().double(), Net().double()
    graphs = []
    net.compile(backend=lambda graph, inputs: graphs.append(graph) or graph, dynamic=False)
    net.forward = lambda latents, t, gap: net.predict(latents, t, {"gap": gap})
    latents, noise, timesteps, gaps = batch
    where = latents, noise, timesteps, gaps, {}
    with probing(net):
        target = mean_flow_target(LINEAR, lambda x, t, told: net(x, t, told["gap"]), *where)
    assert torch.equal(target, mean_flow_target(LINEAR, plain.predict, *where)) and not graphs
    assert torch.equal(net(latents, timesteps, gaps), plain.predict(latents, timesteps, {"gap": gaps})) and graphs


def test_a_probe_differentiates_norms_in_bf16_and_in_any_layout():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 1), torch.nn.GroupNorm(2, 8), torch.nn.Conv2d(8, 8, 1),
                              torch.nn.LayerNorm(5), torch.nn.Linear(5, 5))  # fmt: skip
    latents, along = torch.randn(2, 2, 4, 5, 5)
    derivatives = []
    for dtype in (None, torch.bfloat16):
        with probing(net), torch.autocast("cpu", dtype, enabled=dtype is not None):
            derivatives.append(torch.func.jvp(net, (latents,), (along,))[1].float())
    torch.nn.Module.to(net, memory_format=torch.channels_last)
    with probing(net):
        derivatives.append(torch.func.jvp(net, (latents,), (along,))[1])
    expected, *others = derivatives
    for other, error in zip(others, (0.05, 1e-5), strict=True):
        assert (other - expected).norm() < error * expected.norm()
    assert not any(module._forward_pre_hooks for module in net)


@pytest.mark.parametrize("method", ["mean_flow", "shortcut"])
def test_a_step_of_what_was_learned_is_the_flow(method):
    """One pass from noise to data N(0, 0.5²) multiplies by 0.5, or with shortcuts by what their shortest steps do."""
    rate = lambda t: (t - (1 - t) / 4) / (t**2 + (1 - t) ** 2 / 4)  # noqa: E731  # of the velocity E[ε - x_0 | x_t]
    torch.manual_seed(0)
    spread, config, net = 0.5, FewStepMethodConfig(method, flow_share=0.5, num_steps=8), Net(1)
    density, optimizer = TimestepsConfig(), torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.0)
    lr_scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 400)
    for step in range(400):
        keys = range(step * 64, (step + 1) * 64)
        timesteps, gaps = (x.repeat(4) for x in sample_times(config, density, LINEAR, 0, keys, 64))
        latents, noise = spread * torch.randn(256, 1), torch.randn(256, 1)
        where = LINEAR.add_noise(latents, noise, timesteps), noise - latents, timesteps, gaps, {}
        with probing(net):
            if method == "mean_flow":
                target = mean_flow_target(LINEAR, net.predict, *where)
            else:
                target = shortcut_target(config, LINEAR, net.predict, *where, {})
        loss = (net.predict(where[0], timesteps, {"gap": gaps}) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        lr_scheduler.step()
    noise = torch.linspace(-2, 2, 41)[:, None]
    whole = torch.ones(len(noise))
    drawn = noise - net.predict(noise, 1000 * whole, {"gap": whole})
    slope = spread if method == "mean_flow" else math.prod(1 - rate(i / 8) / 8 for i in range(1, 9))
    assert (drawn - slope * noise).abs().mean() < {"mean_flow": 0.12, "shortcut": 0.06}[method]
    velocity = net.predict(noise, 1000 * whole, {"gap": 0 * whole})  # all at once, it is of no use
    assert (noise - velocity - spread * noise).abs().mean() > 0.3
