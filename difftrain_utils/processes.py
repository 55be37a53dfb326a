"""What the processes of a run do one after another, or one for all, without waiting for one that has gone; and how a
file says which process it is of."""

import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from difftrain_utils.errors import DataError, InputError, RunError

T = TypeVar("T")


@contextmanager
def main_process_first(accelerator: Accelerator) -> Iterator[None]:
    """The main process runs the block before the others do; also if it fails there, as they most likely do then."""
    if not accelerator.is_main_process:
        accelerator.wait_for_everyone()
    failure = None
    try:
        yield
    except Exception as error:
        failure = error
    if accelerator.is_main_process:
        accelerator.wait_for_everyone()
    if failure is not None:
        raise failure


def on_main_process(accelerator: Accelerator, compute: Callable[[], T]) -> T:
    """What `compute` returns on the main process, for all. Its InputError or RunError is raised by all."""
    outcome = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = compute()
        except (InputError, RunError) as error:
            outcome[1] = error
    result, error = broadcast_object_list(outcome)
    if isinstance(error, DataError) and not accelerator.is_main_process:
        error = InputError(str(error))  # which the main process alone reports
    if error is not None:
        raise error
    return result


def gather_on_main(accelerator: Accelerator, value: T) -> list[T]:
    """The values of all processes, in their order, on the main process; none on the others."""
    if accelerator.num_processes == 1:
        return [value]
    values = [None] * accelerator.num_processes if accelerator.is_main_process else None
    torch.distributed.gather_object(value, values)
    return values or []


def largest_of_all(*numbers: int, device: torch.device | str) -> list[int]:
    """Each number as the process with the largest has it."""
    values = torch.tensor(numbers, device=device)
    torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX)
    return values.tolist()


def share_out(accelerator: Accelerator, number: int, batch_size: int) -> list[tuple[list[int], int]]:
    """The batches of this process's share of `number` things: their numbers, and how many of these count. Each process
    has batches of the same sizes, because all take part in each forward pass of a model whose weights are shared out;
    where there are not as many things, the last one fills up, and what is made for it then is to be dropped."""
    processes = accelerator.num_processes
    mine = range(accelerator.process_index, -(-number // processes) * processes, processes)
    batches = [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]
    return [([min(i, number - 1) for i in batch], sum(i < number for i in batch)) for batch in batches]


def this_process() -> dict[str, Any]:
    """What a file says of the process that it is of: "host", "pid", "started" in seconds and "since" in words."""
    started = psutil.Process().create_time()
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(started))
    return {"host": platform.node(), "pid": os.getpid(), "started": started, "since": since}


def read_process(path: Path) -> dict[str, Any]:
    """What `this_process` has said in a file, as JSON; {}: it says nothing."""
    try:
        owner = json.loads(path.read_text())
        return owner if owner.keys() >= {"host", "pid", "started", "since"} else {}
    except (OSError, ValueError, AttributeError):
        return {}


def is_gone(process: dict[str, Any]) -> bool:
    """Whether a process of this host is no more, or another has its number now. Of other hosts nobody knows."""
    if process.get("host") != platform.node():
        return False
    try:
        return abs(psutil.Process(process["pid"]).create_time() - process["started"]) >= 1
    except psutil.Error:
        return True
