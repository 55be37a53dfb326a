"""The noise schedule to train with and the sampler that fits it, from the checkpoint's own and the config."""

import copy
import inspect
import math
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)

from difftrain_utils.config.config import Config
from difftrain_utils.config.few_step import FewStepConfig
from difftrain_utils.errors import InputError, blame
from difftrain_utils.objective.schedule import (
    FLOW_SCHEDULERS,
    PREDICTION_TYPES,
    Schedule,
    append_dims,
    cosine_betas,
    path_of,
)

FIELDS_OF_PATHS = {
    "ddpm": ("beta_schedule", "rescale_betas_zero_snr"),
    "linear": ("flow_shift", "flow_shift_by_tokens", "flow_base_resolution"),
}
SMALLEST_LAMBDA = -5.1  # of ln(a/s), where diffusers' docs let epsilon begin on a cosine: below it says little of x_0


def build_schedule(
    sampler_class: type[SchedulerMixin],
    own: dict[str, Any],
    config: Config,
    has_init_noise_sigma: bool = False,
    gives_sigmas: bool = False,
) -> tuple[Schedule, SchedulerMixin]:
    """The schedule to train with, and a sampler of it for pipelines: of the checkpoint's own class unless
    `scheduler.sampler` names another.

    `own` is the config of the checkpoint's sampler. Where that is of another path or does not sample what is predicted,
    or the pipeline asks for an `init_noise_sigma` that it has not, DPM-Solver samples; UniPC if the pipeline gives its
    sampler the sigmas.

    Raises:
        InputError: there is no such sampler, or none of the path and prediction type, or a field is of another path.
    """
    fields, is_flow_match = config.scheduler, issubclass(sampler_class, FLOW_SCHEDULERS)
    own_path, own_type = path_and_prediction(sampler_class, own)
    path, prediction_type = path_and_prediction(sampler_class, own, fields.path, config.model.prediction_type)
    _check_pair(path, prediction_type, own_path, gives_sigmas, config)
    fits = path == own_path and not (is_flow_match and (prediction_type != own_type or has_init_noise_sigma))
    is_own = fits and fields.sampler in (None, sampler_class.__name__)
    if fields.sampler is not None:
        sampler_class = _sampler_class(fields.sampler)
    elif not fits:
        sampler_class = UniPCMultistepScheduler if gives_sigmas else DPMSolverMultistepScheduler
    if path == "linear":
        schedule, fitting = _linear(sampler_class, own, prediction_type, is_own, config)
    elif path == "cosine":
        schedule, fitting = _cosine(sampler_class, own, prediction_type, config)
    else:
        schedule, fitting = _ddpm(own if own_path == path else {}, prediction_type, config)
    kept = own if is_own or path == own_path == "ddpm" else {}
    known = inspect.signature(sampler_class).parameters
    if "clip_sample" not in kept and "clip_sample" in known:
        fitting["clip_sample"] = False  # latents go beyond 1
    if not kept and path != "ddpm" and "steps_offset" in known:
        fitting["steps_offset"] = 1  # else Stable Diffusion's pipelines warn; it is used on neither path
    with blame(f"scheduler.sampler: {sampler_class.__name__}", ValueError, NotImplementedError, TypeError):
        sampler = sampler_class.from_config(kept, **fitting) if kept else sampler_class(**fitting)
    if path == "ddpm":
        _check_betas(sampler, schedule, own)
    _try(sampler, schedule, own, has_init_noise_sigma)
    if config.evaluation.makes_images:
        steps = config.evaluation.num_inference_steps
        with blame(f"evaluation.num_inference_steps: {type(sampler).__name__} refuses {steps}", ValueError):
            if path != "linear" and steps > schedule.num_train_timesteps:  # which not every sampler says
                raise ValueError(f"there are {schedule.num_train_timesteps} timesteps")
            trial = copy.deepcopy(sampler)
            with np.errstate(invalid="ignore"):
                trial.set_timesteps(steps, **_with_mu(sampler))
            if not torch.as_tensor(trial.timesteps).isfinite().all():  # one step with a `shift_terminal` is 0 / 0
                raise ValueError("its timesteps are not finite")
    return schedule, sampler


def path_and_prediction(
    sampler_class: type[SchedulerMixin],
    own: dict[str, Any],
    path: str | None = None,
    prediction_type: str | None = None,
) -> tuple[str, str]:
    """The path and the prediction type of a run with these fields, of a checkpoint with a sampler of this class and
    config."""
    own_path, is_flow_match = path_of(sampler_class, own), issubclass(sampler_class, FLOW_SCHEDULERS)
    own_type = "flow_prediction" if is_flow_match else own.get("prediction_type", "epsilon")
    prediction_type = prediction_type or own_type
    return path or ("linear" if prediction_type == "flow_prediction" else own_path), prediction_type


def few_step_sampler(schedule: Schedule, sampler: SchedulerMixin, config: FewStepConfig) -> SchedulerMixin:
    """The sampler of a model that samples in few steps: on the path `linear` equal steps of the first order, as the
    model's mean velocities are meant; on the path `cosine` what goes to the data and back to the noise, with each step.

    Raises:
        InputError: the schedule is not that of the method, or its steps are not equal.
    """
    method = config.few_step.method
    path, prediction_type = ("linear", "flow_prediction") if config.tells_gap else ("cosine", "v_prediction")
    if (schedule.path, schedule.prediction_type) != (path, prediction_type):
        got = f"{schedule.prediction_type} on the path {schedule.path}"
        raise InputError(f"few_step.method: {method} is of {prediction_type} on the path {path}, got {got}")
    if not config.tells_gap:
        num_timesteps = schedule.num_train_timesteps
        betas = cosine_betas(num_timesteps)
        return LCMScheduler(num_timesteps, trained_betas=betas, prediction_type=prediction_type, clip_sample=False)
    if schedule.shift != 1 or sampler.config.get("use_dynamic_shifting"):
        raise InputError(f"scheduler.flow_shift: must be 1 for {method}, whose steps are equal")
    if isinstance(sampler, DPMSolverMultistepScheduler):
        return DPMSolverMultistepScheduler.from_config(sampler.config, solver_order=1)
    if not isinstance(sampler, FlowMatchEulerDiscreteScheduler):
        name = type(sampler).__name__
        raise InputError(
            f"scheduler.sampler: {method} makes Euler's steps; try DPMSolverMultistepScheduler, not {name}"
        )
    return sampler


def _check_pair(path: str, prediction_type: str, own_path: str, gives_sigmas: bool, config: Config) -> None:
    """Raise InputError for a pair that no sampler of diffusers knows, and for fields of another path."""
    wrong = {"linear": ("v_prediction", "a² + s² = 1")}.get(path, ("flow_prediction", "a + s = 1"))
    if prediction_type == wrong[0]:
        others = ", ".join(name for name in PREDICTION_TYPES if name != prediction_type)
        raise InputError(
            f"model.prediction_type: {prediction_type} has no sampler on the path {path}, for those of diffusers rely "
            f"on {wrong[1]}; there are {others}"
        )
    for other, names in FIELDS_OF_PATHS.items():
        for name in names if other != path else ():
            if value := getattr(config.scheduler, name):
                raise InputError(f"scheduler.{name}: goes with the path {other}, not with {path}, got {value}")
    if path == "ddpm" != own_path and config.scheduler.beta_schedule is None:
        raise InputError(f"scheduler.beta_schedule: must be given, for the checkpoint's path is {own_path}, not ddpm")
    if gives_sigmas and path != "linear":
        raise InputError(f"scheduler.path: must be linear for a pipeline that says where to sample, got {path}")
    if gives_sigmas and prediction_type == "epsilon":
        raise InputError(
            "model.prediction_type: epsilon says nothing of the image at pure noise, where this model's pipeline "
            "begins; use flow_prediction or sample"
        )


def _linear(
    sampler_class: type[SchedulerMixin], own: dict[str, Any], prediction_type: str, is_own: bool, config: Config
) -> tuple[Schedule, dict[str, Any]]:
    """The schedule, and the fields of a sampler that fits it."""
    fields = config.scheduler
    by_tokens = fields.flow_shift_by_tokens
    is_dynamic = bool(own.get("use_dynamic_shifting")) and fields.flow_shift is None  # by the family, from the size
    if by_tokens and not (is_own and issubclass(sampler_class, FlowMatchEulerDiscreteScheduler)):
        raise InputError(
            "scheduler.flow_shift_by_tokens: needs flow_prediction and the checkpoint's own "
            "FlowMatchEulerDiscreteScheduler, which knows of it"
        )
    if is_dynamic and not is_own and (fields.sampler is not None or prediction_type != "flow_prediction"):
        raise InputError(
            f"scheduler.flow_shift: must be given, for the checkpoint's shift depends on the size, which a "
            f"{sampler_class.__name__} here does not know of"
        )
    shift = fields.flow_shift or own.get("shift") or own.get("flow_shift", 1.0)
    if fields.flow_base_resolution:
        shift *= config.data.resolution / fields.flow_base_resolution
    num_timesteps = fields.num_train_timesteps or own["num_train_timesteps"]
    schedule = Schedule("linear", prediction_type, num_timesteps, shift=shift)
    if issubclass(sampler_class, FLOW_SCHEDULERS):
        fitting = {"shift": shift} | ({"use_dynamic_shifting": is_dynamic} if own.get("use_dynamic_shifting") else {})
        if by_tokens:
            (least, base_shift), (most, max_shift) = by_tokens
            fitting |= {"use_dynamic_shifting": True, "time_shift_type": "exponential"}
            fitting |= {"base_image_seq_len": int(least), "max_image_seq_len": int(most)}
            fitting |= {"base_shift": math.log(base_shift), "max_shift": math.log(max_shift)}
    elif "use_flow_sigmas" in inspect.signature(sampler_class).parameters:
        fitting = {"prediction_type": prediction_type, "use_flow_sigmas": True, "flow_shift": shift}
    else:
        name = sampler_class.__name__
        raise InputError(f"scheduler.sampler: {name} does not sample the path linear; try DPMSolverMultistepScheduler")
    return schedule, fitting | {"num_train_timesteps": num_timesteps}


def _cosine(
    sampler_class: type[SchedulerMixin], own: dict[str, Any], prediction_type: str, config: Config
) -> tuple[Schedule, dict[str, Any]]:
    """The same. Samplers know the path by betas, and begin at the noisiest of them."""
    num_timesteps = config.scheduler.num_train_timesteps or own["num_train_timesteps"]
    fitting = {"trained_betas": cosine_betas(num_timesteps), "timestep_spacing": "trailing"}
    fitting |= {"prediction_type": prediction_type, "num_train_timesteps": num_timesteps}
    if prediction_type == "epsilon" and "lambda_min_clipped" in inspect.signature(sampler_class).parameters:
        fitting["lambda_min_clipped"] = SMALLEST_LAMBDA
    if "snr_shift_scale" in inspect.signature(sampler_class).parameters:
        fitting["snr_shift_scale"] = 1.0  # the betas are what is meant
    return Schedule("cosine", prediction_type, num_timesteps), fitting


def _ddpm(own: dict[str, Any], prediction_type: str, config: Config) -> tuple[Schedule, dict[str, Any]]:
    """The same, of the betas in `own` or the config."""
    names = ("beta_schedule", "num_train_timesteps", "rescale_betas_zero_snr")
    fitting = {name: value for name in names if (value := getattr(config.scheduler, name)) is not None}
    fitting["prediction_type"] = prediction_type
    known_class = CogVideoXDDIMScheduler if _is_of_cogvideox(own) else DDPMScheduler
    schedule = Schedule.of(known_class.from_config(own, **fitting))
    if prediction_type == "epsilon" and schedule.alphas_cumprod[-1] == 0:
        raise InputError(
            "scheduler.rescale_betas_zero_snr: epsilon says nothing of the image at pure noise; "
            "use model.prediction_type v_prediction or sample"
        )
    if config.scheduler.rescale_betas_zero_snr:  # Lin et al. 2024, arXiv:2305.08891: sampling begins at the last one
        fitting["timestep_spacing"] = "trailing"
    return schedule, fitting


def _is_of_cogvideox(own: dict[str, Any]) -> bool:
    """Whether a checkpoint's sampler is one of CogVideoX's, which shift the signal-to-noise ratios of the betas."""
    return "snr_shift_scale" in own


def _check_betas(sampler: SchedulerMixin, schedule: Schedule, own: dict[str, Any]) -> None:
    """Raise InputError unless the sampler has the schedule's: `from_config` is silent about fields that it ignores."""
    has_betas = hasattr(sampler, "alphas_cumprod")
    if not has_betas or not torch.allclose(sampler.alphas_cumprod.float(), schedule.alphas_cumprod, rtol=0, atol=1e-6):
        name, other = type(sampler).__name__, "CogVideoXDDIMScheduler" if _is_of_cogvideox(own) else "DDIMScheduler"
        raise InputError(f"scheduler.sampler: {name} does not know this noise schedule; try {other}")


def _with_mu(sampler: SchedulerMixin) -> dict[str, float]:
    """A shift that depends on the size is the pipeline's affair, which says it as mu."""
    return {"mu": 1.0} if sampler.config.get("use_dynamic_shifting") else {}


def _sampler_class(name: str) -> type[SchedulerMixin]:
    cls = getattr(diffusers, name, None)
    if not (isinstance(cls, type) and issubclass(cls, SchedulerMixin)):
        raise InputError(f"scheduler.sampler: diffusers has no scheduler {name!r}")
    return cls


def _try(sampler: SchedulerMixin, schedule: Schedule, own: dict[str, Any], has_init_noise_sigma: bool) -> None:
    """Take two steps: a sampler says only then that it does not know a prediction type, or needs another pipeline. Told
    the true prediction of one image it has to come out at that."""
    sampler, image = copy.deepcopy(sampler), torch.full((1, 1, 2, 2), 0.7)
    latents = torch.tensor([[1.0, -1.0], [-0.5, 0.5]]).expand_as(image)
    name, prediction_type = type(sampler).__name__, schedule.prediction_type
    culprit = f"scheduler.sampler: {name} cannot sample {prediction_type} on the path {schedule.path}"
    with blame(culprit, ValueError, NotImplementedError, TypeError, AttributeError, IndexError, AssertionError):
        sampler.set_timesteps(2, **_with_mu(sampler))
        if has_init_noise_sigma:
            latents = latents * sampler.init_noise_sigma
        elif (sigma := getattr(sampler, "init_noise_sigma", 1.0)) != 1:
            raise ValueError(f"it begins with noise times {sigma:.4g}, which the model's pipeline does not know of")
        for timestep in sampler.timesteps:
            is_flow = isinstance(sampler, FLOW_SCHEDULERS)
            noisy = latents if is_flow else sampler.scale_model_input(latents, timestep)
            time = timestep[None].float() if schedule.has_continuous_time else timestep[None].long()
            alphas, sigmas = (append_dims(x, image) for x in schedule.alphas_and_sigmas(time))
            output = schedule.target(image, (noisy - alphas * image) / sigmas.clamp(min=1e-6), time)
            if isinstance(sampler, CogVideoXDPMScheduler) and _is_of_cogvideox(own):  # called otherwise
                latents, _ = sampler.step(output, None, timestep, None, latents, generator=torch.Generator())
            else:
                latents = sampler.step(output, timestep, latents).prev_sample
        if schedule.path != "ddpm" and not (latents - image).abs().max() < 0.1:  # of betas, some end in a little noise
            raise ValueError("of the true predictions of an image it makes another one")
