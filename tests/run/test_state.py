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
from difftrain_utils.errors import InputError
from difftrain_utils.optimization.averages import build_averages
from difftrain_utils.optimization.optimizers import build_optimizer
from difftrain_utils.run.manifest import Record
from difftrain_utils.run.state import Totals, TrainState


def test_totals_go_on_from_a_checkpoint_in_each_process():
    """Of many values for two processes: continuing from the mean of both would round otherwise."""

    def processes(*states):
        totals = []

        def gather(value):
            return torch.cat([other.losses["loss"].view(1) for other in totals])

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
    one.load_state({"losses": {"loss": [1.0, 3.0]}, "steps": 4, "skipped_rows": 0})  # two processes before
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


def make_state(output_dir, **train) -> TrainState:
    """Two models, as a fork may have them; their optimizer has made a step."""
    torch.manual_seed(0)
    models = {"denoiser": torch.nn.Linear(2, 3), "projector": torch.nn.Linear(3, 1)}
    config = TextToImageConfig(
        ModelConfig("m"), DataConfig("d"), TrainConfig(output_dir=str(output_dir), max_steps=9, **train),
        OptimizerConfig(init_args={"lr": 0.1}), ema=EmaConfig(power_sigma_rels=[0.1]),
    )  # fmt: skip
    accelerator = Accelerator(cpu=True)
    optimizer = build_optimizer(config.optimizer, models)
    lr_scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    state = TrainState(accelerator, models, optimizer, lr_scheduler, Record(config, accelerator, {}, {}), config.train)
    state.averages = build_averages(config.ema, state.models["denoiser"].parameters())
    return state


def make_step(state: TrainState) -> None:
    for model in state.models.values():
        model(torch.ones(4, model.in_features)).square().mean().backward()
    state.add({"denoising": torch.tensor([1.0, 2.0])}, {"skipped": [False, True], "place": {"row": state.step}})
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
    return {"weights": weights, "averages": averages, "optimizer": optimizer, "lr": lr, "place": state.place,
            "totals": state.totals.state(), "steps": (state.step, state.skipped_steps)}  # fmt: skip


def test_a_checkpoint_brings_all_of_it_back(tmp_path):
    state = make_state(tmp_path)
    for _ in range(3):
        make_step(state)
    state.save()
    saved = contents(state)
    other = make_state(tmp_path)
    other.load(tmp_path / "checkpoint-3")
    assert saved["steps"] == (3, 0) and saved["place"] == {"row": 2} and saved["totals"]["skipped_rows"] == 3
    torch.testing.assert_close(contents(other), saved, rtol=0, atol=0)
    make_step(state)
    make_step(other)
    torch.testing.assert_close(contents(other), contents(state), rtol=0, atol=0)


def test_each_model_and_average_has_a_file_and_a_group_of_its_name(tmp_path):
    state = make_state(tmp_path)
    make_step(state)
    state.save()
    names = {"denoiser", "projector", "ema", "power_ema"}
    folder = tmp_path / "checkpoint-1"
    assert {path.stem for path in folder.glob("*.safetensors")} == names
    assert [group["name"] for group in state.optimizer.param_groups] == ["denoiser", "projector"]
    weights = state.models["projector"].state_dict()
    torch.testing.assert_close(load_file(folder / "projector.safetensors"), dict(weights), rtol=0, atol=0)
    assert not list(folder.glob("model*"))
    (folder / "projector.safetensors").unlink()
    with pytest.raises(InputError, match=r"^train.resume_from: cannot load .*checkpoint-1: .*projector.safetensors"):
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
    state.add({"denoising": torch.tensor([torch.nan])}, {"skipped": [False], "place": None})
    assert not state.accepts(torch.tensor(torch.inf), samples=None)
    state.end_step()
    assert (state.step, state.skipped_steps) == (1, 1) and state.totals.take() == {"skipped_rows": 0}
    make_step(state)
    assert (state.step, state.skipped_steps) == (2, 1) and state.totals.take()["loss"] == 1.5


def test_the_last_step_has_a_line_of_metrics(short_run):
    output_dir = train([*short_run, "--train.log_every", "4", "--train.max_steps", "6"])
    assert [entry["step"] for entry in metrics_without_times(output_dir)] == [4, 6]
