"""Where weights to draw with lie: what a run exported, its checkpoints, its EMA snapshots, or anybody's pipeline.
Imports no torch, so that a slip is reported at once."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from difftrain_utils.config.scripts import script_for
from difftrain_utils.errors import LOAD_ERRORS, InputError, blame, warn
from difftrain_utils.files import local_path
from difftrain_utils.run.run_folder import (
    BEST_FILE,
    CONFIG_FILE,
    EMA_SNAPSHOTS,
    LORA,
    PIPELINE,
    STATE_FILE,
    WEIGHTS,
    checkpoint_damage,
    checkpoint_name,
    list_checkpoints,
    read_about_weights,
    read_manifest,
    read_mapping,
)

INDEX_FILE = "model_index.json"  # of a pipeline's folder
MODEL_FILE = "config.json"  # of a text model's, in transformers' format
RAW, EMA, BEST = "raw", "ema", "best"
MAKES = {"train_text_to_video.py": "videos", "train_text_to_audio.py": "sounds", "train_text.py": "texts"}


@dataclass(frozen=True)
class Source:
    """Weights, and where they lie: `path` is a "pipeline" (a folder, a hub name or a `builtin:` name; of texts that of
    a model in transformers' format), a run's "lora", a "checkpoint" of it, a file of its "weights" alone, or its EMA
    snapshots, of which `weights` says the width of an "average"."""

    kind: Literal["pipeline", "lora", "checkpoint", "weights", "average"]
    path: str
    record: Path | None = None
    """The folder with the config and the manifest of the run; None: they are of none."""
    step: int | None = None
    weights: str | float | None = None
    """`raw`, `ema`, a width, or None: there is one kind."""

    @property
    def config(self) -> dict[str, Any]:
        """The content of the run's config; {}: there is no run. Raises InputError if it is damaged."""
        return {} if self.record is None else read_mapping(self.record / CONFIG_FILE)

    @property
    def makes(self) -> Literal["pictures", "videos", "sounds", "texts"]:
        """What they are for. Of a name on the hub, the hub says by its files whether it is a text model. Raises
        InputError if a pipeline does not say what it is."""
        if self.record is not None:
            return MAKES.get(script_for(["--config", str(self.record / CONFIG_FILE)]), "pictures")
        from difftrain_utils.builtins.checkpoints import TEXT_BUILTINS

        if self.path in TEXT_BUILTINS or (not self.path.startswith("builtin:") and _is_text_model(self.path)):
            return "texts"
        from difftrain_utils.families.load import AUDIO_FAMILIES, VIDEO_FAMILIES, read_index

        with blame(self.path, *LOAD_ERRORS):
            class_name = read_index(self.path, None)[1]["_class_name"]
        return "videos" if class_name in VIDEO_FAMILIES else "sounds" if class_name in AUDIO_FAMILIES else "pictures"

    @property
    def tells_gap(self) -> bool:
        """Whether they are a run's whose denoiser is told how far a step goes."""
        few_step = self.config.get("few_step")
        return isinstance(few_step, dict) and few_step.get("method") != "consistency"

    @property
    def has_adapters(self) -> bool:
        """Whether what was learned can be scaled."""
        if self.kind not in ("checkpoint", "weights"):
            return self.kind == "lora"
        model = self.config.get("model")
        return isinstance(model, dict) and bool(model.get("lora"))

    def __str__(self) -> str:
        names = {None: "", RAW: ", the raw weights", EMA: ", the EMA weights"}
        weights = names.get(self.weights, f", the average of width {self.weights}")
        return f"{self.path}{weights}" + (f" of step {self.step}" if self.step is not None else "")


def find_sources(
    name: str, steps: Sequence[int] = (), weights: str | float | None = None, prefer: str = PIPELINE
) -> list[Source]:
    """What `name` is: a run, a checkpoint, or a pipeline's folder, hub name or `builtin:` name. Of a run it is what it
    has exported (`pipeline/` or `lora/`; of both that which is preferred) or, if it is not finished or `weights` are
    asked for, its newest intact checkpoint; or its checkpoints of these `steps`, one each, or their weights alone where
    only these were kept; "best" are those that `train.keep_best` has kept.

    Raises:
        InputError: it is none of them, damaged, or has no such step or weights.
    """
    folder = local_path(name)
    if (folder / STATE_FILE).is_file():
        for option, is_given in (("--checkpoint", bool(steps)), ("--weights best", weights == BEST)):
            if is_given:
                raise InputError(f"{option}: goes with a run, and {name} is a checkpoint itself")
        return [_of_checkpoint(folder, weights)]
    if (folder / CONFIG_FILE).is_file():
        return _of_run(folder, steps, weights, prefer)
    for option, value in (("--checkpoint", steps or None), ("--weights", weights)):
        if value is not None:
            raise InputError(f"{option}: goes with a run or a checkpoint, and {name} is none")
    if folder.exists() and not any((folder / file).is_file() for file in (INDEX_FILE, MODEL_FILE)):
        none = f"no run ({CONFIG_FILE}), no checkpoint ({STATE_FILE}), no pipeline ({INDEX_FILE} or {MODEL_FILE})"
        raise InputError(f"{name}: {none}")
    if not folder.exists() and (folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1):
        raise InputError(f"{name}: no such folder")
    return [Source("pipeline", str(folder) if folder.exists() else name)]


def _is_text_model(name: str) -> bool:
    return not _has_file(name, INDEX_FILE) and _has_file(name, MODEL_FILE)


def _has_file(name: str, file: str) -> bool:
    """Whether a folder, or a name on the hub or in its cache, has this file. What cannot be known, loading it says."""
    if Path(name).exists():
        return (Path(name) / file).is_file()
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

    try:
        hf_hub_download(name, file)
    except (EntryNotFoundError, HfHubHTTPError, HFValidationError, OSError):
        return False
    return True


def _of_run(run: Path, steps: Sequence[int], weights: str | float | None, prefer: str) -> list[Source]:
    checkpoints = dict(list_checkpoints(run))
    alone = {int(path.stem.removeprefix("step-")): path for path in (run / WEIGHTS).glob("step-[0-9]*.safetensors")}
    if isinstance(weights, float):
        return [Source("average", str(run / EMA_SNAPSHOTS), run, step, weights) for step in steps or [None]]
    if weights == BEST:
        if steps:
            raise InputError("--weights best: of one step, which --checkpoint cannot choose")
        if not (run / WEIGHTS / BEST_FILE).is_file():
            raise InputError(f"--weights best: {run} has none, which train.keep_best keeps")
        return [_of_weights(run / WEIGHTS / BEST_FILE, run)]
    for step in steps:
        if step not in checkpoints and (step not in alone or weights):
            there = sorted(checkpoints.keys() | (set() if weights else alone.keys()))
            there = ", ".join(map(str, there)) or "none"
            raise InputError(f"--checkpoint: {run} has no {checkpoint_name(step)}; there is {there}")
    if steps:
        return [
            _of_checkpoint(checkpoints[step], weights) if step in checkpoints else _of_weights(alone[step], run)
            for step in steps
        ]
    if weights is None and (exported := exported_by(run, prefer)):
        return [exported]
    damages = []
    for folder in reversed(checkpoints.values()):
        if (damage := checkpoint_damage(folder)) is None:
            for text in damages:
                warn(f"{text}; going on with {folder.name}")
            return [_of_checkpoint(folder, weights, is_checked=True)]
        damages.append(f"{folder} is damaged: {damage}")
    raise InputError("; ".join(damages) or f"{run}: has no {PIPELINE}/ or {LORA}/ yet, and no checkpoint")


def exported_by(run: Path, prefer: str = PIPELINE) -> Source | None:
    """What a finished run has exported; None: it is not finished."""
    try:
        final = read_manifest(run).get("final")
    except (OSError, ValueError):
        return None
    found = sorted((name for name in (PIPELINE, LORA) if (run / name).is_dir()), key=lambda name: name != prefer)
    if not found or not isinstance(final, dict):
        return None
    kind = "lora" if found[0] == LORA else "pipeline"
    return Source(kind, str(run / found[0]), run, final.get("global_step"), _exported_weights(run))


def _of_checkpoint(folder: Path, weights: str | float | None, is_checked: bool = False) -> Source:
    if not is_checked and (damage := checkpoint_damage(folder)):
        raise InputError(f"{folder} is damaged: {damage}")
    step = read_mapping(folder / STATE_FILE).get("global_step")
    if isinstance(weights, float):
        return Source("average", str(folder.parent / EMA_SNAPSHOTS), folder, step, weights)
    exported = _exported_weights(folder)
    if weights == EMA and exported == RAW:
        raise InputError(f"--weights ema: {folder} has none (ema.enabled is false)")
    return Source("checkpoint", str(folder), folder, step, weights or exported)


def _of_weights(path: Path, run: Path) -> Source:
    about = read_about_weights(path)
    return Source("weights", str(path), run, about["step"], about["weights"])


def _exported_weights(record: Path) -> str:
    """Those that a run with the config in this folder exports."""
    ema = read_mapping(record / CONFIG_FILE).get("ema")
    return RAW if isinstance(ema, dict) and ema.get("enabled") is False else EMA
