"""What the processes of a run do one after another, or one for all, without waiting for one that has gone."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

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
