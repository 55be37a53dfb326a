"""Stopping early so that nothing is lost: signals and time limits become a checkpoint and an exit code."""

import signal
import time

import torch
from accelerate import Accelerator

from difftrain_utils.config.training import TrainConfig

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: the same command, run again, goes on
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Interruptions:
    """From its creation on, SIGTERM, SIGINT and SIGUSR1 wait for the end of a step; a second SIGINT stops at once.

    `poll` is asked after each step by all processes, and gives all of them the same answer.
    """

    def __init__(self, config: TrainConfig, accelerator: Accelerator, started: float):
        """`started`: the `time.monotonic()` from which `train.max_hours` counts."""
        self.config, self.started, self.last_save = config, started, time.monotonic()
        self.received: list[int] = []
        self.is_main = accelerator.is_main_process
        # beside the GPUs' own group, so that asking does not wait for them
        self.group = torch.distributed.new_group(backend="gloo") if accelerator.num_processes > 1 else None
        self.handlers = {number: signal.signal(number, self._remember) for number in SIGNALS}

    def _remember(self, number: int, frame) -> None:
        if number == signal.SIGINT and number in self.received:
            raise KeyboardInterrupt
        self.received.append(number)

    def poll(self) -> tuple[str | None, bool]:
        """(why to stop now or None, whether `train.save_minutes` are over)."""
        hours, minutes = (time.monotonic() - self.started) / 3600, (time.monotonic() - self.last_save) / 60
        number = max(self.received, default=0)
        too_long = self.is_main and self.config.max_hours is not None and hours >= self.config.max_hours
        save = self.is_main and self.config.save_minutes is not None and minutes >= self.config.save_minutes
        if self.group is not None:
            answers = torch.tensor([number, too_long, save])
            torch.distributed.all_reduce(answers, torch.distributed.ReduceOp.MAX, self.group)
            number, too_long, save = answers.tolist()
        if number:
            return signal.Signals(number).name, bool(save)
        return f"train.max_hours {self.config.max_hours:g}" if too_long else None, bool(save)

    def saved(self) -> None:
        """A checkpoint was written: `train.save_minutes` begin anew."""
        self.last_save = time.monotonic()

    def end(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
