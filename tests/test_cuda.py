"""What only a GPU can show: `pytest -m cuda`."""

import pytest
import torch
from helpers import metrics_without_times, options, pipeline_bytes, train

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_run_on_the_gpu_resumes_exactly(short_run, tmp_path, precision):
    argv = [*short_run, "--train.precision", precision, "--train.deterministic"]
    unbroken = train([*argv, "--output-dir", str(tmp_path / "unbroken")])
    branch = tmp_path / "branch"
    train([*argv, "--output-dir", str(branch), "--resume-from", str(unbroken / "checkpoint-4")])
    torch.use_deterministic_algorithms(False)
    assert pipeline_bytes(branch) == pipeline_bytes(unbroken)
    assert metrics_without_times(branch) == metrics_without_times(unbroken)[4:]


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_a_run_with_a_quantised_base_on_the_gpu(short_run, tmp_path, quantization):
    pytest.importorskip("bitsandbytes")
    fields = {"model.lora.rank": 4, "train.precision": "bf16", "train.deterministic": True, "ema.enabled": False}
    argv = [*short_run, *options(fields)]
    plain = train([*argv, "--output-dir", str(tmp_path / "plain")])
    argv += ["--model.lora.quantization", quantization]
    unbroken = train([*argv, "--output-dir", str(tmp_path / "unbroken")])
    resumed = train([*argv, "--output-dir", str(tmp_path / "resumed"), "--resume-from", str(unbroken / "checkpoint-4")])
    torch.use_deterministic_algorithms(False)
    file = "lora/pytorch_lora_weights.safetensors"
    assert (unbroken / file).read_bytes() == (resumed / file).read_bytes() != (plain / file).read_bytes()
    assert metrics_without_times(resumed) == metrics_without_times(unbroken)[4:]
    for ours, theirs in zip(*map(metrics_without_times, (unbroken, plain)), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.2)


def test_the_gpu_sees_the_samples_of_the_cpu(short_run, tmp_path):
    gpu = train([*short_run, "--output-dir", str(tmp_path / "gpu"), "--train.max_steps", "1", "--ema.enabled", "false"])
    # the first loss differs by the dropout that the device draws, not by samples, noise and timesteps
    command_on_cpu = ["--output-dir", str(tmp_path / "cpu"), "--train.max_steps", "1", "--ema.enabled", "false"]
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
        cpu = train([*short_run, *command_on_cpu])
    losses = [metrics_without_times(run)[0]["loss"] for run in (gpu, cpu)]
    assert losses[0] == pytest.approx(losses[1], rel=0.1)
