"""How a run goes, and how fast: its losses, times of its steps, share of waiting, memory, model FLOPs utilisation."""

import math
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from statistics import median
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils._pytree import tree_map_only
from tqdm import tqdm

from difftrain_utils.config.config import Config
from difftrain_utils.config.training import TrainConfig
from difftrain_utils.data.load import Data
from difftrain_utils.devices import peak_memory
from difftrain_utils.errors import warn
from difftrain_utils.run.flops import peak_tflops, training_flops
from difftrain_utils.run.state import TrainState
from difftrain_utils.run.time_limit import time_limit
from difftrain_utils.run.tracking import Metrics

BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
BUSY = 3  # times as long as the first steps


class Meter:
    """What is shown and logged of a run: times, losses, a progress bar (without a terminal a line for each line of
    metrics) and the lines of metrics."""

    def __init__(self, accelerator: Accelerator, state: TrainState, data: Data, config: Config):
        self.accelerator, self.state, self.config = accelerator, state, config
        self.samples_per_epoch, self.first_step_time = data.samples_per_epoch, None
        self.slow_lines, self.said_busy, self.of_steps = 0, False, set()
        self.metrics = Metrics(accelerator, config, state.step)
        self.timer, self.limit = StepTimer(accelerator, state.plain["denoiser"], config.train), ExitStack()

    def __enter__(self) -> "Meter":
        state, train = self.state, self.config.train
        self.has_bar = self.accelerator.is_main_process and sys.stderr.isatty()
        shape = {"bar_format": BAR, "dynamic_ncols": True, "disable": not self.has_bar}
        self.bar = tqdm(total=train.max_steps, initial=state.step, smoothing=0.05, mininterval=1, **shape)
        self.begun = state.step, time.monotonic()
        return self

    def __exit__(self, *error) -> None:
        self.limit.close()
        self.bar.close()
        self.metrics.close()

    def parts(self, batches: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The parts of the next step's batch. From here on the step has `train.step_minutes` to end."""
        minutes = self.config.train.step_minutes
        late = f"step {self.state.step + 1} has not ended after {minutes} minutes (train.step_minutes)"
        self.limit.enter_context(time_limit(minutes, late))
        for _ in range(self.config.train.gradient_accumulation_steps):
            batch = self.timer.next_batch(batches)
            with self.state.flops.part(batch, self.state.step):
                yield batch

    def count_flops(self, predict: partial, *inputs: torch.Tensor) -> None:
        """This part of a step trains what `predict(*inputs)` computes, a `partial` of the family's `predict(denoiser,
        …)` with the rest by name, such as `conditioning`."""
        with self.state.flops.paused():
            self.timer.count_flops(predict, *inputs)

    def end_step(self, grad_norm: torch.Tensor, lr: float) -> dict[str, Any]:
        """A step is done, its gradient had this norm before clipping, and it was made at this learning rate.

        Returns the line of metrics, every `train.log_every` steps and after the last: losses (means since the line
        before), lr, FLOPs so far, times; the norm if it is finite. Else nothing.
        """
        self.limit.close()
        self.timer.end_step()
        self.bar.update()
        if not self.state.is_due(self.config.train.log_every):
            return {}
        logs = self.state.totals.take() | {"lr": lr}
        if self.config.data.on_bad_row == "stop":
            del logs["skipped_rows"]
        if math.isfinite(norm := grad_norm.item()):
            logs["grad_norm"] = norm
        if self.state.skipped_steps:
            logs["skipped_steps"] = self.state.skipped_steps
        if self.state.flops.total is not None:
            logs["flops"] = self.state.flops.total
        logs |= self.timer.take()
        self._show(logs)
        self.of_steps = set(logs)
        return logs

    def _show(self, logs: dict[str, Any]) -> None:
        """Where the run is, for whoever looks on."""
        step, max_steps = self.state.step, self.config.train.max_steps
        shown = [f"epoch {step * self.config.train.batch_size / self.samples_per_epoch:.1f}"]
        shown += [f"loss {logs['loss']:.3g}"] if "loss" in logs else []  # none counted
        shown.append(f"{logs['samples_per_second']:.3g} samples/s")
        self.bar.set_postfix_str(", ".join(shown), refresh=False)
        if not self.has_bar:
            first, start = self.begun
            left = tqdm.format_interval((time.monotonic() - start) / (step - first) * (max_steps - step))
            self.accelerator.print(f"step {step}/{max_steps}, {', '.join(shown)}, {left} left", flush=True)
        self._notice_busy(logs["step_time_median"])

    def _notice_busy(self, step_time: float) -> None:
        """Say once that steps have become slow: two lines of metrics in a row, as one may be chance."""
        self.first_step_time = self.first_step_time or step_time
        self.slow_lines = self.slow_lines + 1 if step_time > BUSY * self.first_step_time else 0
        if self.slow_lines == 2 and not self.said_busy:
            self.said_busy = True
            warn(
                f"step {self.state.step}: steps take {step_time:.2g} s, the first ones took {self.first_step_time:.2g} "
                "s; is the machine busy with something else?"
            )

    def log(self, logs: dict[str, Any]) -> None:
        """Write a line of metrics for this step, if there is anything in it, and say what an evaluation found: of
        losses with and without EMA those with it, of those by noise level the whole."""
        if found := [
            f"{name} {value:.3g}"
            for name, value in logs.items()
            if name not in self.of_steps and f"{name}_ema" not in logs and isinstance(value, int | float)
        ]:
            with tqdm.external_write_mode():
                self.accelerator.print(f"step {self.state.step}: {', '.join(found)}", flush=True)
        if logs:
            self.metrics.log(self.state.step, logs)


class StepTimer:
    """Times of the steps between two lines of metrics, without what is done between steps (evaluating, saving).

    On a GPU a step's time is that between two events on its stream, so that nobody has to wait for it; elsewhere it is
    the wall clock's. What a process measures is its own; the main process's is logged.
    """

    def __init__(self, accelerator: Accelerator, denoiser: torch.nn.Module, config: TrainConfig):
        self.accelerator, self.denoiser, self.device = accelerator, denoiser, accelerator.device
        self.batch_size = config.batch_size
        self.peak_tflops, self.flops_of_shape = peak_tflops(accelerator, config), {}
        self.started = None
        self._begin()

    def _begin(self) -> None:
        self.steps, self.waited, self.loop_time, self.flops = [], 0.0, 0.0, 0

    def next_batch(self, batches: Iterator[dict[str, Any]]) -> dict[str, Any]:
        """The next of the batches, and the time that the loop waits for it. A step starts with its first one."""
        start = time.perf_counter()
        if self.started is None:
            self.started = self._now(), start
        batch = next(batches)
        self.waited += time.perf_counter() - start
        return batch

    def count_flops(self, predict: partial, *inputs: torch.Tensor) -> None:
        """Add the FLOPs of this part of a step, counted once for each shape; nothing where the peak is not known."""
        if self.peak_tflops is None:
            return
        given = (*inputs, predict.keywords)
        shapes = str(tree_map_only(torch.Tensor, lambda tensor: tuple(tensor.shape), given))
        if shapes not in self.flops_of_shape:
            flops = training_flops(self.denoiser, predict.func, *inputs, **predict.keywords)
            if flops is None:
                warn("mfu cannot be counted for this model with train.shard, and is left out")
                self.peak_tflops = None
                return
            self.flops_of_shape[shapes] = flops
        self.flops += self.flops_of_shape[shapes]

    def end_step(self) -> None:
        """An optimizer step is done; what the loop does until the next batch is asked for is not part of it."""
        start, wall_start = self.started
        self.steps.append((start, self._now()))
        self.loop_time += time.perf_counter() - wall_start
        self.started = None

    def take(self) -> dict[str, float]:
        """Samples per second, data_wait (share of the steps' time), step times in seconds, peak memory of the process
        or its GPU in 10⁹ bytes, and MFU where the peak is known; and begin anew."""
        times = sorted(self._seconds(*step) for step in self.steps)
        values = {
            "samples_per_second": len(times) * self.batch_size / sum(times),
            "data_wait": self.waited / self.loop_time,
            "step_time_median": median(times),
            "step_time_p95": times[math.ceil(0.95 * len(times)) - 1],
            "peak_memory_gb": peak_memory(self.device) / 1e9,
        }
        if self.peak_tflops is not None:
            values["mfu"] = self.flops / sum(times) / (self.peak_tflops * 1e12)
        self._begin()
        return values

    def _now(self):
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _seconds(self, start, end) -> float:
        if self.device.type != "cuda":
            return end - start
        end.synchronize()
        return start.elapsed_time(end) / 1e3
