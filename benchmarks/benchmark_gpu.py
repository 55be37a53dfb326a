"""How fast train_text_to_image.py trains a UNet of Stable Diffusion 1.5's size on one GPU, and what each option gives.

    PYTHONPATH=. OMP_NUM_THREADS=1 python benchmarks/benchmark_gpu.py --output gpu.json [--minutes 9] [--batch 32]
        [--profile profile.txt] [--only reference baseline ...] [--folder FOLDER]
    PYTHONPATH=. OMP_NUM_THREADS=1 python benchmarks/benchmark_gpu.py --tiny --output tiny.json    # on a CPU, to try it

Builds a checkpoint of Stable Diffusion 1.5's shapes with random weights, and a folder of 512 px JPEGs: nothing is
downloaded. Then the loop in the manner of diffusers' example (benchmark_vs_reference_loop.py) and `main` of the script
take turns, a process each, as a GPU has memory for one: reference, baseline (all options off), the options one after
the other, each on top of those above it, and reference and baseline again. A row is the median of some blocks of steps,
after a block that warms up; what a loop does once (loading, digests, saving) does not count. An option that this
version does not have is skipped with a note; running out of memory or time is a note, too. The JSON is written after
each row.

MFU is forward and backward of the UNet alone (counted by torch's FlopCounterMode, without what checkpointing computes
twice) over the whole step's time, as a share of the GPU's dense bf16 peak. Options not listed here go to all rows.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import tempfile
import time
import traceback
from pathlib import Path
from statistics import median, quantiles

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # so that to ask for a GPU before a fork does not start CUDA

import torch
from benchmark_vs_reference_loop import reference_loop, script_loop
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from photos import write_photos
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import difftrain_utils.builtins.tiny_stable_diffusion
from difftrain_utils.config.command_line import parse_config
from difftrain_utils.config.text_to_image import TextToImageConfig
from difftrain_utils.errors import InputError, one_line
from difftrain_utils.families.diffusers_family import DiffusersFamily
from difftrain_utils.run.gpus import PEAK_TFLOPS

# The public configs of stable-diffusion-v1-5: what they say other than the defaults of diffusers
SD15 = {
    "unet": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    "vae": {
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
        "sample_size": 512,
    },
    "text_encoder": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "projection_dim": 768,
        "max_position_embeddings": 77,
    },
}
TINY = {
    "unet": {
        "sample_size": 16,
        "cross_attention_dim": 32,
        "attention_head_dim": 4,
        "block_out_channels": (16, 32),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 8,
    },
    "vae": {
        "block_out_channels": (8, 16, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "norm_num_groups": 8,
        "sample_size": 64,
    },
    "text_encoder": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "projection_dim": 32,
        "max_position_embeddings": 77,
    },
}
SCHEDULER = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "steps_offset": 1,
    "skip_prk_steps": True,
}
# (row, its options, whether the rows below have them, too: those that save memory and cost time stand alone)
OPTIONS = [
    ("tf32", "--train.tf32 true", True),
    ("channels_last", "--train.channels_last true", True),
    ("fused AdamW", "--optimizer.init_args.fused true", True),
    ("EMA every 10 steps", "--ema.update_every 10", True),
    ("vae_slicing", "--model.vae_slicing true", False),
    ("cached latents", "--data.center_crop true --data.cache_latents true", True),
    ("cached text", "--data.cache_text true", True),
    ("EMA on the CPU", "--ema.on_cpu true", False),
    ("gradient checkpointing", "--train.gradient_checkpointing true", False),
    ("compile regional", "--train.compile regional", True),
    ("compile whole", "--train.compile whole", True),
]


class Finished(Exception):
    """All blocks of a row are done."""


def build_modules(shapes: dict) -> dict[str, torch.nn.Module]:
    text_encoder = CLIPTextConfig(vocab_size=554, bos_token_id=552, eos_token_id=553, pad_token_id=553,
                                  **shapes["text_encoder"])  # fmt: skip
    return {
        "unet": UNet2DConditionModel(**shapes["unet"]),
        "vae": AutoencoderKL(**shapes["vae"]),
        "text_encoder": CLIPTextModel(text_encoder),
    }


def save_checkpoint(folder: Path, shapes: dict) -> None:
    """A diffusers checkpoint with random weights, and the builtin's small vocabulary (which decides no FLOPs)."""
    torch.manual_seed(0)
    tokenizer = Path(difftrain_utils.builtins.tiny_stable_diffusion.__file__).parent / "tokenizer"
    StableDiffusionPipeline(
        **build_modules(shapes),
        tokenizer=CLIPTokenizer.from_pretrained(tokenizer, model_max_length=77),
        scheduler=PNDMScheduler(**SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def count_flops(shapes: dict, resolution: int) -> dict[str, float]:
    """FLOPs of one sample: the UNet's forward and backward, and the forward of the VAE's encoder and of the text
    encoder. Nothing is computed (the meta device), and attention is counted as the products that define it."""
    width = resolution // 2 ** (len(shapes["vae"]["block_out_channels"]) - 1)
    with torch.device("meta"), sdpa_kernel(SDPBackend.MATH):
        modules = build_modules(shapes)
        states = torch.zeros(1, 77, shapes["unet"]["cross_attention_dim"])
        calls = {
            "unet": lambda: modules["unet"](torch.zeros(1, 4, width, width), torch.zeros(1), states).sample,
            "vae": lambda: modules["vae"].encode(torch.zeros(1, 3, resolution, resolution)),
            "text_encoder": lambda: modules["text_encoder"](torch.zeros(1, 77, dtype=torch.long)),
        }
        flops = {}
        for name, call in calls.items():
            with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(name == "unet"):
                output = call()
                if name == "unet":
                    output.sum().backward()
            flops[name] = float(counter.get_total_flops())
    return flops


def train_row(loop, argv, args, profile, connection):
    """In a process of its own: train, and send each block's seconds; at last None, or the reason for stopping."""
    multiprocessing.set_start_method("fork", force=True)  # the data loader's default, which other methods lose
    DiffusersFamily.digests = lambda family, denoiser: {}  # seconds of each start that no row is about
    on_gpu, num_blocks, profiler = torch.cuda.is_available(), 0, None
    start = time.perf_counter()

    def end_block(step, loss):
        nonlocal start, num_blocks, profiler
        if step % args.block:
            return
        if on_gpu:
            torch.cuda.synchronize()
        block = {"seconds": time.perf_counter() - start, "loss": float(loss)}
        if on_gpu:
            block["device"] = torch.cuda.get_device_name()
            block["peak_bytes"] = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        connection.send(block)
        num_blocks += 1
        if profiler is not None:
            profiler.stop()
            profile.write_text(describe_profile(profiler, " ".join(argv), block["seconds"], args.block))
            raise Finished
        if num_blocks == 1 + args.blocks:
            raise Finished
        if profile is not None and num_blocks == 2:  # the second block is the profiler's warm-up, too
            profiler = torch.profiler.profile()
            profiler.start()
        start = time.perf_counter()

    log = args.output.with_suffix(".log").open("a")
    with contextlib.redirect_stderr(log), contextlib.redirect_stdout(log):
        print(f"\n── {' '.join(argv)}", flush=True)
        try:
            loop(parse_config(TextToImageConfig, argv), end_block)
        except Finished:
            connection.send(None)
        except Exception as error:
            traceback.print_exc()
            text = f"{type(error).__name__}: {one_line(error)}"
            connection.send("out of memory" if "out of memory" in text else text[:200])


def describe_profile(profiler, command: str, seconds: float, num_steps: int) -> str:
    """The thirty kernels (on a CPU: operators) that take most of a step, as text."""
    on_gpu = torch.cuda.is_available()
    device, attribute = ("CUDA", "self_device_time_total") if on_gpu else ("CPU", "self_cpu_time_total")
    events = [e for e in profiler.key_averages() if e.device_type.name == device and not e.is_user_annotation]
    events.sort(key=lambda event: getattr(event, attribute), reverse=True)
    busy = sum(getattr(event, attribute) for event in events) / 1e6
    lines = [
        command,
        f"{num_steps} steps in {seconds:.3f} s (with the profiler), {device} busy for {busy:.3f} s",
        f"{'ms a step':>10} {'of busy':>8} {'a step':>8}  kernel",
    ]
    for event in events[:30]:
        micros = getattr(event, attribute)
        count = event.count / num_steps
        lines.append(f"{micros / 1e3 / num_steps:10.3f} {micros / 1e6 / busy:8.1%} {count:8.1f}  {event.key[:140]}")
    return "\n".join(lines) + "\n"


def refusal(argv: list[str]) -> str | None:
    """Why the script does not take these options; None if it does."""
    try:
        parse_config(TextToImageConfig, argv)
    except InputError as error:
        return str(error)


def use_gpu():
    if torch.cuda.is_available():
        torch.zeros(1, device="cuda")


def get_context():
    """Processes that fork from one that has imported all, which saves each the seconds of that; or, should an import
    have started CUDA there, that begin anew."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmark_vs_reference_loop"])
    process = context.Process(target=use_gpu)
    process.start()
    process.join()
    return context if process.exitcode == 0 else multiprocessing.get_context("spawn")


def run_row(context, loop, argv, args, limit, profile=None) -> tuple[list[dict], str | None]:
    """The blocks of a row, and why there are not all of them."""
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=train_row, args=(loop, argv, args, profile, sender))
    deadline, blocks, message = time.monotonic() + limit, [], {}
    process.start()
    sender.close()
    try:
        while isinstance(message, dict):
            if not receiver.poll(max(0.0, deadline - time.monotonic())):
                message = f"cut off after {limit:.0f} s"
            elif (message := receiver.recv()) and isinstance(message, dict):
                blocks.append(message)
    except EOFError:
        message = "died"
    process.join(15 if message is None else 1)
    if process.is_alive():
        process.kill()
        process.join()
        time.sleep(6)  # its data loaders look every 5 s whether it lives, and hold the GPU's memory until then
    return blocks, message


def summarise(row: dict, flops: dict, args) -> None:
    """The row's figures, from its blocks."""
    rates = [args.block * args.batch / block["seconds"] for run in row["runs"] for block in run[1:]]
    if not rates:
        return
    row["samples_per_second"] = median(rates)
    row["quartiles"] = quantiles(rates, n=4)[::2] if len(rates) > 1 else None
    row["seconds_of_a_step"] = args.batch / median(rates)
    row["seconds_to_warm"] = median(run[0]["seconds"] for run in row["runs"] if run)
    last = row["runs"][-1][-1]
    row["peak_gib"] = last["peak_bytes"] / 2**30 if "peak_bytes" in last else None
    row["device"] = last.get("device", "CPU")
    known = PEAK_TFLOPS.get(row["device"])
    peak = args.peak_tflops or (known and known[2 if args.precision == "fp32" else 0])
    row["mfu"] = flops["unet"] * row["samples_per_second"] / peak / 1e12 if peak else None


def table(rows: list[dict], flops: dict, args) -> str:
    reference = next((row.get("samples_per_second") for row in rows if row["name"] == "reference"), None)
    device = next((row["device"] for row in rows if "device" in row), "no device")

    def cell(value, text):
        return "–" if value is None else text.format(value)

    lines = [
        f"{device}, torch {torch.__version__}, {args.resolution} px, batch {args.batch}, {args.precision}, "
        f"{args.workers} workers; medians of blocks of {args.block} steps. FLOPs of a sample: "
        + ", ".join(f"{name} {value / 1e12:.3g} T" for name, value in flops.items()),
        "",
        "| row | samples/s (quartiles) | over reference | ms a step | MFU | peak GiB | s to warm up | |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        rate, quartiles = row.get("samples_per_second"), row.get("quartiles")
        seconds = row.get("seconds_of_a_step")
        values = [
            row["name"],
            cell(rate, "{:.1f}") + (" ({:.1f}, {:.1f})".format(*quartiles) if quartiles else ""),
            cell(rate and reference and rate / reference, "{:.2f}"),
            cell(seconds and 1e3 * seconds, "{:.0f}"),
            cell(row.get("mfu"), "{:.1%}"),
            cell(row.get("peak_gib"), "{:.1f}"),
            cell(row.get("seconds_to_warm"), "{:.0f}"),
            "; ".join(row["notes"]),
        ]
        lines.append("| " + " | ".join(values) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--output", type=Path, required=True, help="a JSON file; beside it the rows' output, as .log")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all rows together")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--workers", type=int, default=8, help="processes that load data")
    parser.add_argument("--block", type=int, default=5, help="steps at a time")
    parser.add_argument("--blocks", type=int, default=3, help="of a run, after one that warms up")
    parser.add_argument("--repeats", type=int, default=2, help="runs of reference and baseline, the last at the end")
    parser.add_argument("--only", nargs="*", metavar="ROW", help="these rows alone, e.g. 'cached text'")
    parser.add_argument("--profile", type=Path, help="write the kernels of the fastest row to this text file")
    parser.add_argument("--peak-tflops", type=float, help="of the GPU; known for " + ", ".join(PEAK_TFLOPS))
    parser.add_argument("--folder", type=Path, help="keep the checkpoint and the images here, for the next call")
    parser.add_argument("--tiny", action="store_true", help="small models, to try this script on a CPU")
    args, options = parser.parse_known_args()
    end = time.monotonic() + 60 * args.minutes
    if args.tiny:
        args.resolution, args.batch, args.workers, args.block = 64, 4, min(args.workers, 1), min(args.block, 2)
    shapes = TINY if args.tiny else SD15
    names = ["reference", "baseline", *(name for name, _, _ in OPTIONS)]
    if unknown := set(args.only or []) - set(names):
        parser.error(f"--only: no row {', '.join(sorted(unknown))}; there is {', '.join(names)}")
    chosen = [name for name in names if not args.only or name in args.only]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.with_suffix(".log").unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        os.environ["HF_DATASETS_CACHE"] = f"{folder}/cache"  # for the processes to come
        num_images = args.batch * args.block * (1 + args.blocks)  # one epoch: to start workers anew would count
        model, photos = folder / ("tiny" if args.tiny else "sd15"), folder / f"photos-{args.resolution}-{num_images}"
        if not model.exists():
            save_checkpoint(model, shapes)
        if not photos.exists():
            write_photos(photos, num_images, args.resolution)
        flops = count_flops(shapes, args.resolution)
        # fmt: off
        base = [
            "--model.pretrained_model_name_or_path", str(model), "--data.dataset", str(photos),
            "--data.resolution", str(args.resolution), "--data.num_workers", str(args.workers),
            "--train.output_dir", f"{folder}/run", "--train.overwrite", "true", "--train.max_steps", "1000000",
            "--train.batch_size", str(args.batch), "--train.precision", args.precision,
            "--train.log_every", str(args.block), "--train.eval_every", "0", "--train.save_every", "0",
            "--optimizer.init_args.lr", "1e-5",
        ]
        # fmt: on
        base += options
        context = get_context()
        rows, pair = {}, [("reference", "", False), ("baseline", "", False)]
        plan = [*pair * ((args.repeats + 1) // 2), *OPTIONS, *pair * (args.repeats // 2)]
        runs_left = sum(name in chosen for name, _, _ in plan) + bool(args.profile)

        def report():
            content = {"arguments": {k: str(v) for k, v in vars(args).items()}, "torch": torch.__version__}
            content |= {"flops_of_a_sample": flops, "rows": list(rows.values())}
            args.output.write_text(json.dumps(content, indent=2) + "\n")

        def add(name, argv):
            row = rows.setdefault(name, {"name": name, "argv": argv, "runs": [], "notes": []})
            left = end - time.monotonic()
            limit = min(left, 3 * left / runs_left)  # what a row does not need is for the others
            if reason := refusal(argv):
                note = f"skipped: {reason}"
            elif limit < 10:
                note = "no time left"
            else:
                loop = reference_loop if name == "reference" else script_loop
                blocks, note = run_row(context, loop, argv, args, limit)
                row["runs"].append(blocks)
                summarise(row, flops, args)
            row["notes"] += [note] if note else []
            rate = row.get("samples_per_second")
            print(f"{name}: {f'{rate:.1f} samples/s' if rate else ''} {note or ''}", flush=True)

        kept = {}  # field to value: a later row may change what an earlier one has set
        for name, overrides, keep in plan:
            is_option, words = (name, overrides, keep) not in pair, overrides.split()
            own = dict(zip(words[::2], words[1::2], strict=True))
            if name in chosen:
                add(name, base + [word for item in (kept | own if is_option else {}).items() for word in item])
                runs_left -= 1
                report()
            if keep and ("samples_per_second" in rows[name] if name in chosen else not refusal(base + words)):
                kept |= own
        ours = [row for row in rows.values() if row["name"] != "reference" and "samples_per_second" in row]
        if args.profile and ours and end - time.monotonic() > 10:
            best = max(ours, key=lambda row: row["samples_per_second"])
            _, note = run_row(context, script_loop, best["argv"], args, end - time.monotonic(), args.profile)
            print(f"profile of {best['name']}: {note or args.profile}")
        print("\n" + table(list(rows.values()), flops, args))


if __name__ == "__main__":
    main()
