import io
import json

import numpy as np
import pytest
import soundfile
import tomllib
from accelerate import Accelerator
from helpers import ROOT, metrics_without_times
from PIL import Image

from difftrain_utils.config.data import DataConfig
from difftrain_utils.config.model import ModelConfig
from difftrain_utils.config.text_to_image import TextToImageConfig
from difftrain_utils.config.training import TrainConfig
from difftrain_utils.errors import EXTRAS, InputError, not_installed
from difftrain_utils.media import audio, video
from difftrain_utils.run.checkpoints import delete_run
from difftrain_utils.run.metrics import read_metrics
from difftrain_utils.run.run_folder import SAMPLES, step_file
from difftrain_utils.run.tracking import Metrics, check_trackers, log_samples


def start(output_dir, global_step: int) -> Metrics:
    config = TextToImageConfig(ModelConfig("model"), DataConfig("data"), TrainConfig(output_dir=str(output_dir)))
    return Metrics(Accelerator(), config, global_step)


def test_each_logged_step_is_a_line(tmp_path):
    metrics = start(tmp_path, 0)
    metrics.log(1, {"loss": 0.5, "lr": 1e-4})
    metrics.log(2, {"loss": 0.25})
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {"step": 1, "loss": 0.5, "lr": 1e-4},
        {"step": 2, "loss": 0.25},
    ]


def test_a_resumed_run_cuts_back_to_its_checkpoint(tmp_path):
    lines = [json.dumps({"step": step, "loss": 1 / step}) for step in range(1, 6)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 6, "lo')  # cut off in mid-line
    start(tmp_path, 3).log(4, {"loss": 0.125})
    assert [entry["step"] for entry in metrics_without_times(tmp_path)] == [1, 2, 3, 4]
    assert read_metrics(tmp_path / "metrics.jsonl")[:3] == [json.loads(line) for line in lines[:3]]


def test_a_damaged_file_is_not_cut_back(tmp_path):
    damaged = '{"step": 1}\n{"st\n{"step": 3}\n'
    (tmp_path / "metrics.jsonl").write_text(damaged)
    with pytest.raises(InputError, match=r"/metrics\.jsonl line 2: not JSON: Unterminated string"):
        start(tmp_path, 2)
    assert (tmp_path / "metrics.jsonl").read_text() == damaged


def test_trackers_are_refused_rather_than_dropped():
    assert check_trackers(None) == []
    assert check_trackers("tensorboard") == check_trackers(["tensorboard"]) == ["tensorboard"]
    with pytest.raises(InputError, match=r"train.report_to: no tracker 'tensorbord'; there is .*tensorboard"):
        check_trackers("tensorbord")
    with pytest.raises(InputError, match=r"train.report_to: aim is not installed \(pip install aim\)"):
        check_trackers(["tensorboard", "aim"])


def test_a_package_of_an_extra_is_named_with_it():
    assert not_installed("aim") == "aim is not installed (pip install aim)"
    assert not_installed("scipy") == "scipy is not installed (pip install -c constraints.txt -e '.[pairing]')"
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for package, extra in EXTRAS.items():
        assert [needed for needed in extras[extra] if needed.startswith(f"{package}>")], package


# ── Each tracker really run, where it is installed ───────────────────────────────────────────────────────────
def track(tracker: str, output_dir, global_step: int = 0, **train) -> None:
    """Two lines of metrics, two pictures, two clips and two sounds, as runs log them."""
    train = TrainConfig(output_dir=str(output_dir), report_to=tracker, **train)
    config = TextToImageConfig(ModelConfig("model"), DataConfig("data"), train)
    output_dir.mkdir(exist_ok=True)
    accelerator = Accelerator(log_with=tracker, project_dir=output_dir / "logs")
    metrics = Metrics(accelerator, config, global_step)
    for step in (global_step + 1, global_step + 2):
        pictures = [Image.new("RGB", (40, 24), color) for color in ("red", "blue")]
        log_samples(accelerator, step, "samples", pictures, ["red", "blue"], output_dir / "none")
        clips, path = [video.Clip(pictures, 8)], step_file(output_dir, SAMPLES, step, ".mp4")
        video.save(clips, ["a label"], path)
        log_samples(accelerator, step, "clips", clips, ["a label"], path)
        tones = [audio.Sound(np.full((2, 800), level, np.float32), 8000) for level in (0.25, 0.5)]
        audio.save(tones, ["low", "high"], path := step_file(output_dir, SAMPLES, step + 100, ".png"))
        log_samples(accelerator, step, "sounds", tones, ["low", "high"], path)
        metrics.log(step, {"loss": 1 / step, "validation_loss_bins": [0.25, 0.75]})
    assert [one.name for one in accelerator.trackers] == [tracker]  # not dropped for an error
    metrics.close()


def test_tensorboard_shows_all(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    track("tensorboard", tmp_path, project="a project")
    events = EventAccumulator(str(tmp_path / "logs/a project")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1.0), (2, 0.5)]
    assert events.Scalars("validation_loss_bins/2")[0].value == 0.75
    assert [event.step for event in events.Images("samples")] == [1, 2]
    moving = events.Images("clips")[1]
    with Image.open(io.BytesIO(moving.encoded_image_string)) as picture:
        assert (picture.format, picture.n_frames, picture.info["duration"]) == ("GIF", 2, 120)
        assert picture.size == (moving.width, moving.height)
    first, second = events.Audio("sounds/2")
    assert (first.step, second.step, second.sample_rate, second.length_frames) == (1, 2, 8000, 800)
    samples, rate = soundfile.read(io.BytesIO(second.encoded_audio_string))
    assert samples.shape == (800, 2) and rate == 8000 and samples.max() == 0.5
    assert events.SummaryMetadata("sounds/2").summary_description == "high"
    assert [event.step for event in events.Images("sounds/spectrograms")] == [1, 2]


def test_wandb_writes_into_the_runs_folder_and_is_deleted_with_it(tmp_path, monkeypatch, capsys):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    track("wandb", tmp_path, project="a project", run_name="a run")
    wandb.teardown()  # its own process writes, and is waited for
    (folder,) = tmp_path.glob("logs/wandb/offline-run-*")
    written = next(folder.glob("run-*.wandb")).read_bytes()
    for text in (b"a project", b"a run", b"validation_loss_bins/2"):
        assert text in written
    assert len(list(folder.glob("files/media/images/samples_*.png"))) == 4
    assert len(list(folder.glob("files/media/videos/clips_*.mp4"))) == 2
    assert len(list(folder.glob("files/media/audio/sounds_*.wav"))) == 4
    delete_run(tmp_path)
    assert list(tmp_path.iterdir()) == [] and "stay" not in capsys.readouterr().err


def test_trackio_goes_on_in_its_run(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # which is read when it is imported
    trackio = pytest.importorskip("trackio")
    track("trackio", tmp_path / "quick", project="a-project")
    track("trackio", tmp_path / "quick", project="a-project", global_step=2)
    (run,) = trackio.Api().runs("a-project")
    assert run.name == "quick"  # as its folder
    logs = trackio.sqlite_storage.SQLiteStorage.get_logs("a-project", "quick")
    assert [line["loss"] for line in logs if "loss" in line] == [1, 0.5, 1 / 3, 0.25]
    assert sum("samples/2" in line for line in logs) == sum("clips" in line for line in logs) == 4
    assert sum("sounds/2" in line for line in logs) == 4


def test_mlflow_shows_all(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)  # where artefacts go
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    track("mlflow", tmp_path / "quick", project="a project", run_name="a run")
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("a project").experiment_id])
    assert (run.info.run_name, run.info.status) == ("a run", "FINISHED")
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [(point.step, point.value) for point in history] == [(1, 1.0), (2, 0.5)]
    assert run.data.metrics["validation_loss_bins/2"] == 0.75
    assert len([f for f in client.list_artifacts(run.info.run_id, "images") if f.path.endswith(".png")]) == 6
    assert [f.path for f in client.list_artifacts(run.info.run_id, "clips")] == [
        f"clips/step-00000{i}.mp4" for i in (1, 2)
    ]
    assert len(client.list_artifacts(run.info.run_id, "sounds")) == 4
