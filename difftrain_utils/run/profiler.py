"""A trace of some steps."""

from pathlib import Path

import torch
from accelerate import Accelerator

from difftrain_utils.config.training import TrainConfig
from difftrain_utils.errors import go_on_without, warn, writing
from difftrain_utils.files import new_file
from difftrain_utils.run.run_folder import PROFILE

WARMUP_STEPS, TRACED_STEPS = 3, 5  # left out, and traced where `train.profile` is just true


class Profiler:
    """A trace of `train.profile` steps, after some to warm up, as `output_dir/profile/trace.json.gz`, for
    https://ui.perfetto.dev; written when it is complete or the block ends. It changes no numbers; with `train.profile`
    false it does nothing."""

    def __init__(self, accelerator: Accelerator, config: TrainConfig):
        self.path, self.profile = Path(config.output_dir) / PROFILE / "trace.json.gz", None
        if config.profile and accelerator.is_main_process:
            steps = TRACED_STEPS if config.profile is True else config.profile
            self.profile = torch.profiler.profile(
                schedule=torch.profiler.schedule(wait=0, warmup=WARMUP_STEPS, active=steps, repeat=1),
                on_trace_ready=self._write,
                record_shapes=True,
                profile_memory=True,
            )

    def __enter__(self) -> "Profiler":
        if self.profile is not None:
            with writing(self.path):
                self.path.unlink(missing_ok=True)
            self.profile.start()
        return self

    def __exit__(self, *error) -> None:
        if self.profile is not None:
            self.profile.stop()
            if self.profile.step_num < WARMUP_STEPS:
                reason = f"the run ended within the first {WARMUP_STEPS} steps, which warm up"
                warn(f"train.profile: no trace, because {reason}")

    def step(self) -> None:
        """A step of the run has ended."""
        if self.profile is not None:
            self.profile.step()

    def _write(self, profile: torch.profiler.profile) -> None:
        with go_on_without(), new_file(self.path) as partial:
            packed = partial.with_name(f"{partial.name}.gz")  # by the name it knows what to pack
            try:
                profile.export_chrome_trace(str(packed))
                packed.replace(partial)
            finally:
                packed.unlink(missing_ok=True)
