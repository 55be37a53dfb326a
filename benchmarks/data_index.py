"""What a million rows cost: seconds to open them and to the first batch, and memory of all processes together.

    python benchmarks/data_index.py [--rows 1000000] [--workers 4] [--folder FOLDER]

Writes a data set in Arrow (tiny images, all with the same bytes, and a caption each), opens and splits it as a run
does, reads batches of `Samples` with a DataLoader of several workers, and exits with 1 if the proportional set sizes
(PSS, of /proc/*/smaps_rollup) of parent and workers together come above 1.5 GB. --digests also times image sizes and
fingerprint, without and with their cache.
"""

import argparse
import dataclasses
import io
import os
import sys
import tempfile
import time
from pathlib import Path

import datasets
import pyarrow as pa
import torch
from PIL import Image

from difftrain_utils.config.data import DataConfig
from difftrain_utils.data.load import Data
from difftrain_utils.data.rows import map_rows, split_rows
from difftrain_utils.data.samples import Samples, collate
from difftrain_utils.data.sizes import image_sizes

LIMIT = 1.5e9
parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--rows", type=int, default=1_000_000)
parser.add_argument("--workers", type=int, default=4)
parser.add_argument("--batches", type=int, default=50)
parser.add_argument("--folder", type=Path, help="where to write about 0.3 GB (default: a temporary folder)")
parser.add_argument("--digests", action="store_true", help="time image sizes and fingerprint, too")
args = parser.parse_args()


def write_rows(folder: Path, rows: int, batch: int = 100_000) -> None:
    """What `Dataset.save_to_disk` writes, without a Python object for each row."""
    buffer = io.BytesIO()
    Image.new("RGB", (64, 48), "teal").save(buffer, "PNG")
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_dict({"image": [None], "text": [""]}, features=features).save_to_disk(folder)
    with pa.ipc.new_stream(str(next(folder.glob("*.arrow"))), features.arrow_schema) as writer:
        for start in range(0, rows, batch):
            numbers = range(start, min(start + batch, rows))
            content = pa.array([buffer.getvalue()]).take(pa.array([0] * len(numbers)))
            paths = pa.array([f"{i:08d}.png" for i in numbers])
            images = pa.StructArray.from_arrays([content, paths], ["bytes", "path"])
            captions = pa.array([f"a teal rectangle, number {i}" for i in numbers])
            writer.write_table(pa.table({"image": images, "text": captions}, features.arrow_schema))


def memory(pids: list[int]) -> float:
    """Their proportional set sizes in bytes: a page that several share counts once."""
    total = 0
    for pid in pids:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        total += 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total


def timed(name: str, function, *arguments):
    start = time.perf_counter()
    result = function(*arguments)
    print(f"{name:36} {time.perf_counter() - start:8.2f} s   {memory([os.getpid()]) / 1e6:8.0f} MB", flush=True)
    return result


with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
    data_folder = Path(temporary) / "data"
    timed("write (not counted)", write_rows, data_folder, args.rows)
    config = DataConfig(str(data_folder), resolution=32, cache_dir=str(Path(temporary) / "cache"))
    rows = timed("open", map_rows, config)
    assert len(rows) == args.rows
    training, _ = timed("split", split_rows, rows, dataclasses.replace(config, validation_split=0.01))
    if args.digests:
        for what in ("first time", "second time"):
            timed(f"image sizes, {what}", image_sizes, training, config)
            timed(f"fingerprint, {what}", training.inspect, config)
    samples = Samples(Data(training, training.order(0, 64)), config, 0, 64 * args.batches)
    loader = torch.utils.data.DataLoader(samples, batch_size=64, collate_fn=collate, num_workers=args.workers)
    batches = iter(loader)
    timed("first batch", next, batches)
    pids, peak = [os.getpid(), *(worker.pid for worker in batches._workers)], 0.0
    while True:
        peak = max(peak, memory(pids))
        try:
            next(batches)
        except StopIteration:
            break
print(f"peak memory of {len(pids)} processes: {peak / 1e9:.2f} GB (limit {LIMIT / 1e9:.1f} GB)")
sys.exit(peak > LIMIT)
