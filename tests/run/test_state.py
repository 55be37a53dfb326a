"""What a run carries from step to step, and that a checkpoint brings all of it back."""

import json
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from helpers import metrics_without_times, train
from safetensors.torch import load_file

from difftrain_utils.config.data import DataConfig
from difftrain_utils.config.model import ModelConfig
from difftrain_utils.config.text_to_image import TextToImageConfig
from difftrain_utils.config.training import EmaConfig, OptimizerConfig, TrainConfig
from difftrain_utils.errors import InputError, RunError
from difftrain_utils.optimization.averages import build_averages
from difftrain_utils.optimization.optimizers import build_optimizer, clip_gradients
from difftrain_utils.run.manifest import Record
from difftrain_utils.run.state import Totals, TrainState


def test_totals_go_on_from_a_checkpoint_in_each_process():
    """Of many values for two processes: continuing from the mean of both would round otherwise."""

    def processes(*states):
        totals = []

        def gather(value):
            return torch.cat([other.losses["denoising"].view(1) for other in totals])

        common = {"device": torch.device("cpu"), "num_processes": 2, "gather": gather, "reduce": lambda rows, _: rows}
        for i, state in enumerate(states):
            totals.append(Totals(SimpleNamespace(**common, process_index=i, is_main_process=i == 0), num_parts=1))
            if state is not None:
                totals[-1].load_state(state)
        return totals

    losses = torch.rand(100, 2, 5, generator=torch.Generator().manual_seed(0))
    for sample in losses:
        unbroken, resumed = processes(None, None), processes(None, None)
        for step in range(5):
            for totals in (unbroken, resumed):
                for total, loss in zip(totals, sample[:, step], strict=True):
                    total.add({"denoising": loss.view(1)}, [])
                    total.end_step(True)
            if step == 2:
                resumed = processes(*(json.loads(json.dumps(total.state())) for total in resumed))
        expected = sample.double().mean().item()
        assert resumed[0].take()["loss"] == unbroken[0].take()["loss"] == pytest.approx(expected, rel=1e-6)
    one = Totals(Accelerator(), num_parts=1)
    saved = {"losses": {"denoising": [1.0, 3.0]}, "counts": {"denoising": 4}, "steps": 4, "skipped_rows": 0}
    one.load_state(saved)  # of two processes
    assert one.take() == {"loss": 0.5, "skipped_rows": 0}


def test_several_losses_are_each_reported():
    totals = Totals(Accelerator(), num_parts=2)
    for part in (1.0, 3.0):
        totals.add(
            {"denoising": torch.tensor([part, part + 2]), "alignment": torch.tensor([10.0, 10.0])}, [True, False]
        )
    totals.end_step(is_finite=True)
    totals.add({"denoising": torch.tensor([torch.nan]), "alignment": torch.tensor([0.0])}, [True])
    totals.end_step(is_finite=False)  # counts its rows, not its loss
    expected = {"loss": 13.0, "loss_denoising": 3.0, "loss_alignment": 10.0, "skipped_rows": 3}
    assert totals.take() == pytest.approx(expected)
    assert totals.take() == {"skipped_rows": 0}


def test_a_loss_that_comes_only_in_some_steps_is_the_mean_of_those():
    totals, saved = Totals(Accelerator(), num_parts=1), None
    for step, also in enumerate(({}, {"alignment": torch.tensor([8.0])}, {})):
        totals.add({"denoising": torch.tensor([1.0])} | also, [])
        totals.end_step(is_finite=True)
        if step == 1:
            saved = json.loads(json.dumps(totals.state()))
            totals.clear()
            totals.load_state(saved)
    assert totals.take() == {"loss": 11 / 3, "loss_denoising": 1.0, "loss_alignment": 8.0, "skipped_rows": 0}


def test_measures_are_no_part_of_the_loss():
    totals, saved = Totals(Accelerator(), num_parts=2), None
    for part in (1.0, 3.0, 5.0, 7.0):
        totals.add({"preference": torch.tensor([part])}, [], {"margin": torch.tensor([10 * part, 0.0])})
        if part in (3.0, 7.0):
            totals.end_step(is_finite=True)
            saved = json.loads(json.dumps(totals.state()))
            totals.clear()
            totals.load_state(saved)
    assert totals.take() == {"loss": 4.0, "margin": 20.0, "skipped_rows": 0}


class Tied(torch.nn.Module):
    """As language models have them: one matrix embeds tokens and scores them."""

    in_features = 3

    def __init__(self):
        super().__init__()
        self.embedding, self.head = torch.nn.Linear(3, 3, bias=False), torch.nn.Linear(3, 3, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, values):
        return self.head(self.embedding(values))


def test_tied_weights_are_saved_once_and_stay_tied(tmp_path):
    states = [make_state(tmp_path, projector=Tied()) for _ in range(2)]
    make_step(states[0])
    states[0].save(required=True)
    states[1].load(tmp_path / "checkpoint-1")
    torch.testing.assert_close(contents(states[1]), contents(states[0]), rtol=0, atol=0)
    tied = states[1].models["projector"]
    assert tied.head.weight is tied.embedding.weight
    assert len(load_file(tmp_path / "checkpoint-1/projector.safetensors")) == 1


def make_state(output_dir, projector=None, scaler=None, **train) -> TrainState:
    """Two models, as a fork may have them."""
    torch.manual_seed(0)
    models = {"denoiser": torch.nn.Linear(2, 3), "projector": projector or torch.nn.Linear(3, 1)}
    config = TextToImageConfig(
        ModelConfig("m"), DataConfig("d"), TrainConfig(output_dir=str(output_dir), max_steps=9, **train),
        OptimizerConfig(init_args={"lr": 0.1}), ema=EmaConfig(power_sigma_rels=[0.1]),
    )  # fmt: skip
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = scaler
    optimizer = build_optimizer(config.optimizer, models)
    lr_scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    record = Record(config, accelerator, "unet", {}, {})
    state = TrainState(accelerator, models, optimizer, lr_scheduler, record, config.train)
    state.averages = build_averages(config.ema, state.models["denoiser"].parameters())
    return state


def make_step(state: TrainState) -> None:
    for model in state.models.values():
        model(torch.ones(4, model.in_features)).square().mean().backward()
    state.add({"denoising": torch.tensor([1.0, 2.0])}, {"skipped": [False, True]})
    assert state.accepts(torch.tensor(1.0), samples=None)
    state.optimizer.step()
    state.optimizer.zero_grad()
    state.lr_scheduler.step()
    state.end_step()
    for average in state.averages.values():
        average.step(state.models["denoiser"].parameters(), state.step)


def contents(state: TrainState) -> dict:
    weights = {name: model.state_dict() for name, model in state.models.items()}
    averages = {name: average.state_tensors() for name, average in state.averages.items()}
    optimizer, lr = state.optimizer.state_dict()["state"], state.lr_scheduler.get_last_lr()
    return {"weights": weights, "averages": averages, "optimizer": optimizer, "lr": lr,
            "totals": state.totals.state(), "steps": (state.step, state.skipped_steps)}  # fmt: skip


def test_a_checkpoint_brings_all_of_it_back(tmp_path):
    state = make_state(tmp_path)
    for _ in range(3):
        make_step(state)
    state.save()
    saved = contents(state)
    other = make_state(tmp_path)
    other.load(tmp_path / "checkpoint-3")
    assert saved["steps"] == (3, 0) and saved["totals"]["skipped_rows"] == 3
    torch.testing.assert_close(contents(other), saved, rtol=0, atol=0)
    make_step(state)
    make_step(other)
    torch.testing.assert_close(contents(other), contents(state), rtol=0, atol=0)


def test_each_model_and_average_has_a_file_and_a_group_of_its_name(tmp_path):
    state = make_state(tmp_path)
    make_step(state)
    state.save()
    names = {"denoiser", "projector", "optimizer", "ema", "power_ema"}
    folder = tmp_path / "checkpoint-1"
    assert {path.stem for path in folder.glob("*.safetensors")} == names
    assert [group["name"] for group in state.optimizer.param_groups] == ["denoiser", "projector"]
    weights = state.models["projector"].state_dict()
    torch.testing.assert_close(load_file(folder / "projector.safetensors"), dict(weights), rtol=0, atol=0)
    assert not list(folder.glob("model*"))
    (folder / "projector.safetensors").unlink()
    with pytest.raises(InputError, match=r"^train.resume_from: cannot load .*checkpoint-1: .*has no 'projector'"):
        make_state(tmp_path / "other").load(folder)


def test_what_is_due(tmp_path):
    state = make_state(tmp_path)
    due = []
    for state.step in range(1, 10):
        due.append([state.is_due(every) for every in (0, 1, 4)])
    assert [step for step, (_, _, every_fourth) in enumerate(due, 1) if every_fourth] == [4, 8, 9]  # and the last
    assert all(not never and always for never, always, _ in due)
    assert state.is_finished


def test_a_gradient_that_is_not_finite_leaves_a_step_out_and_is_counted(tmp_path):
    state = make_state(tmp_path, on_nonfinite="skip")
    state.add({"denoising": torch.tensor([torch.nan])}, {"skipped": [False]})
    assert not state.accepts(torch.tensor(torch.inf), samples=None)
    state.end_step()
    assert (state.step, state.skipped_steps) == (1, 1) and state.totals.take() == {"skipped_rows": 0}
    make_step(state)
    assert (state.step, state.skipped_steps) == (2, 1) and state.totals.take()["loss"] == 1.5


def test_fp16_leaves_out_a_step_whose_scaled_gradient_is_infinite(tmp_path, monkeypatch):
    """Of which only the projector's is: the scale halves, no weight moves, and the next step is made."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    state = make_state(tmp_path, scaler=scaler, on_nonfinite="stop")  # which is not for fp16
    accelerator = state.accelerator
    monkeypatch.setattr(accelerator, "native_amp", True)
    monkeypatch.setattr(accelerator.state, "_mixed_precision", "fp16")
    before = {name: model.weight.detach().clone() for name, model in state.models.items()}
    for step, factor in enumerate((torch.inf, 1.0)):
        loss = sum(model(torch.ones(4, model.in_features)).square().mean() for model in state.models.values())
        accelerator.backward(loss)
        state.models["projector"].weight.grad.mul_(factor)
        state.add({"denoising": torch.tensor([1.0])}, {"skipped": [False]})
        norm = clip_gradients(accelerator, state.optimizer, {"denoiser": 0.1, "projector": None})
        clipped = [parameter.grad for parameter in state.models["denoiser"].parameters()]
        assert torch.nn.utils.get_total_norm(clipped).item() == pytest.approx(0.1, rel=1e-4)
        assert norm.isfinite().item() == bool(step)
        if state.accepts(norm, samples=None):
            state.optimizer.step()
        state.optimizer.zero_grad()
        state.end_step()
        moved = [not torch.equal(model.weight, before[name]) for name, model in state.models.items()]
        assert moved == [bool(step)] * 2
    assert (state.skipped_steps, scaler.get_scale()) == (1, 2.0**9)


def test_an_update_that_was_too_large_is_blamed_and_not_the_images(short_run, tmp_path):
    argv = [*short_run, "--output-dir", str(tmp_path / "run"), "--optimizer.init_args.lr", "1.0e+30"]
    argv += ["--train.save_every", "0"]
    with pytest.raises(
        RunError, match=r"at step [23]: an update before it was too large; lower .*; there is no checkpoint"
    ):
        train(argv)
    assert not list((tmp_path / "run").glob("checkpoint-*"))
    (segment,) = json.loads((tmp_path / "run/run_manifest.json").read_text())["segments"]
    assert segment["reason"] == "diverged" and segment["to_step"] in (1, 2)


def test_the_last_step_has_a_line_of_metrics(short_run):
    output_dir = train([*short_run, "--train.log_every", "4", "--train.max_steps", "6"])
    assert [entry["step"] for entry in metrics_without_times(output_dir)] == [4, 6]
