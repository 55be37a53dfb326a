"""All that changes while a run trains, and what of it a checkpoint holds."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import fmean
from types import MappingProxyType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer

from difftrain_utils.config.training import TrainConfig
from difftrain_utils.data.samples import Samples
from difftrain_utils.devices import weight_dtype
from difftrain_utils.errors import LOAD_ERRORS, RunError, blame, go_on_without
from difftrain_utils.optimization.averages import Averages
from difftrain_utils.optimization.power_ema import save_snapshot
from difftrain_utils.optimization.sharding import is_sharded, shard_models, whole, wholes
from difftrain_utils.optimization.trained import round_frozen, saved_state, trained_parameters, trained_weights
from difftrain_utils.processes import on_main_process
from difftrain_utils.run.checkpoints import Checkpoint, load_checkpoint, load_optimizer, read_state
from difftrain_utils.run.flops import StepFlops
from difftrain_utils.run.manifest import Record
from difftrain_utils.run.run_folder import (
    BEST_FILE,
    DIVERGED,
    EMA_SNAPSHOTS,
    OPTIMIZER_FILE,
    STATE_FILE,
    WEIGHTS,
    checkpoint_name,
    list_checkpoints,
)
from difftrain_utils.run.saved_tensors import OPTIMIZER
from difftrain_utils.run.weights import is_best, named_weights, save_weights
from difftrain_utils.trees import to_json

RUINED = 1e8  # no weight of a model that learns is as large
MIN_LOSS_SCALE = 1e-4  # of fp16: below it, the gradient is infinite for other reasons


class Totals:
    """What adds up between two lines of metrics, kept on the device so that it need not be asked at each step."""

    def __init__(self, accelerator: Accelerator, num_parts: int):
        self.accelerator, self.num_parts = accelerator, num_parts
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        self.losses: dict[str, torch.Tensor] = {}  # sums over the steps
        self.counts: dict[str, int] = {}  # of the steps that had them
        self.measures: list[str] = []  # those of them that are no part of the loss
        self.steps, self.skipped_rows = 0, 0  # the latter of the process; loaded ones are the main process's
        self.clear_step()

    def clear_step(self) -> None:
        """Forget the parts of a step that does not end."""
        self.step_losses: dict[str, torch.Tensor] = {}
        self.step_skipped_rows = 0

    def add(
        self,
        losses: dict[str, torch.Tensor],
        skipped: list[bool],
        measures: Mapping[str, torch.Tensor] = MappingProxyType({}),
    ) -> None:
        """A part of a step: its samples' losses, (batch,) each, for which of them other rows stand in, and measures,
        (batch,) each, whose means are logged beside the loss."""
        self.measures = list(dict.fromkeys([*self.measures, *measures]))
        for name, values in {**losses, **measures}.items():
            self.step_losses[name] = self.step_losses.get(name, 0) + values.detach().mean() / self.num_parts
        self.step_skipped_rows += sum(skipped)

    def end_step(self, is_finite: bool) -> None:
        """A step whose gradient is not finite does not count for the losses."""
        if is_finite:
            for name, loss in self.step_losses.items():
                self.losses[name] = self.losses.get(name, 0) + loss
                self.counts[name] = self.counts.get(name, 0) + 1
            self.steps += 1
        self.skipped_rows += self.step_skipped_rows
        self.clear_step()

    def state(self) -> dict[str, Any]:
        """The totals of all processes, which all of them ask for. Of the losses, one sum for each process, because
        rounding depends on how a sum is put together."""
        accelerator = self.accelerator
        rows = torch.tensor(float(self.skipped_rows), device=accelerator.device)
        losses = {name: accelerator.gather(loss.view(1)).tolist() for name, loss in self.losses.items()}
        rows = round(accelerator.reduce(rows, "sum").item())
        counts = {"counts": self.counts, "measures": self.measures} if self.measures else {"counts": self.counts}
        return {"losses": losses, **counts, "steps": self.steps, "skipped_rows": rows}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from `state`, on any number of processes."""
        accelerator = self.accelerator
        for name, sums in state["losses"].items():
            same = len(sums) == accelerator.num_processes
            loss = sums[accelerator.process_index] if same else fmean(sums)
            self.losses[name] = torch.full((), loss, device=accelerator.device)
        self.counts, self.steps, self.measures = dict(state["counts"]), state["steps"], state.get("measures", [])
        self.skipped_rows = state["skipped_rows"] if accelerator.is_main_process else 0

    def take(self) -> dict[str, Any]:
        """The mean "loss" of the steps, if any counted, and where it is the sum of several, each one's mean over the
        steps that had it, as "loss_NAME"; such means of the measures; the sum of `skipped_rows`; and begin anew."""
        state = self.state()
        self.clear()
        sums, means = {name: fmean(of_processes) for name, of_processes in state["losses"].items()}, {}
        measures = {name: sums.pop(name) for name in state.get("measures", []) if name in sums}
        if sums:
            means["loss"] = sum(sums.values()) / state["steps"]
        if len(sums) > 1:
            means |= {f"loss_{name}": loss / state["counts"][name] for name, loss in sums.items()}
        means |= {name: value / state["counts"][name] for name, value in measures.items()}
        return means | {"skipped_rows": state["skipped_rows"]}


class TrainState:
    """Step, models, optimizer, learning rate, averages and totals: brought onto the device when it is made, and
    saved and loaded as one checkpoint.

    Each of the `models` has its name as a group of parameters in the optimizer, and as a file in a checkpoint; so has
    each of the `averages`."""

    def __init__(
        self,
        accelerator: Accelerator,
        models: dict[str, torch.nn.Module],
        optimizer: torch.optim.Optimizer,
        lr_scheduler: torch.optim.lr_scheduler.LRScheduler,
        record: Record,
        config: TrainConfig,
    ):
        self.accelerator, self.record, self.config = accelerator, record, config
        lora = record.config.model.lora
        for model in models.values():
            round_frozen(model, weight_dtype(accelerator.mixed_precision), lora and lora.quantization)
        self.plain = shard_models(accelerator, models, optimizer, config, record.config.optimizer)
        is_shared = is_sharded(config, accelerator.num_processes)  # and neither to be moved nor wrapped in DDP
        how = {"device_placement": False, "evaluation_mode": True} if is_shared else {}
        self.models = {name: accelerator.prepare_model(model, **how) for name, model in models.items()}
        # not by `prepare`: its state is saved as the weights are, and not by accelerate, which pickles it
        self.optimizer = AcceleratedOptimizer(optimizer, scaler=accelerator.scaler)
        self.lr_scheduler = accelerator.prepare_scheduler(lr_scheduler)
        self.optimizer.train()  # of those that know it, as schedule-free ones do
        self.averages: Averages = {}
        self.step, self.skipped_steps = 0, 0
        self.totals = Totals(accelerator, config.gradient_accumulation_steps)
        self.flops = StepFlops(accelerator.num_processes)
        self._is_finite = True  # of the step that is being made
        self.saving: Checkpoint | None = None
        # models are saved by their names, and not by accelerate, which numbers them
        accelerator.register_save_state_pre_hook(lambda models, weights, folder: weights.clear())
        accelerator.register_load_state_pre_hook(lambda models, folder: models.clear())

    # ── A step ───────────────────────────────────────────────────────────────────────────────────────────────
    def add(
        self,
        losses: dict[str, torch.Tensor],
        batch: dict[str, Any],
        measures: Mapping[str, torch.Tensor] = MappingProxyType({}),
    ) -> None:
        """A part of a step is done: its losses, (batch,) each, and what is logged beside them."""
        self.totals.add(losses, batch["skipped"], measures)

    def accepts(self, grad_norm: torch.Tensor, samples: Samples) -> bool:
        """Whether the optimizer shall make its step: not if the gradient is not finite, which counts as a skipped step.
        With fp16 that is usual, and the loss scaler leaves the step out by itself.

        Raises:
            RunError: it is not finite, and that ends the run (`train.on_nonfinite`, `train.max_skipped_steps`, or no
                loss scale helps); the state before the step is saved, unless an update has ruined the weights.
        """
        self._is_finite, scaler = grad_norm.isfinite().item(), self.accelerator.scaler
        if self._is_finite:
            return True
        if scaler is not None:
            if scaler.get_scale() < MIN_LOSS_SCALE:
                self.save(required=True)
                self.record.end(self.step, DIVERGED, None)
                raise RunError(f"at step {self.step + 1} no loss scale makes fp16's gradient finite; use bf16")
        elif self.config.on_nonfinite == "stop" or self.skipped_steps >= self.config.max_skipped_steps:
            self._blame_the_update()
            self.save(required=True)
            self.record.end(self.step, DIVERGED, None)
            raise RunError(self._describe_nonfinite(grad_norm.item(), samples))
        self.skipped_steps += 1
        return scaler is not None

    def _blame_the_update(self) -> None:
        """Raise RunError if the weights themselves are ruined: it is not the samples then, and not to be saved."""
        weights = [weight.detach() for model in self.models.values() for weight in trained_parameters(model)]
        largest = whole(torch.nn.utils.get_total_norm(weights, torch.inf)).item()
        if not largest < RUINED:  # or nan
            self.record.end(self.step, DIVERGED, None)
            newest = list_checkpoints(Path(self.config.output_dir))
            there = newest[-1][1] if newest else "no checkpoint"
            raise RunError(
                f"the weights are up to {largest:.3g} at step {self.step + 1}: an update before it was too large; "
                "lower the learning rate (optimizer.init_args.lr) or clip (train.max_grad_norm). They are not saved; "
                f"there is {there}"
            )

    def _describe_nonfinite(self, grad_norm: float, samples: Samples) -> str:
        size = self.config.batch_size
        first, last = self.step * size, (self.step + 1) * size - 1
        names = ", ".join(dict.fromkeys(samples.names_of(range(first, last + 1))))
        return (
            f"the norm of the gradient is {grad_norm} at step {self.step + 1}, samples {first} to {last} ({names}); "
            f"{Path(self.config.output_dir) / checkpoint_name(self.step)} holds the state before it"
        )

    def end_step(self) -> None:
        """The update is made, or left out."""
        self.totals.end_step(self._is_finite)
        self.flops.end_step()
        self.step += 1

    @contextmanager
    def evaluation_mode(self) -> Iterator[None]:
        """For the block, the weights that an optimizer with `eval()` (a schedule-free one) trains for, where those that
        it takes gradients at are others. Then these are back, to the bit."""
        if not hasattr(self.optimizer.optimizer, "eval"):
            yield
            return
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        kept = [parameter.detach().clone() for parameter in parameters]
        self.optimizer.eval()
        try:
            yield
        finally:
            self.optimizer.train()
            with torch.no_grad():
                for parameter, values in zip(parameters, kept, strict=True):
                    parameter.copy_(values)

    def is_due(self, every: int) -> bool:
        """Whether what comes every so many steps comes now; at the last step it does. 0: never."""
        return every > 0 and (self.step % every == 0 or self.is_finished)

    @property
    def is_finished(self) -> bool:
        """Whether this was the last step."""
        return self.step >= self.config.max_steps

    # ── Checkpoints ──────────────────────────────────────────────────────────────────────────────────────────
    def save(self, required: bool = False) -> None:
        """Write a checkpoint of this step, unless it is there. Raises RunError if that fails and is `required`."""
        self.finish_saving()  # if it fails and is of this step, it is written again
        folder = Path(self.config.output_dir)
        if (folder / checkpoint_name(self.step)).exists():  # the same step of the same run
            return
        state = {"global_step": self.step, "skipped_steps": self.skipped_steps, "totals": self.totals.state()}
        state["flops"] = self.flops.state()
        of_optimizer: dict[str, torch.Tensor] = {}
        documents = self.record.files | {
            STATE_FILE: json.dumps(state, indent=2) + "\n",
            OPTIMIZER_FILE: json.dumps(to_json(self.optimizer.optimizer.state_dict(), of_optimizer)) + "\n",
        }
        in_background = self.config.save_in_background and not required
        parts = self._parts() | {OPTIMIZER: of_optimizer}
        self.saving = Checkpoint(self.accelerator, folder, self.step, documents, parts, in_background)
        if not in_background:
            self.finish_saving(required)

    def finish_saving(self, required: bool = False) -> None:
        """Wait for the checkpoint that is being written, if there is one."""
        saving, self.saving = self.saving, None
        if saving is not None:
            saving.finish(self.config.keep_checkpoints, required)

    def load(self, checkpoint: Path | None) -> None:
        """Go back to where a checkpoint was written; None: nothing to do.

        Raises:
            InputError: the folder is no checkpoint of these models, optimizer and averages.
        """
        if checkpoint is None:
            return
        with blame(f"train.resume_from: cannot load {checkpoint}", *LOAD_ERRORS):
            state = read_state(checkpoint)
            load_checkpoint(self.accelerator, checkpoint, self._parts())
            load_optimizer(self.optimizer.optimizer, checkpoint)
            self.step, self.skipped_steps = state["global_step"], state["skipped_steps"]
            self.totals.load_state(state["totals"])
            self.flops.load_state(state.get("flops"))
        self.accelerator.print(f"Resuming from {checkpoint} at step {self.step} of {self.config.max_steps}")

    def save_ema_snapshot(self) -> None:
        """Keep the power-function averages of this step, if there are any."""
        if "power_ema" not in self.averages:
            return
        names = list(trained_weights(self._plain("denoiser")))
        for sigma_rel, averages in self.averages["power_ema"].by_width.items():
            tensors = wholes(self.accelerator, dict(zip(names, averages, strict=True)))
            if self.accelerator.is_main_process:
                with go_on_without():
                    save_snapshot(Path(self.config.output_dir) / EMA_SNAPSHOTS, self.step, sigma_rel, tensors)

    def save_weights(self, logs: dict[str, Any]) -> None:
        """Keep the trained weights every `train.save_weights_every` steps, and as the best ones if `logs`, this step's
        line of metrics, which is written, have the best `train.keep_best` so far."""
        folder, metric, files = Path(self.config.output_dir), self.config.keep_best, {}
        if self.is_due(self.config.save_weights_every):
            files[f"step-{self.step:06d}.safetensors"] = {"step": self.step}
        if metric in logs and on_main_process(
            self.accelerator, partial(is_best, folder, self.step, metric, logs[metric])
        ):
            files[BEST_FILE] = {"step": self.step, "metric": metric, "value": logs[metric]}
        for name, about in files.items():
            of = about.get("metric", "")
            is_raw = of.startswith("validation_") and not of.endswith("_ema")
            ema = None if is_raw else self.averages.get("ema")  # what the metric is of
            with self.evaluation_mode():
                weights = named_weights({part: self._plain(part) for part in self.models}, ema)
                weights = wholes(self.accelerator, weights)
                if self.accelerator.is_main_process:
                    with go_on_without():
                        save_weights(folder / WEIGHTS / name, weights, about | {"weights": "ema" if ema else "raw"})

    def _plain(self, name: str) -> torch.nn.Module:
        return self.accelerator.unwrap_model(self.models[name])

    def _parts(self) -> dict[str, dict[str, torch.Tensor]]:
        """The tensors themselves of models and averages."""
        averages = {name: average.state_tensors() for name, average in self.averages.items()}
        return {name: saved_state(self._plain(name)) for name in self.models} | averages
