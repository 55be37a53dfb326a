"""What streaming costs: one sequence on 1, 2 and 4 processes with 0, 1 and 3 workers each, the bytes that are read over
those that are needed, how often a file's parts are asked for, and how soon a late step is found; and, of the index
alone, 1,024 processes over 10,000 files.

    python benchmarks/streaming.py

Makes 40 parquet files of 500 rows of noise, 20 kB each, in a temporary folder. The processes are real, one per rank.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import torch

from difftrain_utils.config.data import DataConfig
from difftrain_utils.config.model import ModelConfig
from difftrain_utils.config.text_to_image import TextToImageConfig
from difftrain_utils.config.training import TrainConfig
from difftrain_utils.data.lanes import Lanes
from difftrain_utils.data.remote import Reader
from difftrain_utils.data.samples import Samples, load_batches
from difftrain_utils.data.streaming import open_stream

FILES, ROWS, GROUP, BATCH, LANES, WINDOW = 40, 500, 50, 24, 12, 100


def write(folder: Path) -> None:
    chance, features = (
        np.random.default_rng(0),
        datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")}),
    )
    datasets.disable_progress_bars()
    for file in range(FILES):
        numbers = range(file * ROWS, (file + 1) * ROWS)
        columns = {
            "image": [{"bytes": chance.bytes(20_000), "path": f"{i}"} for i in numbers],
            "text": [str(i) for i in numbers],
        }
        datasets.Dataset.from_dict(columns, features).to_parquet(folder / f"{file:02d}.parquet", batch_size=GROUP)


class Captions(Samples):
    """The rows alone, without what an image takes; and what has been read so far."""

    def __getitem__(self, k: int) -> dict:
        caption = self.rows[self.order[k]].captions
        return {
            "key": k,
            "caption": caption,
            "weight": 1.0,
            "read": (torch.utils.data.get_worker_info() or self).id,
            "count": tuple(COUNTS),
        }

    id = 0


COUNTS = [0, 0]  # bytes and parts
READ = Reader.read


def counted(self: Reader, file, start: int, stop: int) -> bytes:
    COUNTS[0] += stop - start
    COUNTS[1] += 1
    return READ(self, file, start, stop)


def rank_of_many(folder: str, cache: str, rank: int, world: int, workers: int) -> None:
    """One process: prints its captions, batch by batch, and what it has read, as JSON."""
    data = DataConfig(
        folder,
        streaming=True,
        lanes=LANES,
        shuffle_buffer=WINDOW,
        cache_dir=cache,
        num_workers=workers,
        on_bad_row="skip",
    )
    config = TextToImageConfig(ModelConfig("none"), data, TrainConfig(batch_size=BATCH))
    rows = open_stream(data)
    order = rows.order(0, BATCH)
    start = time.perf_counter()
    order[10**6 * BATCH]
    found = time.perf_counter() - start
    Reader.read = counted
    samples = Captions(SimpleNamespace(rows=rows, order=order, buckets=None), data, 0, order.epoch_length)
    accelerator = SimpleNamespace(num_processes=world, process_index=rank, device=torch.device("cpu"))
    counts, batches = {}, []
    for batch in load_batches(accelerator, samples, SimpleNamespace(step=0), config):
        counts |= dict(zip(batch["read"], batch["count"], strict=True))
        batches.append(batch["captions"])
    print(
        json.dumps(
            {
                "batches": batches,
                "found": found,
                "bytes": sum(c[0] for c in counts.values()),
                "parts": sum(c[1] for c in counts.values()),
            }
        )
    )


def real(folder: Path) -> None:
    size = sum(path.stat().st_size for path in folder.glob("*.parquet"))
    for world in (1, 2, 4):
        for workers in (0, 1, 3):
            command = [sys.executable, __file__, "--rank", str(folder), str(folder.parent / "cache")]
            runs = [
                subprocess.Popen(
                    [*command, str(rank), str(world), str(workers)],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    text=True,
                )
                for rank in range(world)
            ]
            said = [json.loads(run.communicate()[0].splitlines()[-1]) for run in runs]
            sequence = [
                caption
                for parts in zip(*(one["batches"] for one in said), strict=True)
                for part in parts
                for caption in part
            ]
            digest = hashlib.sha256(json.dumps(sequence).encode()).hexdigest()[:8]
            read = ", ".join(f"{one['bytes'] / (size / world):.3f}" for one in said)
            parts, found = [one["parts"] for one in said], 1e3 * max(one["found"] for one in said)
            print(f"{world} processes, {workers} workers: {len(sequence)} samples {digest}, {len(set(sequence))} rows")
            print(f"    bytes read over needed {read}; reads {parts}; step 10^6 in {found:.2f} ms", flush=True)


def simulated() -> None:
    """10,000 files of 10 row groups of 50 to 150 rows; 1,024 processes on 128 machines, a lane each."""
    sizes, units_of = np.random.default_rng(0).integers(50, 151, 100_000), np.full(10_000, 10)
    for fixed in (False, True):
        lanes = Lanes(1, [(units_of, sizes)], 4096, 1024, 1000, fixed=fixed)
        lanes[0]
        start = time.perf_counter()
        lanes[10**6 * 4096]
        found, line, before = time.perf_counter() - start, lanes.lines[0], None
        for epoch in range(2):
            units = [{unit for unit, *_ in line.pieces(lane, epoch, 0, line.length)} for lane in range(1024)]
            files = [len({unit // 10 for unit in of_lane}) for of_lane in units]
            read = [sizes[list(of_lane)].sum() / line.length for of_lane in units]
            nodes = [set().union(*units[i : i + 8]) for i in range(0, 1024, 8)]
            hits = (
                sum(len(now & was) for now, was in zip(nodes, before, strict=True)) / sum(map(len, nodes))
                if before
                else 0
            )
            print(f"lanes_fixed {fixed}, epoch {epoch}: {np.mean(files):.1f} files a process (most {max(files)})")
            print(f"    rows read over needed {np.mean(read):.3f} (most {max(read):.3f})")
            print(f"    of a machine's units it had {hits:.1%} before")
            before = nodes
        print(f"lanes_fixed {fixed}: the first sample of step 10^6 in {1e3 * found:.2f} ms")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rank", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank:
        rank_of_many(*args.rank[:2], *map(int, args.rank[2:]))
    else:
        simulated()
        with tempfile.TemporaryDirectory() as temporary:
            (Path(temporary) / "rows").mkdir()
            write(Path(temporary) / "rows")
            real(Path(temporary) / "rows")
