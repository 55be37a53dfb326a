"""Which row of a stream sample k has, without reading what lies before it.

The files of a source stand in a line in an order drawn from (seed, epoch), and so do the units inside each file (row
groups of parquet, runs of a tar's members). By rows, the line is cut into equal lanes, and each batch takes the next
rows of each lane: those of lane c in the slots [c·m, (c+1)·m), m = batch size / lanes. In a lane, windows of
`data.shuffle_buffer` rows are shuffled. The rows at the end of the line that make no whole batch are left out of the
epoch, others in each. So a process that has the slots of some lanes reads the files of these lanes alone, and nothing
depends on how many processes there are.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from difftrain_utils.errors import InputError, warn
from difftrain_utils.keyed_random import generator_for

USUAL_LANES = 8
NOTABLE = 0.1  # part of a source's share by which the lanes may miss it without a word


@dataclass(eq=False)
class Window:
    """Rows of a lane that are shuffled among each other: of each its unit and its row in that. `ahead` are the units
    that the lane's next window has, in the order of the lane."""

    lane: int
    source: int
    units: np.ndarray
    rows: np.ndarray
    ahead: list[int]

    def __len__(self) -> int:
        return len(self.units)


class Place(NamedTuple):
    """What a stream calls a row by: a window and a position in it."""

    window: Window
    position: int


class Line:
    """The rows of one source in `lanes` lanes, of which each batch takes `per_batch` rows.

    `units_of[f]` is the number of units of file f, and `sizes` are the rows of all units, file after file. With `fixed`
    a lane keeps its files over the epochs, but for the rows that are left out, and the order of its files is drawn
    anew; a process that stays finds them in its cache.
    """

    def __init__(
        self,
        seed: int,
        name: str,
        units_of: np.ndarray,
        sizes: np.ndarray,
        lanes: int,
        per_batch: int,
        window: int,
        fixed: bool = False,
    ):
        self.seed, self.name, self.lanes, self.window, self.fixed = seed, name, lanes, window, fixed
        self.sizes = np.asarray(sizes, np.int64)
        self.first_unit = np.concatenate([[0], np.cumsum(units_of)])
        self.rows_of = np.diff(np.concatenate([[0], np.cumsum(self.sizes)])[self.first_unit])  # of each file
        self.num_rows = int(self.sizes.sum())
        self.length = self.num_rows // (lanes * per_batch) * per_batch  # of a lane in an epoch
        self.left_out = self.num_rows - self.length * lanes
        self._segments: dict[int, tuple[int, tuple[np.ndarray, ...]]] = {}  # of a lane, of one epoch at a time
        self._files: tuple[int | None, np.ndarray, np.ndarray] = (None, np.zeros(0), np.zeros(0))

    def span(self, lane: int, position: int) -> tuple[int, int, int, int]:
        """(epoch, first row, number of rows) of the window in which the lane's row `position` of all epochs lies, and
        its place in there. A window ends with the epoch.

        The first window of lane c is c/lanes shorter than others, so that not all lanes begin one in the same batch.
        """
        epoch, within = divmod(position, self.length)
        short = lane * self.window // self.lanes
        begin = (within + short) // self.window * self.window - short
        first, last = max(begin, 0), min(begin + self.window, self.length)
        return epoch, first, last - first, within - first

    def pieces(self, lane: int, epoch: int, first: int, count: int) -> Iterator[tuple[int, int, int]]:
        """(unit, first row in it, number of rows) of the rows [first, first + count) of a lane's epoch, in order."""
        files, lows, starts = self._segments_of(lane, epoch)
        last, segment = first + count, int(np.searchsorted(starts, first, "right")) - 1
        while first < last:
            stop, low = min(last, int(starts[segment + 1])), int(lows[segment])
            rows = int(starts[segment + 1] - starts[segment])
            is_whole = rows == self.rows_of[files[segment]]
            low += first - int(starts[segment])
            # a file that two lanes share is cut at the same row in each epoch that keeps it there
            yield from self._of_file(int(files[segment]), epoch if is_whole or not self.fixed else 0, low, stop - first)
            first, segment = stop, segment + 1

    def _of_file(self, file: int, epoch: int, low: int, count: int) -> Iterator[tuple[int, int, int]]:
        first, last = self.first_unit[file : file + 2]
        units = first + self._permutation(f"units of file {file}", epoch, int(last - first))
        starts = np.concatenate([[0], np.cumsum(self.sizes[units])])
        begin, end = np.searchsorted(starts, [low, low + count - 1], "right") - 1
        for i in range(int(begin), int(end) + 1):
            start = max(low, int(starts[i]))
            yield int(units[i]), start - int(starts[i]), min(low + count, int(starts[i + 1])) - start

    def _segments_of(self, lane: int, epoch: int) -> tuple[np.ndarray, ...]:
        """The files of a lane in their order, the first row that it has of each, and where each begins in the lane; and
        where the last ends."""
        if self._segments.get(lane, (None,))[0] != epoch:
            files, starts = self._files_of(0 if self.fixed else epoch)
            low = (lane * self.length + epoch * self.left_out) % self.num_rows  # so that each epoch leaves out others
            parts = []
            for begin, end in (
                (low, min(low + self.length, self.num_rows)),
                (0, max(low + self.length - self.num_rows, 0)),
            ):
                a, b = np.searchsorted(starts, [begin, end - 1], "right") - 1 if end > begin else (0, -1)
                cut = np.clip(starts[a : b + 2], begin, end)
                parts.append((files[a : b + 1], cut[:-1] - starts[a : b + 1], np.diff(cut)))
            of_lane, lows, counts = (np.concatenate(values) for values in zip(*parts, strict=True))
            if self.fixed:
                order = self._permutation(f"files of lane {lane}", epoch, len(of_lane))
                of_lane, lows, counts = of_lane[order], lows[order], counts[order]
            self._segments[lane] = epoch, (of_lane, lows, np.concatenate([[0], np.cumsum(counts)]))
        return self._segments[lane][1]

    def _files_of(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The files in their order, and where each begins in the line; and where the last ends."""
        if self._files[0] != epoch:
            files = self._permutation("files", epoch, len(self.rows_of))
            self._files = epoch, files, np.concatenate([[0], np.cumsum(self.rows_of[files])])
        return self._files[1:]

    def _permutation(self, what: str, key: int, length: int) -> np.ndarray:
        return generator_for(self.seed, f"{self.name} {what}", key).permutation(length)


class Lanes:
    """`lanes[k]` is the `Place` of the row that sample k has.

    Each of the `sources` is (units of each file, rows of each unit); they share the lanes by their weights, or else by
    their rows, as near as whole lanes come to it, and each has one at least.

    Raises:
        InputError: there are more sources than lanes, or one has fewer rows than it has slots of a batch.
    """

    def __init__(
        self,
        seed: int,
        sources: Sequence[tuple[np.ndarray, np.ndarray]],
        batch_size: int,
        lanes: int | None,
        window: int,
        weights: Sequence[float] | None = None,
        fixed: bool = False,
    ):
        self.seed, self.batch_size = seed, batch_size
        self.num_lanes = lanes or max(n for n in range(1, USUAL_LANES + 1) if batch_size % n == 0)
        self.per_batch = batch_size // self.num_lanes
        num_rows = [int(sizes.sum()) for _, sizes in sources]
        counts = share_lanes(self.num_lanes, weights or num_rows, is_weight=weights is not None)
        self.lines = [
            Line(seed, f"source {i}", *source, count, self.per_batch, window, fixed)
            for i, (source, count) in enumerate(zip(sources, counts, strict=True))
        ]
        for i, line in enumerate(self.lines):
            if line.length == 0:
                which = f"data.sources[{i}].dataset" if len(sources) > 1 else "data.dataset"
                raise InputError(
                    f"{which}: has {line.num_rows} rows, fewer than its {line.lanes * self.per_batch} of a batch "
                    f"(train.batch_size {batch_size}); a stream takes no row twice in one"
                )
        self.of_lane = [(i, lane) for i, count in enumerate(counts) for lane in range(count)]
        self.epoch_length = sum(num_rows) // batch_size * batch_size  # in samples; of several sources on the whole
        self._windows: dict[int, tuple[tuple[int, int], Window]] = {}  # of each lane the newest, and its span

    def __getitem__(self, k: int) -> Place:
        step, slot = divmod(k, self.batch_size)
        lane, i = divmod(slot, self.per_batch)
        source, lane_in = self.of_lane[lane]
        epoch, first, count, position = self.lines[source].span(lane_in, step * self.per_batch + i)
        held = self._windows.get(lane)
        if held is None or held[0] != (epoch, first):
            held = self._windows[lane] = (epoch, first), self._window(lane, epoch, first, count)
        return Place(held[1], position)

    def __getstate__(self):  # for the workers of a data loader where they are not forked
        return vars(self) | {"_windows": {}}

    def times_read(self, num_processes: int, num_parts: int, num_workers: int) -> float:
        """How often a row is read in an epoch, if each step's batch is split into so many parts, over so many processes
        and the workers of each: more than once where several of them have slots of one lane."""
        shares = num_processes * num_parts * num_workers
        readers = [set() for _ in range(self.num_lanes)]
        for i in range(shares):  # of one worker in each of the parts
            for slot in range(self.batch_size * i // shares, self.batch_size * (i + 1) // shares):
                readers[slot // self.per_batch].add(i % (num_processes * num_workers))
        return sum(map(len, readers)) / self.num_lanes

    def _window(self, lane: int, epoch: int, first: int, count: int) -> Window:
        source, lane_in = self.of_lane[lane]
        line = self.lines[source]
        pieces = list(line.pieces(lane_in, epoch, first, count))
        units = np.concatenate([np.full(rows, unit) for unit, _, rows in pieces])
        rows = np.concatenate([np.arange(low, low + rows) for _, low, rows in pieces])
        key = epoch * line.length + first
        order = generator_for(self.seed, f"window of lane {lane}", key).permutation(count)
        epoch, first, count, _ = line.span(lane_in, key + count)
        ahead = dict.fromkeys(unit for unit, *_ in line.pieces(lane_in, epoch, first, count))
        return Window(lane, source, units[order], rows[order], list(ahead))


def share_lanes(lanes: int, weights: Sequence[float], is_weight: bool = True) -> list[int]:
    """How many lanes each source has: one at least, and else as near to its share as whole lanes come; warns of a share
    that they miss by a tenth. Raises InputError if there are more sources than lanes."""
    if len(weights) > lanes:
        raise InputError(f"data.lanes: must be at least the {len(weights)} of data.sources, got {lanes}")
    shares = np.array(weights, float) / sum(weights) * lanes
    counts = np.maximum(np.floor(shares), 1).astype(int)
    while (missing := lanes - counts.sum()) != 0:
        distance = counts - shares
        i = np.argmin(distance) if missing > 0 else np.argmax(np.where(counts > 1, distance, -np.inf))
        counts[i] += np.sign(missing)
    for i, (share, count) in enumerate(zip(shares, counts, strict=True)):
        if abs(count - share) > NOTABLE * share:
            what = "weight: asks for" if is_weight else "dataset: its rows are"
            warn(
                f"data.sources[{i}].{what} {share / lanes:.1%} of the samples, and gets {count / lanes:.1%}, "
                f"{count} of {lanes} lanes (data.lanes)"
            )
    return counts.tolist()
