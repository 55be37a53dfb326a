"""What loading data costs, how long a start takes, and whether a resume at a large step takes longer.

    PYTHONPATH=. OMP_NUM_THREADS=1 python benchmarks/data_loading.py [loader] [start] [resume] [--dataset photos]

loader: images/s of the loading path alone (rows, decoding, crop, batches; no model), for `--workers` of processes, from
a folder of JPEGs of `--image-size` trained on at `--resolution`, from parquet files of them as a stream, and from
caches of latents and prompts.
start: seconds from the start of the process to its first optimizer step, of the whole script with the quickstart's
model.
resume: the same from a checkpoint at step 10 and from one at step 1,000,000, in turns, and the ratio: a resume reads
nothing of what it has seen, so it must be 1. The second checkpoint is the first with other numbers of steps in it.
start and resume train on builtin:shapes, or with `--dataset photos` on `--num-images` JPEGs. All three without names.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median, quantiles

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp()  # datasets asks for it when it is imported

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from photos import write_photos
from safetensors.torch import load_file, save_file

from difftrain_utils.config.data import DataConfig
from difftrain_utils.data.caches import TextCache
from difftrain_utils.data.encoded import build_cache
from difftrain_utils.data.load import Data
from difftrain_utils.data.rows import map_rows
from difftrain_utils.data.samples import Samples, collate
from difftrain_utils.data.streaming import open_stream
from difftrain_utils.files import DIGESTS_FILE, sha256sums
from difftrain_utils.run.checkpoints import STATE_FILE

SCRIPT = Path(__file__).parent.parent / "train_text_to_image.py"
EARLY, LATE = 10, 1_000_000


# ── The loading path alone ───────────────────────────────────────────────────────────────────────────────────


def samples_of(rows, config: DataConfig, caches=None) -> Samples:
    return Samples(Data(rows, rows.order(0, 1)), config, 0, 1 << 40, caches)


def folder_samples(photos: Path, args) -> torch.utils.data.Dataset:
    config = DataConfig(str(photos), resolution=args.resolution, random_flip=True)
    return samples_of(map_rows(config), config)


def streamed_samples(photos: Path, args) -> torch.utils.data.Dataset:
    """The same images from parquet files of 64 rows."""
    folder = photos.with_name("parquet")
    if not folder.exists():
        folder.mkdir()
        data = datasets.load_dataset("imagefolder", data_dir=str(photos), split="train")
        data = data.cast_column("image", datasets.Image(decode=False)).map(embed, features=data.features)
        shards = -(-len(data) // 64)
        for i in range(shards):
            data.shard(shards, i).to_parquet(folder / f"{i:05d}.parquet")
    config = DataConfig(str(folder), resolution=args.resolution, random_flip=True, streaming=True, shuffle_buffer=64)
    return samples_of(open_stream(config), config)


def embed(row):
    return {"image": {"bytes": Path(row["image"]["path"]).read_bytes(), "path": Path(row["image"]["path"]).name}}


def cached_samples(photos: Path, args) -> torch.utils.data.Dataset:
    """Latents and prompts in Stable Diffusion 1.5's shapes, as they lie in the caches; of random numbers."""
    config = DataConfig(
        str(photos), resolution=args.resolution, random_flip=True, center_crop=True, caption_dropout=0.1
    )
    rows, side = map_rows(config), args.resolution // 8
    make = {
        "latents": lambda numbers: {
            "moments": torch.randn(len(numbers), 2, 2, 4, side, side),
            "sizes": torch.zeros(len(numbers), 2, 6, dtype=torch.long),
            "is_readable": torch.ones(len(numbers), dtype=torch.bool),
        },
        "text": lambda numbers: {"prompt_embeds": torch.randn(len(numbers), 77, 768)},
    }
    numbers, caches = np.arange(len(rows) + 1), {}
    for name, encode in make.items():
        groups = np.zeros(len(rows), np.int16)
        caches[name] = build_cache(Accelerator(cpu=True), photos.with_name(name), groups, numbers[:-1], encode, name, 0)
    caches["text"] = TextCache(caches["text"], numbers, numbers[:-1])
    return samples_of(rows, config, caches)


SOURCES = {"folder": folder_samples, "streaming": streamed_samples, "cached": cached_samples}


def loading_rate(samples: torch.utils.data.Dataset, num_workers: int, args) -> float:
    """Images/s of a data loader over `samples`, once its processes have started."""
    warm_up = 1 + num_workers  # batches; a process makes them in turn
    num_batches = warm_up + -(-args.num_timed // args.batch)
    dataloader = torch.utils.data.DataLoader(
        samples,
        sampler=range(num_batches * args.batch),
        batch_size=args.batch,
        collate_fn=collate,
        num_workers=num_workers,
    )
    for number, _ in enumerate(dataloader, start=1):
        if number == warm_up:
            start = time.perf_counter()
    return (num_batches - warm_up) * args.batch / (time.perf_counter() - start)


def measure_loader(folder: Path, args) -> None:
    torch.set_num_threads(1)
    print(f"images/s from JPEGs of {args.image_size} px at resolution {args.resolution}, batches of {args.batch}")
    for name, make in SOURCES.items():
        samples, rates = make(folder, args), {num_workers: [] for num_workers in args.workers}
        for _ in range(args.repeats):
            for num_workers in args.workers:
                rates[num_workers].append(loading_rate(samples, num_workers, args))
        for num_workers, values in rates.items():
            print(f"{name}, {num_workers} workers: {median(values):.0f} ({min(values):.0f} to {max(values):.0f})")


# ── The whole script, from the start of its process ──────────────────────────────────────────────────────────


def options_for(args, photos: Path, output_dir: Path) -> list[str]:
    # fmt: off
    options = [
        "--config", str(SCRIPT.parent / "configs/quickstart.yaml"), "--train.output_dir", str(output_dir),
        "--train.cpu_threads", "1", "--train.log_every", "1", "--train.eval_every", "0", "--train.save_every", "0",
    ]
    # fmt: on
    if args.dataset == "photos":
        options += ["--data.dataset", str(photos), "--evaluation.shapes_judge", "false"]
    return options


def seconds_to_step(step: int, options: list[str], output_dir: Path) -> float:
    """Run the script until it ends by itself; the seconds until `step` is in metrics.jsonl."""
    metrics, marker = output_dir / "metrics.jsonl", f'"step": {step},'
    command = [sys.executable, str(SCRIPT), *options, "--train.max_steps", str(step)]
    with tempfile.TemporaryFile("w+") as output:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=output, stderr=output)
        while not (metrics.exists() and marker in metrics.read_text()):
            if process.poll() is not None:
                output.seek(0)
                raise SystemExit(f"{' '.join(command)} came not to step {step}:\n{output.read()[-2000:]}")
            time.sleep(0.002)
        seconds = time.perf_counter() - start
        process.wait()
    return seconds


def measure_start(folder: Path, args) -> None:
    seconds = []
    for _ in range(args.repeats + 1):
        shutil.rmtree(args.output_dir, ignore_errors=True)
        seconds.append(seconds_to_step(1, options_for(args, folder, args.output_dir), args.output_dir))
    print(
        f"start to first step: {median(seconds[1:]):.2f} s (median of {args.repeats}; the first start {seconds[0]:.2f})"
    )


def measure_resume(folder: Path, args) -> None:
    output_dir, options = args.output_dir, options_for(args, folder, args.output_dir)
    shutil.rmtree(output_dir, ignore_errors=True)
    seconds_to_step(EARLY, options, output_dir)
    templates = {step: output_dir.with_name(f"at-{step}") for step in (EARLY, LATE)}
    for step, template in templates.items():
        shutil.copytree(output_dir, template)
        if step != EARLY:
            (template / f"checkpoint-{EARLY}").rename(template / f"checkpoint-{step}")
            move_to_step(template / f"checkpoint-{step}", step)
    seconds = {step: [] for step in templates}
    for _ in range(args.repeats + 1):
        for step, template in templates.items():
            shutil.rmtree(output_dir)
            shutil.copytree(template, output_dir)
            seconds[step].append(seconds_to_step(step + 1, [*options, "--resume-from", "latest"], output_dir))
    early, late = (values[1:] for values in seconds.values())
    for step, values in zip(seconds, (early, late), strict=True):
        print(f"resume at step {step:,}: {median(values):.2f} s (median of {args.repeats})")
    low, middle, high = quantiles([b / a for a, b in zip(early, late, strict=True)], n=4)
    print(
        f"late over early: {median(late) / median(early):.3f} (of pairs: {middle:.3f}, quartiles {low:.3f}, {high:.3f})"
    )


def move_to_step(checkpoint: Path, step: int) -> None:
    """Let a checkpoint say that it is of `step`, in all that holds a step, and sign it anew."""
    state = json.loads((checkpoint / STATE_FILE).read_text())
    (checkpoint / STATE_FILE).write_text(json.dumps(state | {"global_step": step}, indent=2) + "\n")
    scheduler = torch.load(checkpoint / "scheduler.bin", weights_only=True)
    scheduler |= {"last_epoch": step, "_step_count": step + 1}
    torch.save(scheduler, checkpoint / "scheduler.bin")
    optimizer = load_file(checkpoint / "optimizer.safetensors")
    for name, values in optimizer.items():
        if name.endswith(".step"):
            values.fill_(step)
    save_file(optimizer, checkpoint / "optimizer.safetensors")
    (checkpoint / DIGESTS_FILE).write_text(sha256sums(checkpoint))


def main() -> None:
    parts = {"loader": measure_loader, "start": measure_start, "resume": measure_resume}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(parts)} (default: all)")
    parser.add_argument("--dataset", choices=("shapes", "photos"), default="shapes", help="of start and resume")
    parser.add_argument("--num-images", type=int, default=512, help="in the folder of JPEGs")
    parser.add_argument("--image-size", type=int, default=512)
    parser.add_argument("--resolution", type=int, default=512, help="of loader, e.g. 256")
    parser.add_argument("--batch", type=int, default=16, help="of loader")
    parser.add_argument("--num-timed", type=int, default=256, help="images that loader times at a time")
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    if unknown := set(args.parts) - set(parts):
        parser.error(f"no part {', '.join(sorted(unknown))}; there is {', '.join(parts)}")
    folder = Path(os.environ["HF_DATASETS_CACHE"])
    args.output_dir, photos = folder / "run", folder / "photos"
    try:
        if args.dataset == "photos" or not args.parts or "loader" in args.parts:
            write_photos(photos, args.num_images, args.image_size)
        for name in args.parts or parts:
            parts[name](photos, args)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
