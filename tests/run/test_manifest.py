import json

import pytest
import torch
from accelerate import Accelerator
from helpers import parse_config

from difftrain_utils.config.data import DataConfig
from difftrain_utils.config.model import ModelConfig
from difftrain_utils.config.text_to_image import TextToImageConfig
from difftrain_utils.config.training import TrainConfig
from difftrain_utils.devices import device_name
from difftrain_utils.files import file_digest, weights_digest
from difftrain_utils.run.machine import set_deterministic
from difftrain_utils.run.manifest import Record, describe_environment


def test_a_digest_changes_with_one_bit_a_name_and_a_type():
    def module(name="weight", dtype=torch.float32, shape=(3, 4)) -> torch.nn.Module:
        module = torch.nn.Module()
        module.register_parameter(name, torch.nn.Parameter(torch.arange(12, dtype=dtype).reshape(shape)))
        module.register_buffer("count", torch.tensor(1))
        return module

    first = weights_digest(module())
    assert first == weights_digest(module())
    changed = module()
    changed.weight.data[2, 3] = torch.nextafter(changed.weight.data[2, 3], torch.tensor(99.0))
    counted = module()
    counted.count += 1
    others = [changed, counted, module(name="bias"), module(dtype=torch.bfloat16), module(shape=(4, 3))]
    assert len({first, *(weights_digest(other) for other in others)}) == 6


def test_the_record_says_what_made_the_run(tmp_path, monkeypatch):
    (tmp_path / "script.py").write_text("train()")
    monkeypatch.setattr("sys.argv", [str(tmp_path / "script.py"), "--hub.token", "x"])
    model = torch.nn.Linear(2, 2)
    config = TextToImageConfig(ModelConfig("some/model", revision="v1"), DataConfig("some/data"), TrainConfig(seed=7))
    fingerprints = {"train": {"num_images": 3, "sha256": "abc"}}
    record = Record(config, Accelerator(), "unet", {"unet": weights_digest(model)}, fingerprints)
    record.write(tmp_path / "new" / "run")
    manifest = json.loads((tmp_path / "new/run/run_manifest.json").read_text())
    assert manifest["base_model"] == {
        "name": "some/model", "revision": "v1", "denoiser": "unet", "sha256": {"unet": weights_digest(model)}
    }  # fmt: skip
    assert manifest["command"] == [str(tmp_path / "script.py"), "--hub.token", "<redacted>"]
    assert manifest["data"] == fingerprints == record.fingerprints
    assert manifest["script_sha256"] == file_digest(tmp_path / "script.py")
    assert (
        manifest["seed"] == 7
        and manifest["seeds"] == {"weights": 7, "data": 7, "noise": 7}
        and manifest["num_processes"] == 1
        and manifest["mixed_precision"] == "no"
    )
    assert manifest["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    environment = json.loads((tmp_path / "new/run/env.json").read_text())
    assert environment["packages"]["diffusers"] == manifest["versions"]["diffusers"]
    assert environment["cpu_threads"] == torch.get_num_threads()
    assert parse_config(["--config", str(tmp_path / "new/run/config.resolved.yaml")]) == config


def test_deterministic_sets_torchs_switches(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        set_deterministic()
        import os

        assert torch.are_deterministic_algorithms_enabled()
        assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        with pytest.raises(RuntimeError, match="deterministic"):  # an operation that has no deterministic form
            torch.nn.functional.max_unpool2d(torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 2, 2, dtype=int), 2)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.deterministic = False


def test_gpus_are_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU of {device}")
    assert describe_environment()["gpus"] == ["GPU of 0", "GPU of 1"]
    assert device_name(torch.device("cuda:1")) == "GPU of cuda:1"
    assert device_name(torch.device("cpu")) == "cpu"
