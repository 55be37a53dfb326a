"""The held-out rows that an evaluation looks at, as the processes share them out."""

from collections.abc import Iterator
from typing import Any

from accelerate import Accelerator

from difftrain_utils.config.config import Config
from difftrain_utils.data.rows import MappedRows
from difftrain_utils.data.samples import held_out_size, read_held_out
from difftrain_utils.processes import share_out
from difftrain_utils.terminal import progress


def held_out_batches(
    accelerator: Accelerator, rows: MappedRows, number: int, config: Config, what: str
) -> Iterator[tuple[list[int], int, dict[str, Any]]]:
    """This process's batches of `number` held-out samples, of which j is row j modulo their number: their numbers, how
    many of them, from the first on, are not another process's, too (`share_out`), and what `read_held_out` reads.

    A batch has one size, and all processes are at the same size at a time. `what` a progress bar says is done.
    """
    evaluation, of_size = config.evaluation, {}
    for key in range(number):
        of_size.setdefault(held_out_size(rows, key % len(rows), config.data), []).append(key)
    shares = [
        ([keys[i] for i in numbers], num_kept)
        for keys in of_size.values()
        for numbers, num_kept in share_out(accelerator, len(keys), evaluation.batch_size)
    ]
    for keys, num_kept in progress(shares, len(shares), what):
        yield keys, num_kept, read_held_out(rows, keys, config.data, evaluation.seed)
