"""The noise schedule to train with and the sampler that fits it, from the checkpoint's own and the config."""

import copy
from typing import Any

import diffusers
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, SchedulerMixin

from difftrain_utils.config.config import Config
from difftrain_utils.errors import InputError, blame
from difftrain_utils.objective.schedule import FLOW_SCHEDULERS, Schedule


def build_schedule(
    sampler_class: type[SchedulerMixin], own: dict[str, Any], config: Config, has_init_noise_sigma: bool = False
) -> tuple[Schedule, SchedulerMixin]:
    """The schedule to train with, and a sampler of it for pipelines: of the checkpoint's own class unless
    `scheduler.sampler` names another.

    `own` is the config of the checkpoint's sampler. Where that was not made for flow_prediction, or the pipeline asks
    for an `init_noise_sigma` that it has not, DPM-Solver samples it.

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
    is_flow_match = issubclass(sampler_class, FLOW_SCHEDULERS)
    own_type = "flow_prediction" if is_flow_match else own.get("prediction_type", "epsilon")
    prediction_type = config.model.prediction_type or own_type
    fits = prediction_type != "flow_prediction" or own_type == prediction_type
    is_own = fits and fields.sampler in (None, sampler_class.__name__)
    if fields.sampler is not None:
        sampler_class = _sampler_class(fields.sampler)
    elif not fits or (is_flow_match and prediction_type == own_type and has_init_noise_sigma):
        sampler_class, is_own = DPMSolverMultistepScheduler, False
    if prediction_type == "flow_prediction":
        schedule, sampler = _build_flow(sampler_class, own, overrides, is_own, config)
    else:
        schedule, sampler = _build_ddpm(sampler_class, own, overrides, config)
    _try(sampler, prediction_type, has_init_noise_sigma)
    if config.evaluation.makes_images:
        steps = config.evaluation.num_inference_steps
        with blame(f"evaluation.num_inference_steps: {type(sampler).__name__} refuses {steps}", ValueError):
            if schedule.path == "ddpm" and steps > schedule.num_train_timesteps:  # which not every sampler says
                raise ValueError(f"there are {schedule.num_train_timesteps} timesteps")
            trial = copy.deepcopy(sampler)
            trial.set_timesteps(steps, **_with_mu(sampler))
            if not torch.as_tensor(trial.timesteps).isfinite().all():  # one step with a `shift_terminal` is 0 / 0
                raise ValueError("its timesteps are not finite")
    return schedule, sampler


def _build_flow(
    sampler_class: type[SchedulerMixin], own: dict[str, Any], overrides: dict[str, Any], is_own: bool, config: Config
) -> tuple[Schedule, SchedulerMixin]:
    fields = config.scheduler
    if fields.beta_schedule or fields.rescale_betas_zero_snr:
        raise InputError("scheduler: flow_prediction has no betas; leave beta_schedule and rescale_betas_zero_snr")
    is_dynamic = bool(own.get("use_dynamic_shifting")) and fields.flow_shift is None  # by the family, from the size
    if is_dynamic and fields.sampler is not None and not is_own:
        raise InputError(
            f"scheduler.sampler: the checkpoint's shift depends on the size, which {sampler_class.__name__} here does "
            "not know of; set scheduler.flow_shift"
        )
    shift = fields.flow_shift or own.get("shift") or own.get("flow_shift", 1.0)
    if fields.flow_base_resolution:
        shift *= config.data.resolution / fields.flow_base_resolution
    num_timesteps = overrides.get("num_train_timesteps", own["num_train_timesteps"])
    schedule = Schedule("linear", "flow_prediction", num_timesteps, shift=shift)
    if issubclass(sampler_class, FLOW_SCHEDULERS):
        fitting = {"num_train_timesteps": num_timesteps, "shift": shift}
        fitting |= {"use_dynamic_shifting": is_dynamic} if own.get("use_dynamic_shifting") else {}
    else:
        fitting = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
        fitting["num_train_timesteps"] = num_timesteps
    with blame(f"scheduler.sampler: {sampler_class.__name__}", ValueError, NotImplementedError, TypeError):
        return schedule, sampler_class.from_config(own, **fitting) if is_own else sampler_class(**fitting)


def _build_ddpm(
    sampler_class: type[SchedulerMixin], own: dict[str, Any], overrides: dict[str, Any], config: Config
) -> tuple[Schedule, SchedulerMixin]:
    schedule = Schedule.of(DDPMScheduler.from_config(own, **overrides))
    prediction_type = schedule.prediction_type
    for field in ("flow_shift", "flow_base_resolution"):
        if (value := getattr(config.scheduler, field)) is not None:
            raise InputError(f"scheduler.{field}: goes with flow_prediction, not with {prediction_type}, got {value}")
    if own.get("use_flow_sigmas"):
        raise InputError(f"model.prediction_type: the checkpoint has flow sigmas, and no betas for {prediction_type}")
    if schedule.prediction_type == "epsilon" and schedule.alphas_cumprod[-1] == 0:
        raise InputError(
            "scheduler.rescale_betas_zero_snr: epsilon says nothing of the image at pure noise; "
            "use model.prediction_type v_prediction or sample"
        )
    if config.scheduler.rescale_betas_zero_snr:  # Lin et al. 2024, arXiv:2305.08891: sampling begins at the last one
        overrides = overrides | {"timestep_spacing": "trailing"}
    with blame(f"scheduler.sampler: {sampler_class.__name__}", ValueError, NotImplementedError):
        sampler = sampler_class.from_config(own, **overrides)
    has_betas = hasattr(sampler, "alphas_cumprod")
    if not has_betas or not torch.allclose(sampler.alphas_cumprod, schedule.alphas_cumprod, rtol=0, atol=1e-6):
        name = sampler_class.__name__
        raise InputError(f"scheduler.sampler: {name} does not know this noise schedule; try DDIMScheduler")
    return schedule, sampler


def _with_mu(sampler: SchedulerMixin) -> dict[str, float]:
    """A shift that depends on the size is the pipeline's affair, which says it as mu."""
    return {"mu": 1.0} if sampler.config.get("use_dynamic_shifting") else {}


def _sampler_class(name: str) -> type[SchedulerMixin]:
    cls = getattr(diffusers, name, None)
    if not (isinstance(cls, type) and issubclass(cls, SchedulerMixin)):
        raise InputError(f"scheduler.sampler: diffusers has no scheduler {name!r}")
    return cls


def _try(sampler: SchedulerMixin, prediction_type: str, has_init_noise_sigma: bool) -> None:
    """Take two steps: a sampler says only then that it does not know a prediction type, or needs another pipeline."""
    sampler, latents = copy.deepcopy(sampler), torch.zeros(1, 1, 2, 2)
    culprit = f"scheduler.sampler: {type(sampler).__name__} cannot sample {prediction_type}"
    is_flow = isinstance(sampler, FLOW_SCHEDULERS)
    with blame(culprit, ValueError, NotImplementedError, TypeError, AttributeError):
        sampler.set_timesteps(2, **_with_mu(sampler))
        if has_init_noise_sigma:
            latents = latents * sampler.init_noise_sigma
        elif (sigma := getattr(sampler, "init_noise_sigma", 1.0)) != 1:
            raise ValueError(f"it begins with noise times {sigma:.4g}, which the model's pipeline does not know of")
        for timestep in sampler.timesteps:
            scaled = latents if is_flow else sampler.scale_model_input(latents, timestep)
            latents = sampler.step(latents, timestep, scaled).prev_sample
