"""metrics.jsonl, and accelerate's trackers beside it."""

import dataclasses
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, get_available_trackers
from accelerate.utils import LoggerType
from PIL import Image, ImageSequence

from difftrain_utils.config.config import Config
from difftrain_utils.errors import InputError, not_installed, one_line, warn, writing
from difftrain_utils.files import write_file
from difftrain_utils.media.audio import Sound
from difftrain_utils.media.video import Clip
from difftrain_utils.run.metrics import read_metrics
from difftrain_utils.run.run_folder import METRICS_FILE, TRACKERS, sound_files

LARGEST_GIF = 640  # pixels of its longer side: it takes much room


def check_trackers(report_to: str | list[str] | None) -> list[str]:
    """The trackers as a list. Accelerate would drop one that is not installed without a word: refuse it.

    Raises:
        InputError: a tracker is unknown or not installed.
    """
    names = [report_to] if isinstance(report_to, str) else report_to or []
    known = [tracker.value for tracker in LoggerType if tracker != LoggerType.ALL]
    available = [str(getattr(tracker, "value", tracker)) for tracker in get_available_trackers()]
    for name in names:
        if name not in known:
            raise InputError(f"train.report_to: no tracker {name!r}; there is {', '.join(known)}")
        if name not in available:
            raise InputError(f"train.report_to: {not_installed(name)}")
    return names


class Metrics:
    """Writes `metrics.jsonl` (one JSON object a logged step) and passes the values on to the trackers.

    A resumed run cuts the file back to the step that it goes on from, so that it ends like an unbroken one.

    Raises:
        InputError: the file to cut back is damaged, other than by a last line that was cut off.
    """

    def __init__(self, accelerator: Accelerator, config: Config, global_step: int):
        self.accelerator = accelerator
        self.path = Path(config.train.output_dir) / METRICS_FILE
        if accelerator.is_main_process:
            _cut_back(self.path, global_step)
        if accelerator.log_with:
            sections = dataclasses.asdict(config).items()
            flat = {f"{s}.{name}": _primitive(value) for s, fields in sections for name, value in fields.items()}
            folder = Path(config.train.output_dir) / TRACKERS
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)  # wandb takes another where it is not there
                options = _options(folder, config.train.run_name or folder.resolve().parent.name, global_step)
                accelerator.init_trackers(config.train.project, flat, init_kwargs=options)

    def log(self, step: int, values: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            with writing(self.path), self.path.open("a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
                file.flush()
                os.fsync(file.fileno())
        scalars = {name: value for name, value in values.items() if not isinstance(value, list)}
        for name in values.keys() - scalars:  # by noise level
            scalars |= {f"{name}/{i}": value for i, value in enumerate(values[name], 1)}
        _each_tracker(self.accelerator, lambda tracker: tracker.log(scalars, step=step))

    def close(self) -> None:
        """Let the trackers write what they still hold."""
        _each_tracker(self.accelerator, lambda tracker: tracker.finish())
        self.accelerator.trackers.clear()


def log_samples(
    accelerator: Accelerator,
    step: int,
    name: str,
    made: list[Image.Image] | list[Clip] | list[Sound],
    labels: list[str],
    path: Path,
) -> None:
    """Show images of one size, or the files of clips or sounds that `save` of their medium has written at `path`, in
    the trackers that show them. To be called by the main process alone."""
    if isinstance(made[0], Clip):
        log_clips(accelerator, step, name, path)
    elif isinstance(made[0], Sound):
        log_sounds(accelerator, step, name, labels, path)
    else:
        log_images(accelerator, step, name, made)


def log_images(accelerator: Accelerator, step: int, name: str, images: list[Image.Image]) -> None:
    """Show images of one size in the trackers that show images. To be called by the main process alone."""

    def show(tracker: GeneralTracker) -> None:
        if tracker.name == "tensorboard":
            pixels = np.stack([np.asarray(image) for image in images])
            tracker.log_images({name: pixels}, step=step, dataformats="NHWC")
        elif tracker.name == "wandb":
            tracker.log_images({name: images}, step=step)
        elif tracker.name == "trackio":
            import trackio

            tracker.log({f"{name}/{i}": trackio.Image(image) for i, image in enumerate(images, 1)}, step=step)
        elif tracker.name == "mlflow":
            import mlflow

            for i, image in enumerate(images, 1):
                mlflow.log_image(image, key=f"{name}-{i}", step=step)

    _each_tracker(accelerator, show)


def log_clips(accelerator: Accelerator, step: int, name: str, path: Path) -> None:
    """Show the grid of clips that lies at `path` with the endings .webp and, perhaps, .mp4, in the trackers that show
    videos. Of a file none of them asks for moviepy."""
    video, picture = path.with_suffix(".mp4"), path.with_suffix(".webp")

    def show(tracker: GeneralTracker) -> None:
        if tracker.name == "tensorboard":  # it has no videos, and pictures that move as GIF alone
            from tensorboard.compat.proto.summary_pb2 import Summary

            content, (width, height) = as_gif(picture)
            image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=content)
            tracker.writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=name, image=image)]), step)
        elif not video.exists():
            return
        elif tracker.name == "wandb":
            import wandb

            tracker.log({name: wandb.Video(str(video), format="mp4")}, step=step)
        elif tracker.name == "trackio":
            import trackio

            tracker.log({name: trackio.Video(video)}, step=step)
        elif tracker.name == "mlflow":
            tracker.log_artifact(str(video), artifact_path=name)

    _each_tracker(accelerator, show)


def log_sounds(accelerator: Accelerator, step: int, name: str, labels: list[str], path: Path) -> None:
    """Show sounds, and the grid of their spectrograms, that lie at `path` with the endings -00.wav and so on, and .png,
    in the trackers that play sounds. Of a file none of them asks for another library."""
    import soundfile  # an extra

    files = sound_files(path)[: len(labels)]  # there may be more, of a run with more prompts that was resumed
    with Image.open(path.with_suffix(".png")) as picture:
        log_images(accelerator, step, f"{name}/spectrograms", [picture.convert("RGB")])

    def show(tracker: GeneralTracker) -> None:
        if tracker.name == "tensorboard":  # its own function takes one channel
            from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata

            for i, (file, label) in enumerate(zip(files, labels, strict=True), 1):
                about = soundfile.info(file)
                audio = Summary.Audio(
                    sample_rate=about.samplerate,
                    num_channels=about.channels,
                    length_frames=about.frames,
                    encoded_audio_string=file.read_bytes(),
                    content_type="audio/wav",
                )
                value = Summary.Value(
                    tag=f"{name}/{i}", audio=audio, metadata=SummaryMetadata(summary_description=label)
                )
                tracker.writer.file_writer.add_summary(Summary(value=[value]), step)
        elif tracker.name == "wandb":
            import wandb

            sounds = [wandb.Audio(str(file), caption=label) for file, label in zip(files, labels, strict=True)]
            tracker.log({name: sounds}, step=step)
        elif tracker.name == "trackio":
            import trackio

            sounds = [trackio.Audio(file, caption=label) for file, label in zip(files, labels, strict=True)]
            tracker.log({f"{name}/{i}": sound for i, sound in enumerate(sounds, 1)}, step=step)
        elif tracker.name == "mlflow":
            for file in files:
                tracker.log_artifact(str(file), artifact_path=name)

    _each_tracker(accelerator, show)


def as_gif(path: Path) -> tuple[bytes, tuple[int, int]]:
    """A picture that moves as GIF, of 256 colours and at most `LARGEST_GIF` pixels wide and high, and its width and
    height."""
    with Image.open(path) as picture:
        frames = ImageSequence.all_frames(picture)
    for frame in frames:
        frame.thumbnail((LARGEST_GIF, LARGEST_GIF))
    buffer, durations = io.BytesIO(), [frame.info["duration"] for frame in frames]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0)
    return buffer.getvalue(), frames[0].size


def _options(folder: Path, run_name: str, global_step: int) -> dict[str, dict[str, Any]]:
    """What each tracker is to be begun with, in its own words, for a run that goes on from `global_step`."""
    return {
        # of what the run that was cut off logged after this step, TensorBoard shows nothing
        "tensorboard": {"purge_step": global_step + 1} if global_step else {},
        "wandb": {"name": run_name, "dir": str(folder)},
        "trackio": {"name": run_name, "resume": "allow" if global_step else "never"},
        "mlflow": {"run_name": run_name},
    }


def _each_tracker(accelerator: Accelerator, act: Callable[[GeneralTracker], None]) -> None:
    """Do without a tracker that fails, as of a full disk or a network that is gone."""
    for tracker in list(accelerator.trackers):
        try:
            act(tracker)
        except Exception as error:  # of any library
            accelerator.trackers.remove(tracker)
            warn(f"train.report_to: {tracker.name}: {one_line(error)}; training goes on without it, see {METRICS_FILE}")


def _cut_back(path: Path, global_step: int) -> None:
    if path.exists():
        kept = [entry for entry in read_metrics(path) if entry["step"] <= global_step]
        write_file(path, "".join(json.dumps(entry) + "\n" for entry in kept))


def _primitive(value: Any) -> bool | int | float | str:
    return value if isinstance(value, bool | int | float | str) else json.dumps(value)
