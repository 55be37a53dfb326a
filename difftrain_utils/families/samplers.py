"""The noise schedule to train with and the sampler that fits it, from the checkpoint's own and the config."""

import copy
from typing import Any

import diffusers
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, SchedulerMixin

from difftrain_utils.config.config import Config
from difftrain_utils.errors import InputError, blame


def build_schedulers(
    checkpoint_class: type[SchedulerMixin], checkpoint_config: dict[str, Any], config: Config
) -> tuple[SchedulerMixin, SchedulerMixin]:
    """(noise_scheduler, sampler): a `DDPMScheduler` or, for flow_prediction, a `FlowMatchEulerDiscreteScheduler` to
    train with, and a sampler of the same schedule for pipelines: the checkpoint's class unless `scheduler.sampler` says
    otherwise (DPM-Solver for flow_prediction, which most other samplers do not know).

    Raises:
        InputError: there is no such sampler, or it does not know the prediction type or the schedule.
    """
    fields = config.scheduler
    overrides = {
        "prediction_type": config.model.prediction_type,
        "beta_schedule": fields.beta_schedule,
        "num_train_timesteps": fields.num_train_timesteps,
        "rescale_betas_zero_snr": fields.rescale_betas_zero_snr,
    }
    overrides = {name: value for name, value in overrides.items() if value is not None}
    wanted = dict(checkpoint_config) | overrides
    own_type = "flow_prediction" if "FlowMatch" in checkpoint_class.__name__ else "epsilon"  # where it does not say
    prediction_type = wanted.get("prediction_type", own_type)
    sampler_class = checkpoint_class if fields.sampler is None else _sampler_class(fields.sampler)
    if prediction_type == "flow_prediction":
        if fields.beta_schedule or fields.rescale_betas_zero_snr:
            raise InputError("scheduler: flow_prediction has no betas; leave beta_schedule and rescale_betas_zero_snr")
        shift = fields.flow_shift or checkpoint_config.get("shift") or checkpoint_config.get("flow_shift", 1.0)
        shift *= config.data.resolution / (fields.flow_base_resolution or config.data.resolution)
        num_timesteps = wanted["num_train_timesteps"]
        noise_scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=num_timesteps, shift=shift)
        flow = {"prediction_type": prediction_type, "use_flow_sigmas": True, "flow_shift": shift}
        sampler_class = sampler_class if fields.sampler else DPMSolverMultistepScheduler
        with blame(f"scheduler.sampler: {sampler_class.__name__}", ValueError, NotImplementedError, TypeError):
            sampler = sampler_class(num_train_timesteps=num_timesteps, **flow)
    else:
        noise_scheduler = DDPMScheduler.from_config(checkpoint_config, **overrides)
        if prediction_type == "epsilon" and noise_scheduler.alphas_cumprod[-1] == 0:
            raise InputError(
                "scheduler.rescale_betas_zero_snr: epsilon says nothing of the image at pure noise; "
                "use model.prediction_type v_prediction or sample"
            )
        with blame(f"scheduler.sampler: {sampler_class.__name__}", ValueError, NotImplementedError):
            sampler = sampler_class.from_config(checkpoint_config, **overrides)
        if not torch.allclose(sampler.alphas_cumprod, noise_scheduler.alphas_cumprod, rtol=0, atol=1e-6):
            raise InputError(
                f"scheduler.sampler: {sampler_class.__name__} does not know this noise schedule; try DDIMScheduler"
            )
    _try(sampler, prediction_type)
    return noise_scheduler, sampler


def _sampler_class(name: str) -> type[SchedulerMixin]:
    cls = getattr(diffusers, name, None)
    if not (isinstance(cls, type) and issubclass(cls, SchedulerMixin)):
        raise InputError(f"scheduler.sampler: diffusers has no scheduler {name!r}")
    return cls


def _try(sampler: SchedulerMixin, prediction_type: str) -> None:
    """Take two steps: a sampler says only then that it does not know a prediction type, or needs another pipeline."""
    sampler, latents = copy.deepcopy(sampler), torch.zeros(1, 1, 2, 2)
    culprit = f"scheduler.sampler: {type(sampler).__name__} cannot sample {prediction_type}"
    with blame(culprit, ValueError, NotImplementedError, TypeError, AttributeError):
        sampler.set_timesteps(2)
        latents = latents * sampler.init_noise_sigma
        for timestep in sampler.timesteps:
            latents = sampler.step(latents, timestep, sampler.scale_model_input(latents, timestep)).prev_sample
