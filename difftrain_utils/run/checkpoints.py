"""Checkpoints to resume from: complete or absent, never half, and verified before they are loaded.

`checkpoint-500/` holds accelerate's `save_state` (learning rate, loss scale), the tensors of each trained model, of the
optimizer and of each average of weights (`saved_tensors`), the rest of the optimizer in `optimizer.json`,
`training_state.json`, and the record of the run that it is from. It is written aside, with the digests of its files in
`SHA256SUMS` last, and renamed when all of it is on the disk. There is no random state in it, because keyed samples need
none, and nothing whose loading runs code: accelerate's files are read with `weights_only`."""

import dataclasses
import json
import os
import shutil
import threading
import uuid
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError
from safetensors.torch import save_file

from difftrain_utils.config.config import Config, rename_fields
from difftrain_utils.config.training import EmaConfig, TrainConfig
from difftrain_utils.errors import (
    LOAD_ERRORS,
    InputError,
    RunError,
    blame,
    is_death_of_worker,
    one_line,
    shorten,
    some,
    warn,
)
from difftrain_utils.files import (
    DIGESTS_FILE,
    PARTIAL,
    file_digest,
    local_path,
    replace_folder,
    sha256sums,
    sync,
    write_file,
)
from difftrain_utils.keyed_random import STREAM_VERSION
from difftrain_utils.media.media import media_of
from difftrain_utils.optimization.averages import AVERAGES, build_averages
from difftrain_utils.optimization.sharding import is_sharded, like_share
from difftrain_utils.optimization.trained import saved_state, trained_parameters
from difftrain_utils.processes import gather_on_main, on_main_process
from difftrain_utils.run.lock import lock_folder
from difftrain_utils.run.manifest import Record
from difftrain_utils.run.run_folder import (
    CONFIG_FILE,
    LORA,
    MANIFEST_FILE,
    METRICS_FILE,
    OPTIMIZER_FILE,
    PIPELINE,
    STATE_FILE,
    WRITTEN,
    artefacts,
    checkpoint_damage,
    checkpoint_name,
    holds_run,
    is_checkpoint_of,
    list_checkpoints,
    read_manifest,
    step_of,
)
from difftrain_utils.run.saved_tensors import (
    INDEX_FILE,
    OPTIMIZER,
    Index,
    Parts,
    SavedTensors,
    files_to_write,
    merge_indices,
)
from difftrain_utils.trees import from_json, to_json

DAMAGED = ".damaged"
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)  # RuntimeError is torch.save's

# What may change when a run goes on in its folder: it says where, how long and how often, not what is trained. Whether
# another folder holds the same data or the same base model, their digests say.
FREE_FIELDS = {
    *("model.pretrained_model_name_or_path", "model.revision", "model.variant", "model.lora.merge"),
    "model.offload_text_encoders",
    *("data.dataset", "data.validation_dataset", "data.num_workers", "data.cache_dir", "data.epochs"),
    "data.stream_cache_gb",
    *("data.cache_latents", "data.cache_text"),
    *(f"train.{name}" for name in ("output_dir", "resume_from", "overwrite", "max_steps", "max_hours")),
    *(f"train.{name}" for name in ("log_every", "eval_every", "save_every", "save_minutes", "keep_checkpoints")),
    *("train.save_weights_every", "train.save_in_background", "train.init_minutes", "train.step_minutes"),
    *("train.shard", "train.shard_size", "train.reshard_after_forward", "train.shard_offload", "train.shard_encoders"),
    *("train.report_to", "train.project", "train.run_name"),
    *(f"train.{name}" for name in ("cpu_threads", "num_processes", "gradient_accumulation_steps", "precision")),
    *(
        f"train.{name}"
        for name in ("compile", "channels_last", "plain_attention", "profile", "peak_tflops", "record_diff")
    ),
    *("model.vae_slicing", "ema.on_cpu"),
    *("train.gradient_checkpointing", "train.on_nonfinite", "train.max_skipped_steps", "ema.snapshot_every"),
}


def _failure(error: Exception) -> str:
    """What stopped a write, on one line. A worker's death, which torch may raise just then, is no such thing."""
    if is_death_of_worker(error):
        raise error
    return one_line(error)


class Checkpoint:
    """`output_dir/checkpoint-{step}` that is being written: by a thread in each process, with all that processes do
    together when it is made and in `finish`, which all processes call.

    `documents` are its files of text, by name; `parts` are the tensors of each part of the run, which with
    `in_background` are copied, so that training may go on."""

    def __init__(
        self,
        accelerator: Accelerator,
        output_dir: Path,
        step: int,
        documents: dict[str, str],
        parts: Parts,
        in_background: bool = False,
    ):
        self.accelerator, self.output_dir = accelerator, output_dir
        self.folder = output_dir / checkpoint_name(step)
        self.partial = self.folder.with_name(self.folder.name + PARTIAL)
        self.failure: str | None = None
        self.digests: dict[str, str] = {}
        if accelerator.is_main_process:
            for left_over in output_dir.glob(f"checkpoint-*{PARTIAL}"):
                shutil.rmtree(left_over, ignore_errors=True)
        accelerator.wait_for_everyone()
        try:
            accelerator.save_state(str(self.partial))
        except WRITE_ERRORS as error:
            self.failure = _failure(error)
        files, self.index = {}, None
        try:
            files, self.index = files_to_write(accelerator, parts, copy=in_background)
        except (*WRITE_ERRORS, MemoryError) as error:
            self.failure = self.failure or f"{type(error).__name__}: {_failure(error)}"
        self.thread = threading.Thread(
            target=self._write, args=(files, documents if accelerator.is_main_process else {})
        )
        self.thread.start()

    def _write(self, files: dict[str, dict[str, torch.Tensor]], documents: dict[str, str]) -> None:
        """This process's own files, onto the disk, and their digests."""
        try:
            for name, content in documents.items():
                (self.partial / name).write_text(content, encoding="utf-8")
            for name, tensors in files.items():
                save_file(tensors, self.partial / name)
            with ThreadPoolExecutor(1) as pool:  # the disk writes while the digests are taken
                synced = pool.submit(lambda: [sync(self.partial / name) for name in files])
                self.digests = {name: file_digest(self.partial / name) for name in files}
                synced.result()
        except Exception as error:  # whatever it is, this is no checkpoint
            self.failure = self.failure or shorten(one_line(error), 300)

    def finish(self, keep: int, required: bool) -> None:
        """Wait until all of it is on the disk, and give it its name; then delete all but the `keep` newest checkpoints
        (0: none). A failed write leaves the older ones as they are. The run goes on with a warning, because the next
        save may do.

        Raises:
            RunError: a write failed, and the checkpoint is `required`: there will be no next one.
        """
        self.thread.join()
        accelerator, folder = self.accelerator, self.folder
        written = gather_on_main(accelerator, (self.failure, self.digests, self.index))  # the barrier, too
        failures = [failure for failure, _, _ in written if failure is not None]
        if accelerator.is_main_process and not failures:
            try:
                digests = {name: digest for _, of_process, _ in written for name, digest in of_process.items()}
                self._commit(digests, [index for _, _, index in written])
            except (*WRITE_ERRORS, ValueError) as error:
                failures = [_failure(error)]
        failures = broadcast_object_list([failures])[0]
        if failures:
            if accelerator.is_main_process:
                shutil.rmtree(self.partial, ignore_errors=True)
            newest = list_checkpoints(self.output_dir)
            there = f"the newest checkpoint is {newest[-1][1].name}" if newest else "there is no checkpoint yet"
            if required:
                raise RunError(f"cannot save {folder}: {failures[0]}; {there}")
            warn(f"cannot save {folder}: {failures[0]}; training goes on, {there}")
        elif keep and accelerator.is_main_process:
            for _, old in list_checkpoints(self.output_dir)[:-keep]:
                leaving = old.rename(old.with_name(old.name + PARTIAL))  # never half a checkpoint by its name
                shutil.rmtree(leaving, ignore_errors=True)

    def _commit(self, digests: dict[str, str], indices: list[Index | None]) -> None:
        """Raises OSError if a process has written into another folder than this."""
        for name in digests:
            (self.partial / name).stat()
        for random_state in self.partial.glob("random_states_*.pkl"):
            random_state.unlink()
        if self.index is not None:
            index = merge_indices(indices)
            (self.partial / INDEX_FILE).write_text(json.dumps(index) + "\n", encoding="utf-8")
        (self.partial / DIGESTS_FILE).write_text(sha256sums(self.partial, digests), encoding="utf-8")
        replace_folder(self.partial, self.folder)


def load_checkpoint(accelerator: Accelerator, folder: Path, parts: Parts) -> None:
    """Bring everything that was prepared, and the tensors of the `parts` of the run, back to where `folder` left them.

    Raises:
        OSError, RuntimeError, ValueError, LookupError: it is no checkpoint of these models and averages.
    """
    accelerator.load_state(str(folder))
    with SavedTensors(folder) as saved:
        for name, tensors in parts.items():
            saved.load(name, tensors)


def load_optimizer(optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Bring an optimizer back to where `folder` left it: each process with its share of the state, as of the weights.

    Raises:
        OSError, RuntimeError, ValueError, LookupError, TypeError: it is no checkpoint of this optimizer.
    """
    before = folder / "optimizer.bin"  # as a checkpoint had it before
    if before.is_file():
        tensors: dict[str, torch.Tensor] = {}
        tree = to_json(torch.load(before, "cpu", weights_only=True), tensors)
    else:
        tree = json.loads((folder / OPTIMIZER_FILE).read_text(encoding="utf-8"))
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    with SavedTensors(folder) as saved:

        def tensor_of(name: str) -> torch.Tensor:
            kind, number, *_ = name.split(".")
            like = parameters[int(number)] if kind == "state" else torch.empty(0)
            return like_share(tensors[name], like) if before.is_file() else saved.read_like(OPTIMIZER, name, like)

        optimizer.load_state_dict(from_json(tree, tensor_of))


def read_state(folder: Path) -> dict[str, Any]:
    """The content of training_state.json. Raises InputError if it is none, or of another step than its folder."""
    with blame(f"train.resume_from: {folder / STATE_FILE}", OSError, ValueError, KeyError, TypeError):
        state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        step = state["global_step"]
        if type(step) is not int or step < 0 or step_of(folder.name) not in (step, None):
            raise ValueError(f"global_step is {step!r}")
    return state


def find_checkpoint(config: Config) -> Path | None:
    """The checkpoint that `train.resume_from` names, verified; None to start from the beginning.

    `latest` is the newest intact one of `train.output_dir`, with a warning about newer ones that are damaged.

    Raises:
        InputError: the checkpoint is damaged, or of a run with other settings, or `train.output_dir` holds a run that
            would be mixed with this one.
    """
    resume_from, output_dir = config.train.resume_from, Path(config.train.output_dir)
    checkpoints = list_checkpoints(output_dir)
    if config.train.overwrite:
        return None
    if not checkpoints:
        _refuse_to_replace(output_dir, resume_from)
        if resume_from in (None, "latest"):
            return None
    if resume_from is None:
        raise InputError(
            f"train.output_dir: {output_dir} already holds a run ({checkpoints[-1][1].name}); go on with "
            "--resume-from latest, replace it with --train.overwrite, or give another --output-dir"
        )
    if resume_from == "latest":
        folder = _newest_intact(output_dir)
    else:
        folder = local_path(resume_from)
        if not os.path.isfile(folder / STATE_FILE):
            there = ", ".join(path.name for _, path in checkpoints) or "no checkpoint"
            raise InputError(f"train.resume_from: no checkpoint at {folder}; {output_dir} has {there}")
        if damage := checkpoint_damage(folder):
            raise InputError(f"train.resume_from: {folder} is damaged: {damage}")
        if checkpoints and checkpoints[-1][1].resolve() != folder.resolve():
            raise InputError(
                f"train.resume_from: {folder} is not the newest checkpoint of {output_dir}, which is "
                f"{checkpoints[-1][1].name}: a folder holds one history; give another --output-dir"
            )
    _check_settings(folder, config)
    if not is_finished(config, folder):
        _check_stream(folder)
    return folder


def _refuse_to_replace(output_dir: Path, resume_from: str | None) -> None:
    """Refuse a folder that holds a run without a checkpoint; but a resume may begin one anew that was stopped before
    its first."""
    found = artefacts(output_dir)
    try:
        was_stopped = not {PIPELINE, LORA} & set(found) and "final" not in read_manifest(output_dir)
    except (OSError, ValueError):
        was_stopped = False
    if holds_run(output_dir) and not (was_stopped and resume_from):
        hint = "begin again with --resume-from latest, " if was_stopped else ""
        raise InputError(
            f"train.output_dir: {output_dir} already holds a run without checkpoints ({', '.join(found)}); {hint}"
            "replace it with --train.overwrite, or give another --output-dir"
        )


def _newest_intact(output_dir: Path) -> Path:
    damages = []
    for _, folder in reversed(list_checkpoints(output_dir)):
        damage = checkpoint_damage(folder)
        if damage is None:
            for text in damages:
                warn(f"{text}; going on from {folder.name}")
            return folder
        damages.append(f"{folder} is damaged: {damage}")
    raise InputError(f"train.resume_from: no intact checkpoint: {'; '.join(damages)}; --train.overwrite starts afresh")


def _check_settings(folder: Path, config: Config) -> None:
    """Refuse to go on in the same folder with other settings; into another folder a run may branch off with them."""
    with blame(f"train.resume_from: {folder / CONFIG_FILE}", OSError, ValueError, yaml.YAMLError):
        saved = yaml.safe_load((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        if not isinstance(saved, dict) or not all(isinstance(fields, dict) for fields in saved.values()):
            raise ValueError("not the config of a run")
        rename_fields(saved)
    differences = {}
    for section, fields in dataclasses.asdict(config).items():
        for name, value in fields.items():
            was = saved.get(section, {}).get(name, value)
            if dataclasses.is_dataclass(getattr(getattr(config, section), name)) and isinstance(was, dict):
                was = value | {key: old for key, old in was.items() if f"{section}.{name}.{key}" not in FREE_FIELDS}
            if name == "sources" and was and value and _without_places(was, config) == _without_places(value, config):
                continue
            if was != value and section != "evaluation" and f"{section}.{name}" not in FREE_FIELDS:
                differences[f"{section}.{name}"] = f"{section}.{name} was {was!r} and is {value!r}"
    _refuse_past(folder, config)
    is_branch = not is_checkpoint_of(folder, Path(config.train.output_dir))
    fatal = [text for name, text in differences.items() if not is_branch or name == "optimizer.class_path"]
    if fatal:
        hint = "" if is_branch else "; to branch off with other settings give another --output-dir"
        raise InputError(f"train.resume_from: {folder} is of another run: {', '.join(fatal)}{hint}")
    if differences:
        warn(f"branching off from {folder} with other settings: {', '.join(differences.values())}")


def _refuse_past(folder: Path, config: Config) -> None:
    """Refuse a checkpoint of a later step than the last one, where that is known already."""
    last = config.train.max_steps
    if last is not None and read_state(folder)["global_step"] > last:
        raise InputError(f"train.resume_from: {folder} is past train.max_steps, which is {last}")


def _check_stream(folder: Path) -> None:
    """Refuse a checkpoint of a run whose samples were drawn otherwise than they would be from here on."""
    with blame(f"train.resume_from: {folder / MANIFEST_FILE}", OSError, ValueError):
        version = read_manifest(folder).get("stream", 1)
    if version != STREAM_VERSION:
        raise InputError(
            f"train.resume_from: {folder} has samples of stream {version}, and this version of difftrain draws stream "
            f"{STREAM_VERSION} (other random numbers, and captions encoded on their own); go on with the version that "
            "the checkpoint is of, or start a new run from its weights"
        )
    if read_state(folder).get("place") is not None:
        raise InputError(
            f"train.resume_from: {folder} is of data.streaming as it was before there were data.lanes, with other "
            "samples; go on with the version that the checkpoint is of, or start a new run from its weights"
        )


def _without_places(sources: list[dict[str, Any]], config: Config) -> list[dict[str, Any]]:
    """`data.sources`, also of a config that has not all fields yet, but for where they lie, which may change as
    `data.dataset` may."""
    defaults = {field.name: field.default for field in dataclasses.fields(config.data.SOURCE)}
    return [defaults | source | {"dataset": None} for source in sources]


def check_weights(folder: Path, models: Mapping[str, torch.nn.Module], config: EmaConfig) -> None:
    """Refuse a checkpoint of other models, or without the averages that the run keeps.

    Raises:
        InputError: names the first model or average that is not there, is too many or has other weights.
    """
    with torch.device("meta"):
        trained = trained_parameters(models["denoiser"], models.get("text_encoders"))
        likes = [torch.empty(parameter.shape, dtype=parameter.dtype) for parameter in trained]
    averages = build_averages(dataclasses.replace(config, on_cpu=False), likes)
    expected = {name: saved_state(model) for name, model in models.items()}
    expected |= {name: average.state_tensors() for name, average in averages.items()}
    with blame(f"train.resume_from: {folder}", *LOAD_ERRORS), SavedTensors(folder) as saved:
        there = {name: saved.shapes(name) for name in saved.parts.keys() - {OPTIMIZER}}
    for name in sorted(expected.keys() | (there.keys() - AVERAGES)):
        if name not in there or name not in expected:
            state = "it has no" if name in expected else "this run has no"
            raise InputError(f"train.resume_from: {folder} is of other models or averages: {state} {name!r}")
        shapes, wanted = there[name], {key: tuple(tensor.shape) for key, tensor in expected[name].items()}
        if shapes != wanted:
            key = min(key for key in shapes.keys() | wanted.keys() if shapes.get(key) != wanted.get(key))
            was, now = shapes.get(key, "not there"), wanted.get(key, "not there")
            raise InputError(f"train.resume_from: {folder} has another {name}: {key} is {was}, and here {now}")


def check_origin(folder: Path, record: Record, config: Config) -> None:
    """Refuse to go on in the same folder with another base model, other data or another precision; to a run that
    branches off it is a warning.

    Raises:
        InputError: names what differs.
    """
    is_branch, differences = not is_checkpoint_of(folder, Path(config.train.output_dir)), []
    with blame(f"train.resume_from: {folder / MANIFEST_FILE}", OSError, ValueError):
        saved, now = read_manifest(folder), record.manifest
    media = media_of(config.data)
    rows = f"the training {media.NOUN}{' or captions' if media.HAS_CAPTIONS else ''}"
    for what, was, value in (
        (
            "model.pretrained_model_name_or_path: the weights",
            saved["base_model"]["sha256"],
            now["base_model"]["sha256"],
        ),
        (f"data.dataset: {rows}", saved["data"].get("train"), now["data"].get("train")),
    ):
        differing = sorted(key for key in was if was[key] != value.get(key) and key != "dataset")
        if differing and was.get("streaming") == value.get("streaming"):  # a stream's digest is of its files
            names = ", ".join(differing)
            differences.append(f"{what} are not those that {folder} was trained from ({names} differ)")
    if saved["mixed_precision"] != now["mixed_precision"]:
        precisions = f"{saved['mixed_precision']}, not {now['mixed_precision']}"
        differences.append(f"train.precision: {folder} was trained with {precisions}")
    if differences and not is_branch:
        raise InputError(differences[0])
    for difference in differences:
        warn(f"branching off: {difference}")


def is_finished(config: Config, checkpoint: Path | None) -> bool:
    """Whether `checkpoint` is the end of a run that has left all that it should."""
    output_dir = Path(config.train.output_dir)
    if checkpoint is None or not is_checkpoint_of(checkpoint, output_dir):
        return False
    try:
        manifest = read_manifest(output_dir)
    except (OSError, ValueError):  # the end of the run is made again
        return False
    final = manifest.get("final", {})
    left = PIPELINE if config.model.lora is None or config.model.lora.merge else LORA  # merging may be asked for later
    last, samples_per_epoch = config.train.max_steps, manifest.get("samples_per_epoch")
    if last is None and samples_per_epoch is not None:
        last = config.train.steps_of(config.data.epochs, samples_per_epoch)
    is_last = read_state(checkpoint)["global_step"] == final.get("global_step") == last
    return is_last and (output_dir / left).is_dir()


def count_epochs(config: Config, samples_per_epoch: int, checkpoint: Path | None) -> None:
    """Say `data.epochs`, where they are given, as `train.max_steps`: from here on it is as if that had been given, for
    the learning rate as for the record of the run.

    Raises:
        InputError: that are too many steps, or fewer than the checkpoint has made.
    """
    if config.data.epochs is not None:
        config.train.max_steps = config.train.steps_of(config.data.epochs, samples_per_epoch)
        config.data.epochs = None
        config.check()
        if checkpoint is not None:
            _refuse_past(checkpoint, config)


def begin_run(
    accelerator: Accelerator, record: Record, step: int, checkpoint: Path | None, config: TrainConfig
) -> None:
    """Make the run's folder ready: no other run in it, nothing of a run that it replaces, nor anything that comes after
    `step`; and the record of this start, at `step` of `checkpoint`.

    Raises:
        InputError: another run is in the folder, or has been since this one has looked.
        RunError: the record cannot be written.
    """
    output_dir = Path(config.output_dir)

    def make_ready() -> None:
        lock_folder(output_dir)
        if config.overwrite:
            delete_run(output_dir)
        set_damaged_aside(output_dir, step)
        record.begin(output_dir, step, checkpoint)

    if is_sharded(config, accelerator.num_processes):
        _check_is_shared(accelerator, output_dir)
    on_main_process(accelerator, make_ready)


def _check_is_shared(accelerator: Accelerator, folder: Path) -> None:
    """Raise InputError unless what the main process writes into the nearest folder that there is, the others see."""
    folder = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())

    def leave_a_sign() -> str:
        sign = f".{uuid.uuid4().hex}"
        write_file(folder / sign, "")
        return sign

    sign = on_main_process(accelerator, leave_a_sign)
    is_there = gather_object([(folder / sign).is_file()])
    if accelerator.is_main_process:
        (folder / sign).unlink()
    if not all(is_there):
        raise InputError(
            f"train.output_dir: with train.shard, all processes write into it, and what process 0 writes into {folder} "
            f"process {is_there.index(False)} does not see: it must be a folder that all machines share"
        )


def set_damaged_aside(output_dir: Path, last_step: int) -> None:
    """Rename the checkpoints after `last_step`, which are damaged, so that the run can write them again.

    Raises:
        InputError: one is not, so that another run has written it meanwhile.
    """
    for step, path in list_checkpoints(output_dir):
        if step > last_step:
            if checkpoint_damage(path) is None:
                raise InputError(f"train.output_dir: another run has written {path} meanwhile; start again")
            aside = path.with_name(path.name + DAMAGED)
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)


def delete_run(output_dir: Path) -> None:
    """Delete what a run leaves in its folder, checkpoints first, and nothing else; what else is there is named."""
    for path in output_dir.glob("checkpoint-*"):
        if step_of(path.name.removesuffix(PARTIAL).removesuffix(DAMAGED)) is not None:
            path.unlink() if path.is_symlink() else shutil.rmtree(path, ignore_errors=True)
    left = []
    for name, patterns in WRITTEN.items():
        folder = output_dir / name
        found = {path for pattern in patterns for path in folder.glob(pattern)}
        for path in [path for path in found if path.is_symlink() or not path.is_dir()]:
            path.unlink()
        left += [path for path in folder.rglob("*") if not path.is_dir()]
        for path in sorted([folder, *folder.rglob("*")], reverse=True):  # what is within a folder before it
            if path.is_dir() and not path.is_symlink() and not any(path.iterdir()):
                path.rmdir()
    (output_dir / METRICS_FILE).unlink(missing_ok=True)
    if left:
        names = some([str(path.relative_to(output_dir)) for path in left])
        warn(f"train.overwrite: {names} in {output_dir} are of no run, and stay")
