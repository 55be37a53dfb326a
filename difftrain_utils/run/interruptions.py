"""Stopping early so that nothing is lost: signals and time limits become a checkpoint and an exit code."""

import signal
import time

import torch
from accelerate import Accelerator

from difftrain_utils.config.training import TrainConfig
from difftrain_utils.terminal import SIGNALS


class Interruptions:
    """As long as the block runs, SIGTERM, SIGINT, SIGUSR1 and SIGHUP wait for the end of a step; a second SIGINT stops
    at once.

    `poll` is asked after each step by all processes, and gives all of them the same answers: `stop`, the reason to stop
    now or None, and `save`, whether a checkpoint is due by the clock.
    """

    def __init__(self, accelerator: Accelerator, started: float, config: TrainConfig):
        """`started`: the `time.monotonic()` from which `train.max_hours` counts."""
        self.config, self.started, self.last_save = config, started, time.monotonic()
        self.received: list[int] = []
        self.stop: str | None = None
        self.save = False
        self.is_main = accelerator.is_main_process
        # beside the GPUs' own group, so that asking does not wait for them
        self.group = torch.distributed.new_group(backend="gloo") if accelerator.num_processes > 1 else None

    def __enter__(self) -> "Interruptions":
        caught = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # as nohup has SIGHUP
        self.handlers = {number: signal.signal(number, self._remember) for number in caught}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame) -> None:
        if number == signal.SIGINT and number in self.received:
            raise KeyboardInterrupt
        self.received.append(number)

    def poll(self) -> None:
        """Look whether to stop (a signal has come, `train.max_hours` are over) or to save (`train.save_minutes` are
        over since the last time)."""
        hours, minutes = (time.monotonic() - self.started) / 3600, (time.monotonic() - self.last_save) / 60
        number = max(self.received, default=0)
        too_long = self.is_main and self.config.max_hours is not None and hours >= self.config.max_hours
        save = self.is_main and self.config.save_minutes is not None and minutes >= self.config.save_minutes
        if self.group is not None:
            answers = torch.tensor([number, too_long, save])
            torch.distributed.all_reduce(answers, torch.distributed.ReduceOp.MAX, self.group)
            number, too_long, save = answers.tolist()
        self.save = bool(save)
        if number:
            self.stop = signal.Signals(number).name
        elif too_long:
            self.stop = f"train.max_hours {self.config.max_hours:g}"

    def saved(self) -> None:
        """A checkpoint was written: `train.save_minutes` begin anew."""
        self.last_save = time.monotonic()
