import json

import pytest
from accelerate import Accelerator
from helpers import ROOT, metrics_without_times

from difftrain_utils.config.data import DataConfig
from difftrain_utils.config.model import ModelConfig
from difftrain_utils.config.text_to_image import TextToImageConfig
from difftrain_utils.config.training import TrainConfig
from difftrain_utils.errors import EXTRAS, InputError, not_installed
from difftrain_utils.run.metrics import read_metrics
from difftrain_utils.run.tracking import Metrics, check_trackers


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
    assert not_installed("scipy") == "scipy is not installed (pip install -c constraints.txt -e '.[immiscible]')"
    project = (ROOT / "pyproject.toml").read_text()
    assert all(f'\n{extra} = ["{package}>' in project for package, extra in EXTRAS.items())
