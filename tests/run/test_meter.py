import contextlib
import gzip
import io
import json
import re
import time
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from helpers import DREAM, metrics_without_times, options, parse_config, pipeline_bytes, train
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from difftrain_utils.config.data import DataConfig
from difftrain_utils.config.model import ModelConfig
from difftrain_utils.config.text_to_image import TextToImageConfig
from difftrain_utils.config.training import TrainConfig
from difftrain_utils.families.load import load_family, trained_models
from difftrain_utils.optimization.trained import round_frozen
from difftrain_utils.run.flops import StepFlops, peak_tflops, training_flops
from difftrain_utils.run.meter import BAR, Meter, StepTimer
from difftrain_utils.run.metrics import TIMES


def test_what_a_step_takes_and_how_long_it_waits():
    timer = StepTimer(Accelerator(cpu=True), torch.nn.Identity(), TrainConfig(batch_size=8))

    def loader():
        for _ in range(8):
            time.sleep(0.03)
            yield {}

    batches = loader()
    for part in range(8):
        timer.next_batch(batches)
        if part % 2:  # a step has two parts
            time.sleep(0.18 if part == 7 else 0.06)
            timer.end_step()
            time.sleep(0.1)  # evaluating and saving do not count
    values = timer.take()
    assert set(values) == set(TIMES) - {"mfu"}
    assert values["step_time_median"] == pytest.approx(0.12, abs=0.02)
    assert values["step_time_p95"] == pytest.approx(0.24, abs=0.03)
    assert values["data_wait"] == pytest.approx(0.24 / 0.6, abs=0.08)
    assert values["samples_per_second"] == pytest.approx(4 * 8 / 0.6, rel=0.1)
    assert 0.05 < values["peak_memory_gb"] < 50


def test_flops_of_forward_and_backward(checkpoint_folder):
    family = load_family(TextToImageConfig(ModelConfig(str(checkpoint_folder)), DataConfig("d")))
    denoiser, generator = family.load_denoiser(), torch.Generator().manual_seed(0)
    inputs = torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([1, 2])
    inputs = *inputs, {"prompt_embeds": torch.randn(2, 16, 64)}
    state = torch.get_rng_state()
    flops = training_flops(denoiser.train(), family.predict, *inputs)
    assert torch.equal(state, torch.get_rng_state())
    # torch does not count the CPU's own kernel of attention
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        family.predict(denoiser, *inputs)
    assert flops == pytest.approx(3 * counter.get_total_flops(), rel=0.05)
    # by hand: 2 (multiply and add) × outputs × inputs of each, and as many for the gradient of the weights
    convolution, latents = torch.nn.Conv2d(4, 8, 3, padding=1), torch.zeros(2, 4, 10, 10)
    by_hand = 2 * 2 * (2 * 8 * 10 * 10) * (4 * 3 * 3)
    # a family may look at what else the denoiser has
    assert training_flops(convolution, lambda denoiser, x: denoiser(x) * denoiser.in_channels, latents) == by_hand


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"model.trainable": ["conv_out.*"]},
        {"model.trainable": ["up_blocks.*"], "train.gradient_checkpointing": True},
        {"model.lora": {"rank": 4}},
    ],
    ids=str,
)
def test_flops_are_those_of_what_is_computed(short_run, fields):
    """What frozen weights spare does not count, nor what checkpointing computes once more."""
    config = parse_config([*short_run, *options(fields)])
    family = load_family(config)
    denoiser = trained_models(family, config)["denoiser"]
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([1, 2]), {"prompt_embeds": torch.randn(2, 16, 64)}
    flops = training_flops(denoiser, family.predict, *inputs)
    assert all(parameter.grad is None for parameter in denoiser.parameters())
    assert denoiser.is_gradient_checkpointing == config.train.gradient_checkpointing
    # what is frozen may be of another type
    round_frozen(denoiser, torch.bfloat16)
    assert training_flops(denoiser, family.predict, *inputs) == flops
    denoiser.float().disable_gradient_checkpointing()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        family.predict(denoiser, *inputs).sum().backward()
    assert flops == counter.get_total_flops()


def test_flops_where_values_are_asked_for():
    """The passes cannot be made on the meta device: a forward pass, and as much of a backward pass as can be needed."""
    layers = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False))
    forward, inputs = 2 * 2 * 3 * 4 * 4, torch.ones(3, 4)  # of two layers

    def predict(denoiser, x):
        return denoiser(x[: int(x.sum())])

    for layer, thirds in zip(layers, (3, 2.5), strict=True):
        assert training_flops(layers, predict, inputs) == thirds * forward
        layer.requires_grad_(False)
    packed = torch.nn.Parameter(torch.zeros(4, 2, dtype=torch.uint8), requires_grad=False)  # two weights of 4 bits each
    layers[1].register_parameter("packed", packed)
    layers[0].requires_grad_(True)
    layers[1].weight = None
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("difftrain_utils.run.flops.quantized_flops", dict)
        assert training_flops(layers, lambda denoiser, x: denoiser[0](x), inputs) == 2.5 * forward / 2


def test_utilisation_is_reported_where_the_peak_is_known(short_run, monkeypatch):
    output_dir = train([*short_run, *options({"train.peak_tflops": 0.5, "train.gradient_accumulation_steps": 2})])
    entries = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    family = load_family(TextToImageConfig(ModelConfig(short_run[1]), DataConfig("d")))
    inputs = torch.zeros(4, 4, 8, 8), torch.zeros(4, dtype=torch.int64)
    conditioning = {"prompt_embeds": torch.zeros(4, 16, 64)}
    flops = training_flops(family.load_denoiser(), family.predict, *inputs, conditioning=conditioning)
    for entry in entries:
        assert entry["mfu"] == pytest.approx(flops / entry["step_time_median"] / 0.5e12)
    assert "mfu" not in metrics_without_times(output_dir)[0]

    accelerator = Accelerator(cpu=True)
    assert peak_tflops(accelerator, TrainConfig()) is None
    accelerator.state.device = torch.device("cuda")
    for name, peaks in {"NVIDIA H100 PCIe": [51.2, 378.0], "NVIDIA H100 80GB HBM3 MIG 1g.10gb": [None] * 2}.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert [peak_tflops(accelerator, TrainConfig(tf32=tf32)) for tf32 in (False, True)] == peaks


def test_the_flops_of_whole_steps_are_counted_and_change_nothing(short_run, tmp_path, monkeypatch):
    """Those of the denoiser, of VAE and text encoder (once a caption); DREAM is seen when they are counted again."""

    def flops(name: str, **fields) -> list[int]:
        argv = [*short_run, *options({"train.output_dir": tmp_path / name} | fields)]
        return [entry["flops"] for entry in metrics_without_times(train(argv))]

    plain = flops("plain")
    assert plain == [plain[0] * step for step in range(1, 7)]
    assert flops("parts", **{"train.gradient_accumulation_steps": 2}) == pytest.approx(plain, rel=0.01)
    config = parse_config(short_run)
    family = load_family(config)
    inputs = torch.zeros(4, 4, 8, 8), torch.zeros(4, dtype=torch.int64)
    conditioning = {"prompt_embeds": torch.zeros(4, 16, 64)}
    of_denoiser = training_flops(family.load_denoiser(), family.predict, *inputs, conditioning=conditioning)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        family.encode_images(torch.zeros(4, 3, 32, 32))
        for _ in range(4):  # one by one
            family.encode_prompts(["a red circle"])
    assert plain[0] == pytest.approx(of_denoiser + counter.get_total_flops(), rel=0.02)

    monkeypatch.setattr("difftrain_utils.run.flops.RECOUNT", 2)
    with_dream = flops("dream", **DREAM)  # from step 1 on
    differences = [b - a for a, b in zip([0, *with_dream], with_dream, strict=False)]
    assert differences[:2] == [plain[0]] * 2 and min(differences[2:]) > plain[0] * 1.1
    monkeypatch.setattr(StepFlops, "part", lambda self, batch, step: contextlib.nullcontext())
    assert set(flops("uncounted")) == {0}
    assert pipeline_bytes(tmp_path / "uncounted") == pipeline_bytes(tmp_path / "plain")


@pytest.mark.slow
def test_a_trace_that_changes_nothing(short_run, tmp_path, capfd):
    plain = train([*short_run, "--output-dir", str(tmp_path / "plain")])
    traced = train([*short_run, "--output-dir", str(tmp_path / "traced"), "--train.profile", "2"])
    assert pipeline_bytes(plain) == pipeline_bytes(traced)
    assert metrics_without_times(plain) == metrics_without_times(traced)
    with gzip.open(traced / "profile/trace.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    steps = {event["name"] for event in events if event.get("name", "").startswith("ProfilerStep")}
    assert steps == {"ProfilerStep#3", "ProfilerStep#4"}
    assert any(event.get("name") == "aten::convolution" and event["args"]["Input Dims"] for event in events)
    assert "warning" not in capfd.readouterr().err
    short = [*short_run, "--output-dir", str(tmp_path / "short"), "--train.profile", "--train.max_steps", "2"]
    assert not (train(short) / "profile").exists()
    assert "warning: train.profile: no trace" in capfd.readouterr().err


class TestBusy:
    def lines(self, times):
        meter = object.__new__(Meter)
        meter.first_step_time, meter.slow_lines, meter.said_busy = None, 0, False
        meter.state = SimpleNamespace(step=7)
        for step_time in times:
            meter._notice_busy(step_time)

    def test_it_is_said_once(self, capsys):
        self.lines([0.1, 0.2, 0.4, 0.4, 0.5, 0.1, 0.4, 0.4])
        said = capsys.readouterr().err
        assert said.count("warning: ") == 1
        assert "step 7: steps take 0.4 s, the first ones took 0.1 s; is the machine busy" in said

    def test_one_slow_line_may_be_chance(self, capsys):
        self.lines([0.1, 0.4, 0.1, 0.4, 0.29, 0.29])
        assert capsys.readouterr().err == ""


def test_the_bar_fits_80_columns(monkeypatch):
    """With the longest that it has to show."""
    output = io.StringIO()
    bar = tqdm(
        total=200_000, initial=100_000, bar_format=BAR, ncols=80, file=output, postfix="epoch 123.4, loss 0.000123"
    )
    bar.set_postfix_str("epoch 123.4, loss 0.000123, 1.23e+03 samples/s")
    bar.close()
    assert all(len(line) <= 80 for line in re.split("[\r\n]", output.getvalue()))
    assert "1.23e+03 samples/s]" in output.getvalue()
