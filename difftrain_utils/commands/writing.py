"""Loading what `difftrain generate` writes with, and writing texts; drawing.py is the same for pictures."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

from difftrain_utils.commands.drawing import check_base, leave_out_training, scale_adapters, use
from difftrain_utils.commands.text_model import load_text_model
from difftrain_utils.config.text import TextConfig, TextEvaluationConfig
from difftrain_utils.data.tokenizer import make_tokenizer
from difftrain_utils.devices import weight_dtype
from difftrain_utils.errors import LOAD_ERRORS, InputError, blame
from difftrain_utils.evaluation.generate import check_prompts, generate_texts
from difftrain_utils.families.diffusers_family import move_part
from difftrain_utils.families.family import TextFamily
from difftrain_utils.families.load import load_family, trained_models
from difftrain_utils.optimization.trained import is_trained_whole
from difftrain_utils.run.run_folder import PEFT_FILES
from difftrain_utils.run.source import Source

transformers.logging.disable_progress_bar()


@dataclass
class Loaded:
    """A model and its family; of a run's checkpoints and averages also what they are weights of, and whose weights
    these are now (`drawing.use`)."""

    family: TextFamily
    denoiser: torch.nn.Module
    models: dict[str, torch.nn.Module] = field(default_factory=dict)
    source: Source | None = None


def load(source: Source, config: TextConfig | None, device: torch.device, precision: str) -> Loaded:
    """A model in "fp32", "bf16" or "fp16" on the device; `config` is that of the run that it is of, if it is of one.

    Raises:
        InputError: it cannot be loaded, or is not what the run was trained from.
    """
    loaded = Loaded(*load_text_model(source.path)) if source.kind == "pipeline" else _load_run(source, config)
    dtype = weight_dtype(precision)
    move_part(loaded.denoiser.eval(), device, dtype)
    loaded.family.device, loaded.family.weight_dtype = device, dtype
    if loaded.models:
        use(loaded, source, config)
    return loaded


def _load_run(source: Source, config: TextConfig) -> Loaded:
    """What a run was trained from, as it was; with its exported adapters, or to be given weights that it has saved."""
    leave_out_training(config)
    family = load_family(config, tokenizer=make_tokenizer(config.data))
    if source.kind == "lora":
        denoiser, models = family.load_denoiser(), {}
    else:
        models = trained_models(family, config)
        denoiser = models["denoiser"]
    check_base(family, denoiser, source.record, replaced=bool(models) and is_trained_whole(denoiser))
    if source.kind == "lora":
        if not (Path(source.path) / PEFT_FILES[0]).is_file():  # transformers would take a pickle instead
            raise InputError(f"{source.path}: no {PEFT_FILES[0]}")
        with blame(source.path, *LOAD_ERRORS):
            denoiser.load_adapter(source.path)
    return Loaded(family, denoiser, models)


def check(loaded: Loaded, prompts: Sequence[str], settings: TextEvaluationConfig) -> None:
    """Raise InputError for prompts and a length that the model does not take."""
    family, length = loaded.family, settings.length
    if length > (longest := family.config.max_position_embeddings):
        raise InputError(f"--length: the model takes {longest} tokens at most, got {length}")
    check_prompts(prompts, length, family.tokenizer, "PROMPT", "(--length)")


def write_all(
    loaded: Loaded, samples: Sequence[Any], settings: TextEvaluationConfig, config: TextConfig | None
) -> Iterator[tuple[Any, str]]:
    """Samples (`prompt`, `source`, `scale`, `seed`), each with its text, which torch.Generator().manual_seed(seed)
    draws; some of one source and one scale at a time."""
    progress = tqdm(total=len(samples), unit="text", leave=False, disable=None)
    for (source, scale), group in itertools.groupby(samples, key=lambda sample: (sample.source, sample.scale)):
        if loaded.models:
            use(loaded, source, config)
        if scale is not None:
            scale_adapters([loaded.denoiser], scale)
        group = [*group]
        for start in range(0, len(group), settings.batch_size):
            part = group[start : start + settings.batch_size]
            prompts, generators = zip(*((s.prompt, torch.Generator().manual_seed(s.seed)) for s in part), strict=True)
            texts = generate_texts(loaded.family, loaded.denoiser, settings, settings.length, prompts, generators)
            progress.update(len(part))
            yield from zip(part, texts, strict=True)
    progress.close()
