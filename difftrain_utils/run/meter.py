"""How fast a run is, and what it waits for: times of its steps, share of waiting, memory, model FLOPs utilisation."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from accelerate import Accelerator
from torch.func import functional_call
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from difftrain_utils.config.training import TrainConfig
from difftrain_utils.devices import peak_memory
from difftrain_utils.errors import warn

# Dense TFLOP/s in (fp16 and bf16 with float32 sums, TF32, float32), by torch.cuda.get_device_name(). From NVIDIA's data
# sheets of H100, H200, A100, L40S and L4 (figures with sparsity halved), and its white papers of the Ada and the GA102
# architecture. The same name always means the same peak, unless somebody has lowered the power limit.
H100_SXM, H100_NVL, A100 = (989.4, 494.7, 66.9), (835.5, 417.5, 60.0), (312.0, 156.0, 19.5)
PEAK_TFLOPS = {
    "NVIDIA H200": H100_SXM,
    "NVIDIA H200 NVL": H100_NVL,
    "NVIDIA H100 80GB HBM3": H100_SXM,
    "NVIDIA H100 NVL": H100_NVL,
    "NVIDIA H100 PCIe": (756.0, 378.0, 51.2),
    **{f"NVIDIA A100{variant}": A100 for variant in ("-SXM4-40GB", "-SXM4-80GB", "-PCIE-40GB", " 80GB PCIe")},
    "NVIDIA L40S": (362.05, 183.0, 91.6),
    "NVIDIA L4": (121.0, 60.0, 30.3),
    "NVIDIA GeForce RTX 4090": (165.2, 82.6, 82.6),
    "NVIDIA GeForce RTX 3090": (71.0, 35.6, 35.6),
}


def peak_tflops(config: TrainConfig, accelerator: Accelerator) -> float | None:
    """The TFLOP/s that this device could do in the run's precision: `train.peak_tflops`, or of the table; None where
    neither says it."""
    if config.peak_tflops is not None or accelerator.device.type != "cuda":
        return config.peak_tflops
    peaks = PEAK_TFLOPS.get(torch.cuda.get_device_name(accelerator.device))
    return peaks and peaks[0 if accelerator.mixed_precision in ("bf16", "fp16") else 1 if config.tf32 else 2]


@torch.no_grad()
def training_flops(denoiser: torch.nn.Module, predict: Callable[..., Any], *inputs: Any) -> int:
    """FLOPs of forward and backward pass of `predict(denoiser, *inputs)`: matrix products, convolutions and attention.

    They are counted in a forward pass on the meta device, which computes nothing and draws nothing; the backward pass
    takes twice as many. What is computed once more (gradient checkpointing) or besides (VAE, text encoder, DREAM's
    probe) does not count.
    """

    def to_meta(value):
        return tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), value)

    state = to_meta({**dict(denoiser.named_parameters()), **dict(denoiser.named_buffers())})
    # eager: the counter sees torch's own operations only
    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
        predict(lambda *args, **kwargs: functional_call(denoiser, state, args, kwargs), *to_meta(inputs))
    return 3 * counter.get_total_flops()


class StepTimer:
    """Times of the steps between two lines of metrics, without what is done between steps (evaluating, saving).

    On a GPU a step's time is that between two events on its stream, so that nobody has to wait for it; elsewhere it is
    the wall clock's. What a process measures is its own; the main process's is logged.
    """

    def __init__(self, config: TrainConfig, accelerator: Accelerator):
        self.accelerator, self.batch_size, self.device = accelerator, config.batch_size, accelerator.device
        self.peak_tflops, self.flops_of_shape = peak_tflops(config, accelerator), {}
        self.started = None
        self._begin()

    def _begin(self) -> None:
        self.steps, self.waited, self.loop_time, self.flops = [], 0.0, 0.0, 0

    def batches(self, dataloader: Iterable) -> Iterator:
        """The batches of the loader, and the time that the loop waits for them. A step starts with its first batch."""
        batches = iter(dataloader)
        while True:
            start = time.perf_counter()
            if self.started is None:
                self.started = self._now(), start
            batch = next(batches, None)
            self.waited += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    def count_flops(self, denoiser: torch.nn.Module, predict: Callable, noisy_latents: torch.Tensor, *inputs) -> None:
        """Add the FLOPs of this part of a step, counted once for each shape; nothing where the peak is not known."""
        if self.peak_tflops is None:
            return
        shapes = str(tree_map_only(torch.Tensor, lambda tensor: tuple(tensor.shape), (noisy_latents, *inputs)))
        if shapes not in self.flops_of_shape:
            denoiser = self.accelerator.unwrap_model(denoiser)
            self.flops_of_shape[shapes] = training_flops(denoiser, predict, noisy_latents, *inputs)
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


PROFILE_WARMUP, PROFILE_STEPS = 3, 5  # steps: left out, and traced where `train.profile` is just true


class Profiler:
    """A trace of `train.profile` steps, after some to warm up, as `output_dir/profile/trace.json.gz`, for
    https://ui.perfetto.dev. It changes no numbers; with `train.profile` false it does nothing."""

    def __init__(self, config: TrainConfig, accelerator: Accelerator):
        self.path, self.profile = Path(config.output_dir) / "profile" / "trace.json.gz", None
        if config.profile and accelerator.is_main_process:
            steps = PROFILE_STEPS if config.profile is True else config.profile
            self.path.unlink(missing_ok=True)
            self.profile = torch.profiler.profile(
                schedule=torch.profiler.schedule(wait=0, warmup=PROFILE_WARMUP, active=steps, repeat=1),
                on_trace_ready=self._write,
                record_shapes=True,
                profile_memory=True,
            )
            self.profile.start()

    def step(self) -> None:
        """A step of the run has ended."""
        if self.profile is not None:
            self.profile.step()

    def end(self) -> None:
        """Write what there is if the run ended before the trace did."""
        if self.profile is not None:
            self.profile.stop()
            if not self.path.exists():
                warn(
                    f"train.profile: no trace, for the run ended within the first {PROFILE_WARMUP} steps, which warm up"
                )

    def _write(self, profile: torch.profiler.profile) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        profile.export_chrome_trace(str(self.path))
