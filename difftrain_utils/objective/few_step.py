"""What a model has to predict that samples in few steps.

On the path `linear`, u(x_t, t, gap) is the mean velocity of a step from time t to t - gap, so that x_(t - gap) = x_t -
gap·u; a gap of 0 has the velocity itself. Times are noise levels σ = t / num_train_timesteps here, from 0 (data) to 1
(noise), and gaps are differences of them. On the path `cosine`, a consistency function goes from any time to 0.

The targets take passes of the model of their own, without gradients: `predict(noisy_latents, timesteps, conditioning)`
is of the bare denoiser then (`probing`), and the pass whose gradient counts goes through the wrapped one, as in every
script. The conditioning tells the model the gap, (batch,), as "gap".
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from difftrain_utils.config.few_step import FewStepMethodConfig
from difftrain_utils.config.objective import TimestepsConfig
from difftrain_utils.devices import to_device
from difftrain_utils.keyed_random import keyed_rand
from difftrain_utils.objective.schedule import Schedule, append_dims
from difftrain_utils.objective.timesteps import sample_timesteps

Conditioning = dict[str, torch.Tensor]
Predict = Callable[[torch.Tensor, torch.Tensor, Conditioning], torch.Tensor]

ADAPTIVE_FLOOR = 1e-3  # c of MeanFlow's weight
NORMS = (torch.nn.GroupNorm, torch.nn.LayerNorm)
TANGENT_FLOOR = 0.1  # c of the consistency model's tangent


def sample_times(
    config: FewStepMethodConfig,
    density: TimestepsConfig,
    schedule: Schedule,
    seed: int,
    keys: Sequence[int],
    batch_size: int,
    device=None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Timesteps and gaps of the samples `keys`, both (len(keys),) float32.

    - `mean_flow`: the later of two times that are drawn from the density, and their difference, or of the share
      `flow_share` 0 (Geng et al. 2025, arXiv:2505.13447, section 4.3)
    - `shortcut`: a step of 1, 1/2, …, 2 / num_steps, from a multiple of it; of the share `flow_share` a time from the
      density, and 0 (Frans et al. 2024, arXiv:2410.12557, section 3.2)
    - `consistency`: a time from the density, and all of the way from it
    """
    times = sample_timesteps(density, schedule, seed, keys, batch_size, device=device)
    num_timesteps = schedule.num_train_timesteps
    if config.method == "consistency":
        return times, times / num_timesteps
    learns_flow = to_device(keyed_rand(seed, "learns_flow", keys) < config.flow_share, device)
    if config.method == "mean_flow":
        others = sample_timesteps(density, schedule, seed, keys, batch_size, device=device, purpose="second_timestep")
        gaps = (times - others).abs() / num_timesteps
        return torch.maximum(times, others), torch.where(learns_flow, 0, gaps)
    halvings = int(math.log2(config.num_steps))
    steps = 0.5 ** (keyed_rand(seed, "step", keys) * halvings).floor()
    places = (keyed_rand(seed, "step_place", keys) / steps).floor() + 1
    later, gaps = (to_device(x.float(), device) for x in (places * steps * num_timesteps, steps))
    return torch.where(learns_flow, times, later), torch.where(learns_flow, 0, gaps)


@contextmanager
def probing(denoiser: torch.nn.Module) -> Iterator[None]:
    """For passes of a denoiser that is not wrapped which are differentiated forwards and not backwards: without
    gradients, as it samples, uncompiled, and with the one kernel of attention that has a derivative."""
    norms = [module for module in denoiser.modules() if isinstance(module, NORMS)]
    hooks = [norm.register_forward_pre_hook(_as_its_derivative_asks) for norm in norms]
    denoiser.eval()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        denoiser.train()
        for hook in hooks:
            hook.remove()


def _as_its_derivative_asks(norm: torch.nn.Module, inputs: tuple[torch.Tensor]) -> torch.Tensor:
    """torch's forward derivative of a norm wants the precision of its weights and the plain layout, which `contiguous`
    does not give to the derivative of what has it already."""
    dtype = inputs[0].dtype if norm.weight is None else norm.weight.dtype
    return inputs[0].to(dtype).clone(memory_format=torch.contiguous_format)


def guided_velocity(
    config: FewStepMethodConfig,
    predict: Predict,
    noisy_latents: torch.Tensor,
    velocity: torch.Tensor,
    timesteps: torch.Tensor,
    conditioning: Conditioning,
    nothing: Conditioning,
    dropped: Sequence[bool],
) -> torch.Tensor:
    """The velocity ω·v + κ·u(x_t, t, 0) + (1 - ω - κ)·u(x_t, t, 0 | nothing) of guidance, of the latents' shape, for
    samples `velocity` v; v itself of those whose caption is `dropped`. `nothing` is the conditioning of one sample
    without a caption (Geng et al. 2025, appendix, equation 21)."""
    if config.guidance == 1:
        return velocity
    gap = {"gap": torch.zeros_like(timesteps)}
    without = predict(noisy_latents, timesteps, conditioning | _for_samples(nothing, len(velocity)) | gap)
    guided = config.guidance * velocity + (1 - config.guidance - config.guidance_mix) * without
    if config.guidance_mix:
        guided = guided + config.guidance_mix * predict(noisy_latents, timesteps, conditioning | gap)
    return torch.where(append_dims(torch.tensor(dropped, device=velocity.device), velocity), velocity, guided)


def _for_samples(nothing: Conditioning, num_samples: int) -> Conditioning:
    return {name: value.expand(num_samples, *value.shape[1:]) for name, value in nothing.items()}


def mean_flow_target(
    schedule: Schedule,
    predict: Predict,
    noisy_latents: torch.Tensor,
    velocity: torch.Tensor,
    timesteps: torch.Tensor,
    gaps: torch.Tensor,
    conditioning: Conditioning,
) -> torch.Tensor:
    """v - gap·du/dt, of the latents' shape, which u is if and only if it is the mean velocity (Geng et al. 2025,
    equations 6 and 10). The derivative is that along the path, on which x moves by v while the step's end stays, so
    that the gap grows with t."""

    def mean_velocity(noisy_latents, timesteps, gaps):
        return predict(noisy_latents, timesteps, conditioning | {"gap": gaps})

    rate = torch.full_like(timesteps, schedule.num_train_timesteps)  # of timesteps, with the time
    along = (velocity, rate, torch.ones_like(gaps))
    _, derivative = torch.func.jvp(mean_velocity, (noisy_latents, timesteps, gaps), along)
    return velocity - append_dims(gaps, velocity) * derivative


def shortcut_target(
    config: FewStepMethodConfig,
    schedule: Schedule,
    predict: Predict,
    noisy_latents: torch.Tensor,
    velocity: torch.Tensor,
    timesteps: torch.Tensor,
    gaps: torch.Tensor,
    conditioning: Conditioning,
    nothing: Conditioning,
) -> torch.Tensor:
    """The velocity where the gap is 0, and else the mean of two steps that are half as long, of the latents' shape
    (Frans et al. 2024, equation 5 and algorithm 1). Half of the shortest gap is 0, that is flow matching's step, and
    the only one that `guidance` w changes: to u(x_t, t, 0 | nothing) + w·(u(x_t, t, 0) - u(x_t, t, 0 | nothing)), which
    longer steps then learn from it (section 3.3 and `bootstrap_cfg` of the paper's code). `nothing` is the conditioning
    of one sample without a caption. Unlike in that code, the two steps are the model's as it is, not its average's."""
    steps = gaps > 0
    target = velocity.clone()
    if not steps.any():
        return target
    noisy_latents, timesteps, halves = noisy_latents[steps], timesteps[steps], gaps[steps] / 2
    shortest = halves * config.num_steps <= 1
    conditioning = {name: value[steps] for name, value in conditioning.items()}
    conditioning["gap"] = torch.where(shortest, 0, halves)

    def half_step(noisy_latents, timesteps):
        output = predict(noisy_latents, timesteps, conditioning)
        if config.guidance == 1 or not shortest.any():
            return output
        told = {name: value[shortest] for name, value in conditioning.items()}
        told |= _for_samples(nothing, len(told["gap"]))
        without = predict(noisy_latents[shortest], timesteps[shortest], told)
        output[shortest] = without + config.guidance * (output[shortest] - without)
        return output

    first = half_step(noisy_latents, timesteps)
    between = noisy_latents - append_dims(halves, first) * first
    second = half_step(between, timesteps - schedule.num_train_timesteps * halves)
    target[steps] = (first + second) / 2
    return target


def consistency_target(
    config: FewStepMethodConfig,
    schedule: Schedule,
    predict: Predict,
    noisy_latents: torch.Tensor,
    velocity: torch.Tensor,
    timesteps: torch.Tensor,
    conditioning: Conditioning,
    step: int,
) -> torch.Tensor:
    """F + g, of the latents' shape, for the v-prediction F of the consistency function f(x, t) = cos(t)·x - sin(t)·F(x,
    t), t from 0 to π/2. With the derivative along the path, df/dt, and the velocity v = dx/dt of the samples,

        g = cos(t)·df/dt = -cos²(t)·(F - v) - r·cos(t)·sin(t)·(x + dF/dt),

    and then g / (‖g‖ + 0.1) of its root mean square ‖g‖; r goes from 0 to 1 over `warmup_steps` steps (Lu & Song 2024,
    arXiv:2410.11081, algorithm 1, for data of standard deviation 1). Weigh it by `loss.learned_uncertainty`, as in the
    paper.
    """
    alphas, sigmas = (append_dims(x, noisy_latents) for x in schedule.alphas_and_sigmas(timesteps))
    rate = torch.full_like(timesteps, schedule.num_train_timesteps / (math.pi / 2))  # of timesteps, with the angle
    slowed = (alphas * sigmas).flatten()  # within the derivative, so that it is not large where it does not count
    output, derivative = torch.func.jvp(
        lambda noisy_latents, timesteps: predict(noisy_latents, timesteps, conditioning),
        (noisy_latents, timesteps),
        (alphas * sigmas * velocity, slowed * rate),
    )
    warmth = min(1.0, step / config.warmup_steps) if config.warmup_steps else 1.0
    tangent = -alphas.square() * (output - velocity) - warmth * (alphas * sigmas * noisy_latents + derivative)
    norm = append_dims(tangent.flatten(1).square().mean(1).sqrt(), tangent)
    return output + tangent / (norm + TANGENT_FLOOR)


def adaptive_weights(config: FewStepMethodConfig, errors: torch.Tensor, num_elements: int) -> torch.Tensor:
    """MeanFlow's weights of mean squared errors (batch,) of so many elements, of their shape: 1 / (‖Δ‖² + c)^p, times
    the constant with which p = 1 makes of the mean square what it makes of the sum ‖Δ‖² in the paper (Geng et al. 2025,
    section 4.3); 1 for other methods."""
    if config.method != "mean_flow":
        return torch.ones_like(errors)
    return (errors.detach() + ADAPTIVE_FLOOR / num_elements) ** -config.adaptive_power
