"""Guidance that pipelines of diffusers do not have: at some noise levels only, and by a weaker model. Both are done by
what stands in for the denoiser in the family's own pipeline."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import BaseOutput

from difftrain_utils.config.evaluation import EvaluationConfig
from difftrain_utils.errors import LOAD_ERRORS, InputError, RunError, blame
from difftrain_utils.families.diffusers_family import load_part, load_weights, move_part
from difftrain_utils.families.load import read_index
from difftrain_utils.families.samplers import path_and_prediction
from difftrain_utils.objective.schedule import SIGMA_SCHEDULERS, Schedule
from difftrain_utils.optimization.trained import saved_state, trained_parameters
from difftrain_utils.run import weights
from difftrain_utils.run.run_folder import CONFIG_FILE
from difftrain_utils.run.saved_tensors import SavedTensors
from difftrain_utils.run.source import EMA, Source, find_sources
from difftrain_utils.terminal import announce


class GuidedDenoiser(torch.nn.Module):
    """A denoiser for one pipeline, called as the denoiser `strong` and with all that it has.

    With a `weaker` one, whose pipeline does without guidance, it puts out weaker + scale · (strong - weaker) of one
    input: autoguidance (Karras et al. 2024, arXiv:2406.02507). Without, the pipeline guides: outside of the
    `interval` it is given the prediction for the prompt as the one for no prompt, so that their difference is 0
    (Kynkäänniemi et al. 2024, arXiv:2404.07724). The interval is [start, stop] of the share of noise s / (a + s) of
    x_t = a·x_0 + s·ε, from 0 to 1; that of flow matching is its time.
    """

    def __init__(
        self,
        strong: torch.nn.Module,
        family,
        sampler,
        interval: Sequence[float] | None = None,
        weaker: torch.nn.Module | None = None,
        scale: float = 1.0,
    ):
        super().__init__()
        self.strong, self.weaker, self.scale = strong, weaker, scale
        self._schedule, self._sampler = family.schedule or Schedule.of(sampler), sampler
        self._interval, self._order = interval or (0.0, 1.0), family.guidance_order
        self._calls_of_step = 2 if weaker is None and self._order == "apart" else 1
        self._calls, self._levels, self._of_prompt = 0, [], None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("strong"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        number = self._calls
        if number == 0:  # only now the sampler knows its steps
            self._levels = noise_levels(self._schedule, self._sampler)
        self._calls = (number + 1) % (len(self._levels) * self._calls_of_step)  # a pipeline may be called again
        start, stop = self._interval
        is_guided = start <= self._levels[number // self._calls_of_step] <= stop
        if self.weaker is None and self._order == "apart" and not is_guided and number % 2:
            return self._of_prompt
        output = self.strong(*args, **kwargs)
        if is_guided and self.weaker is None:
            return output
        if is_guided:
            return _change(self._extrapolate, output, self.weaker(*args, **kwargs))
        self._of_prompt = output
        return output if self._order == "apart" or self.weaker is not None else _change(self._for_both, output)

    def _extrapolate(self, strong: Any, weaker: Any) -> Any:
        if isinstance(strong, list):  # Z-Image's
            return [self._extrapolate(*of_one) for of_one in zip(strong, weaker, strict=True)]
        return weaker + self.scale * (strong - weaker)

    def _for_both(self, output: Any) -> Any:
        """The prompts' half of the predictions twice."""
        half = len(output) // 2
        of_prompts = output[:half] if self._order == "prompt first" else output[half:]
        return [*of_prompts, *of_prompts] if isinstance(output, list) else torch.cat([of_prompts, of_prompts])


def _change(function: Callable[..., Any], *outputs: Any) -> Any:
    """`function` of what is predicted, which is the first thing that denoisers put out."""
    changed = function(*(output[0] for output in outputs))
    return type(outputs[0])(sample=changed) if isinstance(outputs[0], BaseOutput) else (changed, *outputs[0][1:])


def noise_levels(schedule: Schedule, sampler) -> list[float]:
    """The share of noise s / (a + s) at each of a sampler's timesteps."""
    if isinstance(sampler, SIGMA_SCHEDULERS):
        sigmas = sampler.sigmas[: len(sampler.timesteps)]  # s / a
        return (sigmas / (1 + sigmas)).tolist()
    timesteps = sampler.timesteps.detach().cpu().float()
    if not schedule.has_continuous_time:
        timesteps = timesteps.round().long().clamp(0, schedule.num_train_timesteps - 1)
    alphas, sigmas = schedule.alphas_and_sigmas(timesteps)
    return (sigmas / (alphas + sigmas)).tolist()


def guide(
    family, denoiser: torch.nn.Module, weaker: torch.nn.Module | None, config: EvaluationConfig
) -> tuple[torch.nn.Module, float]:
    """What stands in for the denoiser in the family's pipeline, and the guidance scale that the pipeline is told."""
    if config.guidance_interval is None and weaker is None:
        return denoiser, config.guidance_scale
    scale = config.guidance_scale
    guided = GuidedDenoiser(denoiser, family, family.sampler, config.guidance_interval, weaker, scale)
    return guided, scale if weaker is None else 1.0


def check_guidance(family, config: Any) -> None:
    """Raise InputError if the family's pipeline does not guide by two predictions, and `config` has a
    `guidance_interval` or `autoguidance`."""
    for field in ("guidance_interval", "autoguidance"):
        value = getattr(config, field)
        if value is not None and family.guidance_order is None:
            raise InputError(f"evaluation.{field}: the model's pipeline has none that is known here, got {value}")
        if value is not None and family.is_distilled:
            raise InputError(f"evaluation.{field}: the {family.class_name} was distilled with its own, got {value}")


def load_weaker(family, sampler, name: str, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    """The denoiser that `evaluation.autoguidance` names, in `dtype` on the device: of a pipeline (folder or name on the
    hub), of a run, a checkpoint, or a file of weights of `train.save_weights_every`; the last two of the family's own
    architecture. `sampler` is that of the family's pipeline.

    Raises:
        InputError: it cannot be loaded, the family's pipeline cannot have it, or it predicts something else or on
            another path, as far as that is known: a file of weights that is not in its run's folder does not say it.
    """
    announce(f"Loading {name}, for autoguidance")
    try:
        with blame(f"cannot use {name!r}", *LOAD_ERRORS, RunError):
            is_file = name.endswith(".safetensors")
            source = Source("weights", name, _run_of(Path(name))) if is_file else find_sources(name)[0]
            found, own = _path_and_prediction(family, source), Schedule.of(sampler)
            if found not in (None, (own.path, own.prediction_type)):
                its, ours = "{1} on the path {0}".format(*found), f"{own.prediction_type} on the path {own.path}"
                raise ValueError(f"it predicts {its}, and the model {ours}")
            weaker = _load_denoiser(family, source)
            family.check_denoiser(weaker)
    except InputError as error:
        reason = str(error).removeprefix("model.pretrained_model_name_or_path: ")
        raise InputError(f"evaluation.autoguidance: {reason}") from error
    return move_part(weaker.eval().requires_grad_(False), device, dtype)


def _run_of(weights_file: Path) -> Path | None:
    """The folder of the run that has kept a file of weights; None: it is in none."""
    folder = weights_file.absolute().parent.parent
    return folder if (folder / CONFIG_FILE).is_file() else None


def _path_and_prediction(family, source: Source) -> tuple[str, str] | None:
    """The path of a weaker model, and what it predicts; None: it is not known. Raises ValueError if it is of another
    family, or adapters."""
    if source.kind == "lora":
        raise ValueError("these are adapters; name a pipeline (model.lora.merge), or the base")
    if source.kind == "pipeline":
        name, revision, asked = source.path, None, {}
    elif source.record is None:
        return None
    else:
        model, path = source.config["model"], source.config["scheduler"].get("path")
        name, revision = model["pretrained_model_name_or_path"], model.get("revision")
        asked = {"path": path, "prediction_type": None if family.converts_itself else model.get("prediction_type")}
    place, model_index = read_index(name, revision)
    if model_index["_class_name"] != family.class_name:
        raise ValueError(f"it is a {model_index['_class_name']}, not a {family.class_name}")
    sampler = load_part(place, model_index, "scheduler", revision=revision)
    return path_and_prediction(type(sampler), sampler.config, **asked)


def _load_denoiser(family, source: Source) -> torch.nn.Module:
    if source.kind == "pipeline":
        place, model_index = read_index(source.path, None)
        return load_weights(place, model_index, family.denoiser_part, use_safetensors=True)  # other files are pickles
    denoiser = family.load_denoiser()
    if source.kind == "weights":
        weights.load_weights(Path(source.path), denoiser, None)
        return denoiser
    with SavedTensors(Path(source.path)) as saved:
        saved.load("denoiser", saved_state(denoiser))
        if source.weights == EMA:
            saved.load("ema", {str(i): p.detach() for i, p in enumerate(trained_parameters(denoiser))})
    return denoiser
