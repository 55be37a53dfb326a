"""Run a run again, and say whether it comes out the same.

    difftrain reproduce runs/quickstart [--steps 100] [--output-dir runs/again]
    difftrain reproduce experiments.jsonl:3 [--rerun 2]

The second checks line 3 of a ledger: whether the folders of its runs still say the same, by their digests and verdicts;
and runs two of them again. Start it in the folder that the run was started in. Exit code 0: the same, to the bit or
within the tolerance; 1: another result, or the re-run failed; 2: the run cannot be run again. See
docs/reproducibility.md.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from difftrain_utils.commands import ledger
from difftrain_utils.commands.compare import Run, load_run, read_config
from difftrain_utils.commands.parser import Parser
from difftrain_utils.commands.repetition import (
    changes,
    checkpoint_digest,
    circumstances,
    compare_weights,
    deviations,
    likely_reasons,
    verdict,
)
from difftrain_utils.config.config import MIXED_PRECISION
from difftrain_utils.errors import InputError, RunError, blame
from difftrain_utils.keyed_random import STREAM_VERSION
from difftrain_utils.run.code import describe_git, describe_script
from difftrain_utils.run.manifest import describe_environment, describe_versions
from difftrain_utils.run.metrics import read_metrics
from difftrain_utils.run.run_folder import (
    CONFIG_FILE,
    ENVIRONMENT_FILE,
    MANIFEST_FILE,
    METRICS_FILE,
    PIPELINE,
    checkpoint_damage,
    checkpoint_name,
    list_checkpoints,
    read_mapping,
)
from difftrain_utils.terminal import printable

CHECKOUT = Path(__file__).resolve().parent.parent.parent


def say(text: str = "") -> None:
    """In order with what the re-run prints."""
    print(printable(text), flush=True)


# Known before the re-run starts
KNOWN_BEFORE = ("git", "stream", "processor", "cpu_capability", "versions.", "cuda", "cudnn", "package.")
NUMERIC_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUBLAS_WORKSPACE_CONFIG")


# ── What the run was ─────────────────────────────────────────────────────────────────────────────────────────
def origin(folder: Path, manifest: dict[str, Any]) -> Path | None:
    """The checkpoint of another run that this one branched off from; None for a run from the beginning.

    Raises:
        InputError: the checkpoint is gone or damaged.
    """
    first = manifest["segments"][0]
    if "resumed_from" not in first:
        return None
    checkpoint = Path(first["resumed_from"])
    if damage := checkpoint_damage(checkpoint) if checkpoint.is_dir() else "no such folder":
        raise InputError(
            f"{folder}: the run branched off at step {first['from_step']} from {checkpoint}, and can only be run again "
            f"from there: {damage}"
        )
    return checkpoint


def steps_to_compare(run: Run, manifest: dict[str, Any], steps: int | None) -> tuple[int | None, bool]:
    """(how many first steps to compare, None for the whole of a finished run; whether there are weights of then).

    Without an intact checkpoint of step `steps` there are only metrics, which end at the last line before.

    Raises:
        InputError: the run is not finished and `steps` is None, or there is nothing to compare up to `steps`.
    """
    final, first = manifest.get("final", {}).get("global_step"), manifest["segments"][0]["from_step"]
    logged, checkpoints = [entry["step"] for entry in run.metrics], dict(list_checkpoints(run.folder))
    reached = max([final or 0, *logged, *checkpoints])
    if steps is None and final is None:
        at = f"at step {reached} of {run.config['train.max_steps']}"
        raise InputError(f"{run.folder}: the run is not finished, it is {at}; --steps N compares its first N steps")
    if steps in (None, final):
        return None, True
    if not first < steps <= reached:
        raise InputError(f"--steps {steps}: must be from {first + 1} to {reached}, the steps that {run.folder} has")
    damage = (
        checkpoint_damage(checkpoints[steps]) if steps in checkpoints else f"{run.folder} has no checkpoint-{steps}"
    )
    if damage is None:
        return steps, True
    last = max((step for step in logged if step <= steps), default=None)
    if last is None:
        raise InputError(f"--steps {steps}: no line of metrics up to there, the first is that of step {logged[0]}")
    rounded = f"; rounded down to step {last}, the last line of metrics up to there" if last < steps else ""
    say(f"--steps {steps}: no weights to compare ({damage}){rounded}")
    return last, False


def describe_segments(segments: list[dict[str, Any]]) -> list[str]:
    """A line for each start of the run."""
    lines = []
    for number, segment in enumerate(segments, 1):
        end = f"{segment['to_step']} ({segment['reason']})" if "to_step" in segment else "no recorded end (killed)"
        differs = f"; other than at first: {', '.join(segment['differs'])}" if segment.get("differs") else ""
        start = f"{number}: {segment['started']} on {segment['host']}"
        lines.append(f"{start}, from step {segment['from_step']} to {end}{differs}")
    return lines


# ── The run again ────────────────────────────────────────────────────────────────────────────────────────────
def overrides(run: Run, manifest: dict[str, Any], checkpoint: Path | None, steps: int | None) -> dict[str, str]:
    """The fields of `train` that the re-run needs to have otherwise; none of them changes a number."""
    fields = {"resume_from": checkpoint or "null", "overwrite": "false", "max_hours": "null", "report_to": "null"}
    if run.config["train.precision"] is None:  # then accelerate said it
        fields["precision"] = {name: field for field, name in MIXED_PRECISION.items()}[manifest["mixed_precision"]]
    if steps is not None:  # max_steps has to stay, because the learning rate depends on it
        fields |= {"save_every": steps, "keep_checkpoints": 0}
    return {f"train.{name}": str(value) for name, value in fields.items()}


def why_not_to_trust(script: Path, manifest: dict[str, Any]) -> str | None:
    """A run's folder may be anybody's, and names the script that is run: None if that is a script of this checkout or
    folder, as it was then; else what it is."""
    if script.resolve().parent not in (CHECKOUT, Path.cwd().resolve()):
        return f"was made by {script.resolve()}, which is neither in this folder nor beside the package"
    if describe_script(script) != manifest.get("script_sha256"):
        return f"{script.name} is not what it was when the run was made"
    return None


def rerun_command(script: Path, config_file: Path, fields: dict[str, str], num_processes: int) -> list[str]:
    # torchrun reads no accelerate config: precision, device and number of processes are all that one would say
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}"]
    command = [sys.executable, *(launcher if num_processes > 1 else []), str(script), "--config", str(config_file)]
    return [*command, *(part for name, value in fields.items() for part in (f"--{name}", value))]


def rerun_environment(manifest: dict[str, Any], env: dict[str, Any]) -> dict[str, str]:
    """The variables of now, but for those that decide numbers: these are as they were then."""
    variables = {name: value for name, value in os.environ.items() if name not in NUMERIC_VARIABLES}
    variables["OMP_NUM_THREADS"] = str(env["cpu_threads"])  # where it was not set, torch had its default
    variables |= {name: env["environment"][name] for name in NUMERIC_VARIABLES if name in env["environment"]}
    return variables | ({"ACCELERATE_USE_CPU": "true"} if manifest["device"] == "cpu" else {})


def wait_for(path: Path, process: subprocess.Popen) -> bool:
    """Wait until there is `path`, or until the process ended without it (False)."""
    while not path.exists() and process.poll() is None:
        time.sleep(0.2)
    return path.exists()


def rerun(command: list[str], environment: dict[str, str], output_dir: Path, steps: int | None, on_start) -> None:
    """Run `command` to its end, or until it has saved `steps`; `on_start()` when the manifest is there.

    Raises:
        InputError, RunError: it was refused, or failed; it has said why.
    """
    process = subprocess.Popen(command, env=environment)
    try:
        if wait_for(output_dir / MANIFEST_FILE, process):
            on_start()
        saved = steps is not None and wait_for(output_dir / checkpoint_name(steps), process)
        if saved:
            say(f"\nThe re-run has saved {checkpoint_name(steps)}, all that is compared: stopping it")
            process.terminate()
        code = process.wait()
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
    if code == 2 and not output_dir.exists():
        raise InputError("the re-run was refused: see above")
    if code != 0 and not saved:
        raise RunError(f"the re-run ended with exit code {code}: see above; {output_dir} has what it left")
    if steps is not None and not saved:
        raise RunError(f"the re-run left no checkpoint-{steps} in {output_dir}")


def check_comparison(ledger_file: Path, number: int, rerun: int, trust: bool) -> int:
    """Whether a line of a ledger still holds, also after so many of its runs are run again."""
    line = ledger.read_line(ledger_file, number)
    found = ledger.deviations_from(line)
    report("Otherwise than in the ledger", found)
    verdicts = ", ".join(f"{name} {own['verdict']}" for name, own in line["settings"].items() if "verdict" in own)
    say(f"{'differs from' if found else 'the same as'} line {number} of {ledger_file}: {verdicts}")
    finished = [folder for folder, of_run in line["runs"].items() if "weights" in of_run]
    rerun = min(rerun, len(finished))
    codes = [
        main([finished[i * len(finished) // rerun], *(["--trust"] if trust else [])]) for i in range(rerun)
    ]  # spread over all
    return max([int(bool(found)), *codes])


def report(title: str, lines: list[str]) -> None:
    say("\n  ".join([f"{title}:", *lines]) if lines else f"{title}: none")


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="difftrain reproduce", description=__doc__)
    parser.add_argument("run", metavar="RUN_DIR", type=Path, help="output folder of a run, or LEDGER.jsonl:LINE")
    parser.add_argument("--steps", metavar="N", type=int, help="compare the first N steps only, then stop")
    parser.add_argument("--output-dir", metavar="NEW", type=Path, help="folder of the re-run (RUN_DIR-reproduced)")
    parser.add_argument("--rerun", metavar="N", type=int, help="of a ledger's line: run N of its runs again")
    parser.add_argument(
        "--trust", action="store_true", help="run the script also if it is not the one of here and then"
    )
    args = parser.parse_args(argv)

    if (place := ledger.place_in(str(args.run))) is not None:
        for name in ("steps", "output_dir"):
            if getattr(args, name) is not None:
                raise InputError(f"--{name.replace('_', '-')}: is of a run, and {args.run} is a line of a ledger")
        if args.rerun is not None and args.rerun < 1:
            raise InputError(f"--rerun: must be at least 1, got {args.rerun}")
        return check_comparison(*place, args.rerun or 0, args.trust)
    if args.rerun is not None:
        raise InputError(f"--rerun: is of a line of a ledger, and {args.run} is a run")
    run = load_run(args.run, args.run.name)
    manifest, env = (read_mapping(run.folder / name) for name in (MANIFEST_FILE, ENVIRONMENT_FILE))
    output_dir = args.output_dir or Path(f"{args.run if args.run.name else args.run.resolve()}-reproduced")
    empty_cache = tempfile.TemporaryDirectory(prefix="difftrain-")  # so that every byte of the data is read afresh
    with blame(f"{run.folder}: not the files of a run", KeyError, IndexError, TypeError, AttributeError):
        checkpoint = origin(run.folder, manifest)
        steps, has_weights = steps_to_compare(run, manifest, args.steps)
        then = circumstances(run.config, manifest, env)
        script, environment = Path(manifest["command"][0]), rerun_environment(manifest, env)
        fields = overrides(run, manifest, checkpoint, steps) | {"train.output_dir": str(output_dir)}
        fields["data.cache_dir"] = empty_cache.name
        command = rerun_command(script, run.folder / CONFIG_FILE, fields, manifest["num_processes"])
        history = describe_segments(manifest["segments"])
    if not script.is_file():
        raise InputError(f"{run.folder}: was made by {script}, which is not here; start in the folder that it is in")
    if (distrust := why_not_to_trust(script, manifest)) and not args.trust:
        raise InputError(f"{run.folder}: {distrust}; --trust runs it: {' '.join(command)}")
    if output_dir.exists():
        raise InputError(f"{output_dir}: already there; give another --output-dir for the re-run")

    in_one = f"{len(history)} segments, reproduced in one piece" if len(history) > 1 else "one segment"
    report(f"The run {run.folder} had {in_one}", history)
    git = describe_git(script.resolve(), run.config.get("train.record_diff", "full"))
    code_now = {"git": git, "versions": describe_versions(), "stream": STREAM_VERSION}
    now = circumstances({}, code_now, describe_environment())
    known = [{k: v for k, v in table.items() if k.startswith(KNOWN_BEFORE)} for table in (then, now)]
    before = changes(*known)
    report("Differences in code, hardware and versions", before)
    if now.get("git.dirty"):
        say("The working tree is not as committed now (git status); the content of untracked files is not recorded.")
    say(f"Running it again: {' '.join(command)}")

    def recorded() -> dict[str, Any]:
        config = read_config(output_dir) | {name: run.config.get(name) for name in fields}
        return circumstances(config, *(read_mapping(output_dir / name) for name in (MANIFEST_FILE, ENVIRONMENT_FILE)))

    def report_the_rest() -> None:
        rest = [line for line in changes(then, recorded()) if line not in before]
        say()  # below the progress bar
        report("Further differences (data, base model, config, device)", rest)

    with empty_cache:
        rerun(command, environment, output_dir, steps, report_the_rest)
    new_metrics = output_dir / METRICS_FILE
    metrics = [run.metrics, read_metrics(new_metrics) if new_metrics.exists() else []]
    folders, weights = [run.folder, output_dir], None
    if steps is None:
        what, name, part = f"{manifest['final']['global_step']} steps", "final weights", PIPELINE
        digests = [read_mapping(folder / MANIFEST_FILE)["final"]["weights"] for folder in folders]
    else:
        what, name, part = f"the first {steps} steps", f"weights of {checkpoint_name(steps)}", checkpoint_name(steps)
        metrics = [[entry for entry in lines if entry["step"] <= steps] for lines in metrics]
        digests = [{part: checkpoint_digest(folder / part)} for folder in folders if has_weights]
    if has_weights:
        weights = compare_weights(name, [folder / part for folder in folders], digests)
    what += f", {len(metrics[0])} lines of metrics"
    reasons = likely_reasons(run, manifest, changes(then, recorded()))
    text, code = verdict(what, deviations(*metrics), weights, reasons)
    say(text)
    return code
