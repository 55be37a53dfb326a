import pytest
import torch
from diffusers.training_utils import EMAModel
from helpers import metrics_without_times, options, pipeline_bytes, train
from safetensors.torch import load_file

from difftrain_utils.config.training import EmaConfig
from difftrain_utils.optimization.ema import EMA, decay_at


def walk(steps: int):
    """A parameter list at each step, in two shapes."""
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.randn(3, 2, generator=generator), torch.randn(5, generator=generator)]
    for _ in range(steps):
        for parameter in parameters:
            parameter += torch.randn(parameter.shape, generator=generator)
        yield parameters


@pytest.mark.parametrize("on_cpu", [False, True])
def test_it_is_diffusers_average(on_cpu):
    start = [torch.nn.Parameter(torch.ones(3, 2)), torch.nn.Parameter(torch.ones(5))]
    ours, theirs = EMA(start, EmaConfig(decay=0.6, on_cpu=on_cpu)), EMAModel(start, decay=0.6, foreach=True)
    for step, parameters in enumerate(walk(30), 1):
        parameters = [torch.nn.Parameter(p.clone()) for p in parameters]
        ours.step(parameters, step)
        theirs.step(parameters)
        torch.testing.assert_close(ours.averages, theirs.shadow_params)
    assert decay_at(2, 0.6) == 2 / 11 and decay_at(30, 0.6) == 0.6


def test_every_third_step_weighs_what_was_before_as_every_step_does():
    """The weights at which it looks stand for their three steps; what came before them weighs the same."""
    parameters = [torch.zeros(1)]
    often, seldom = EMA(parameters, EmaConfig(decay=0.9)), EMA(parameters, EmaConfig(decay=0.9, update_every=3))
    for step in range(1, 31):
        value = [torch.tensor([float((step + 2) // 3)])]  # changes only after each third step
        often.step(value, step)
        seldom.step(value, step)
        if step % 3 == 0:
            torch.testing.assert_close(often.averages, seldom.averages)
        else:
            assert step < 3 or not torch.equal(often.averages[0], seldom.averages[0])


@pytest.mark.parametrize("fields", [{"ema.update_every": 4}, {"ema.update_every": 4, "ema.on_cpu": True}])
def test_it_resumes_between_two_updates(short_run, tmp_path, fields):
    argv = [*short_run, *options(fields), "--ema.decay", "0.5", "--train.keep_checkpoints", "0"]
    unbroken = train([*argv, "--output-dir", str(tmp_path / "unbroken")])
    saved = [load_file(unbroken / f"checkpoint-{step}/ema.safetensors")["0"] for step in (2, 4, 6)]
    assert not torch.equal(saved[0], saved[1]) and torch.equal(saved[1], saved[2])
    branch = ["--output-dir", str(tmp_path / "branch"), "--resume-from", str(unbroken / "checkpoint-2")]
    resumed = train([*argv, *branch])
    assert pipeline_bytes(resumed) == pipeline_bytes(unbroken)
    assert metrics_without_times(resumed) == metrics_without_times(unbroken)[2:]
