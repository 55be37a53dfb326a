"""What gpu_lane.sh runs: each part as processes of its own, with a time limit; a part that fails does not stop the
others.

PYTHONPATH=. python benchmarks/gpu_lane.py --output gpu_lane [--minutes 9] [--dry-run]
"""

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from difftrain_utils.run.metrics import TIMES, read_metrics

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "train_text_to_image.py"
SPEED_SHARE = 0.45  # of the time


def describe_hardware() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__, "cpus": str(os.cpu_count())}
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        found |= {"gpu": f"{torch.cuda.get_device_name()}, {memory:.0f} GiB", "cuda": torch.version.cuda}
        query = ["nvidia-smi", "--query-gpu=driver_version,power.limit,clocks.max.sm", "--format=csv,noheader"]
        if shutil.which(query[0]):
            found["driver, power limit, clock"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    return found


class Lane:
    """Runs commands until the time is over, and keeps what they said in OUTPUT/log.txt."""

    def __init__(self, output: Path, minutes: float):
        self.output, self.end, self.parts = output, time.monotonic() + 60 * minutes, {}
        (output / "log.txt").unlink(missing_ok=True)

    def left(self) -> float:
        return self.end - time.monotonic()

    def run(self, command: list[str], limit: float) -> tuple[int | str, float, str]:
        """(exit code or what went wrong, seconds, the end of what was printed)."""
        limit, start = min(limit, self.left() - 5), time.monotonic()
        if limit < 5:
            return "no time left", 0.0, ""
        try:
            done = subprocess.run(
                command, cwd=ROOT, text=True, timeout=limit, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
            code, printed = done.returncode, done.stdout
        except subprocess.TimeoutExpired as error:
            code, printed = f"cut off after {limit:.0f} s", (error.stdout or b"").decode(errors="replace")
        with (self.output / "log.txt").open("a") as file:
            file.write(f"── {' '.join(map(str, command))}\n{printed}\n── {code}\n\n")
        return code, time.monotonic() - start, printed

    def train(self, name: str, *options: str, limit: float = 60) -> tuple[Path | None, str, float]:
        """(the run's folder, None if it failed; what went wrong; seconds)."""
        folder = self.output / "runs" / name
        command = [sys.executable, str(SCRIPT), *options, "--output-dir", str(folder), "--train.overwrite", "true"]
        code, seconds, printed = self.run([c for c in command if c], limit)
        if code == 0:
            return folder, "", seconds
        errors = [line for line in printed.splitlines() if line.startswith("error: ")]
        return None, (errors or [str(code)])[-1], seconds


def trace_of(folder: Path) -> str:
    """A digest of the metrics without times, and of the pipeline's weights."""
    lines = [
        {name: value for name, value in line.items() if name not in TIMES}
        for line in read_metrics(folder / "metrics.jsonl")
    ]
    digest = hashlib.sha256(json.dumps(lines).encode())
    for path in sorted((folder / "pipeline").rglob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def check_tests(lane: Lane) -> dict:
    code, seconds, printed = lane.run([sys.executable, "-m", "pytest", "-m", "cuda", "-n", "0", "-q", "tests"], 150)
    lines = [line for line in printed.splitlines() if " passed" in line or " failed" in line or " skipped" in line]
    said = lines[-1].strip("= ") if lines else str(code)
    failed = [line for line in printed.splitlines() if line.startswith("FAILED")]
    return {"result": said, "passed": code == 0, "failed": failed, "seconds": seconds}


def check_quickstart(lane: Lane, steps: int) -> dict:
    options = [
        "--config",
        "configs/quickstart.yaml",
        "--train.max_steps",
        str(steps),
        "--train.plain_attention",
        "false",
    ]
    options += ["--train.eval_every", str(steps), "--train.save_every", "0"]
    folder, wrong, seconds = lane.train("quickstart", *options, limit=150)
    if folder is None:
        return {"result": wrong, "passed": False, "seconds": seconds}
    last = read_metrics(folder / "metrics.jsonl")[-1]
    names = ("loss", "validation_loss_ema", "shapes_right", "samples_per_second", "step_time_median", "peak_memory_gb")
    shutil.copytree(folder / "samples", lane.output / "quickstart", dirs_exist_ok=True)
    return {"result": "ran to its end", "seconds": seconds} | {name: last[name] for name in names if name in last}


def check_exactness(lane: Lane, steps: int) -> dict:
    """Each setting once whole, once more or resumed from the middle: the same metrics and weights to the bit."""
    half = str(steps // 2)
    common = ["--config", "configs/quickstart.yaml", "--train.max_steps", str(steps), "--train.log_every", "5"]
    common += ["--train.eval_every", "0", "--train.save_every", half, "--train.keep_checkpoints", "0"]
    common += ["--train.plain_attention", "false", "--train.deterministic", "true"]
    settings = {
        "fp32": ["--train.precision", "fp32"],
        "bf16": ["--train.precision", "bf16"],
        "fp16": ["--train.precision", "fp16"],
        "compile regional, bf16": ["--train.precision", "bf16", "--train.compile", "regional"],
    }
    if not torch.cuda.is_available():  # a dry run: a CPU has no fp16
        del settings["fp16"]
    found = {"passed": True}
    for name, options in settings.items():
        slug = name.replace(", ", "-").replace(" ", "-")
        whole, wrong, _ = lane.train(slug, *common, *options, limit=90)
        if whole is None:
            found |= {name: wrong, "passed": False}
            continue
        branch = lane.output / "runs" / f"{slug}-resumed"
        shutil.rmtree(branch, ignore_errors=True)
        resume = [*common, *options, "--resume-from", str(whole / f"checkpoint-{half}"), "--output-dir", str(branch)]
        code, _, _ = lane.run([sys.executable, str(SCRIPT), *resume], 90)
        if code != 0:
            found |= {name: f"resumed: {code}", "passed": False}
            continue
        weights = [
            {path.name: path.read_bytes() for path in (run / "pipeline/unet").glob("*.safetensors")}
            for run in (whole, branch)
        ]
        found[name] = {"resumed the same": weights[0] == weights[1]}
        if name == "fp32":
            again, wrong, _ = lane.train("fp32-again", *common, *options, limit=90)
            found[name]["twice the same"] = again is not None and trace_of(again) == trace_of(whole)
            found[name] |= {"the second": wrong} if wrong else {}
        if name == "fp16":
            found[name]["skipped steps"] = read_metrics(whole / "metrics.jsonl")[-1].get("skipped_steps", 0)
    return found


def measure_speed(lane: Lane, minutes: float, is_dry: bool) -> dict:
    """The table of benchmark_gpu.py, in this time, and the profile of its best row."""
    report, profile = lane.output / "benchmark_gpu.json", lane.output / "profile.txt"
    command = [sys.executable, "benchmarks/benchmark_gpu.py", "--output", str(report), "--profile", str(profile)]
    command += ["--minutes", f"{minutes:.2f}", "--repeats", "1", "--blocks", "1" if is_dry else "2"]
    command += ["--tiny"] if is_dry else []
    code, seconds, printed = lane.run(command, 60 * minutes + 15)
    table = [line for line in printed.splitlines() if line.startswith("| ")]
    found = {"result": "ran to its end" if code == 0 else str(code), "passed": code == 0, "seconds": seconds}
    found["table"] = table
    if profile.exists():
        found["profile"] = profile.read_text().splitlines()[:20]
    return found


def passed(part: dict) -> bool:
    """Whether a part ran to its end, and each setting of exactness came out the same."""
    of_settings = [value for setting in part.values() if isinstance(setting, dict) for value in setting.values()]
    return part.get("passed", True) and not any(value is False for value in of_settings)


def as_markdown(content: dict) -> str:
    lines = ["# One GPU", "", *(f"- {name}: {value}" for name, value in content["hardware"].items()), ""]
    for name in ("tests", "exactness", "quickstart"):
        lines += [f"## {name.capitalize()}", ""]
        lines += [f"- {key}: {value:.4g}" if isinstance(value, float) else f"- {key}: {value}"
                  for key, value in content.get(name, {"result": "not run"}).items()]  # fmt: skip
        lines += [""]
    speed = content.get("speed", {"result": "not run", "table": []})
    lines += ["## Speed", "", speed["result"], "", *speed["table"], ""]
    if "profile" in speed:
        lines += ["```", *speed["profile"], "```", ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=8.7, help="for all together")
    parser.add_argument("--dry-run", action="store_true", help="few steps of small models, to try this script on a CPU")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    lane, content = Lane(args.output, args.minutes), {"hardware": describe_hardware()}
    parts = {
        "tests": lambda: check_tests(lane),
        "speed": lambda: measure_speed(lane, SPEED_SHARE * args.minutes, args.dry_run),
        "exactness": lambda: check_exactness(lane, 10 if args.dry_run else 60),
        "quickstart": lambda: check_quickstart(lane, 20 if args.dry_run else 2000),
    }
    for name, part in parts.items():
        print(f"{name} …", flush=True)
        try:
            content[name] = part()
        except Exception as error:  # the other parts are worth their time all the same
            content[name] = {"result": f"{type(error).__name__}: {error}", "passed": False, "table": []}
        (args.output / "gpu_lane.json").write_text(json.dumps(content, indent=2) + "\n")
        (args.output / "gpu_lane.md").write_text(as_markdown(content))
    shutil.rmtree(args.output / "runs", ignore_errors=True)
    print((args.output / "gpu_lane.md").read_text())
    if failed := [name for name in parts if not passed(content[name])]:
        sys.exit(f"error: {', '.join(failed)} did not pass; {args.output / 'log.txt'} has what was printed")


if __name__ == "__main__":
    main()
