"""Compare strategies, each at the learning rate that suits it.

    difftrain sweep plan.yaml
    difftrain sweep plan.yaml --report

PLAN is a YAML file: strategies × learning rates × seeds (docs/sweep.md). First each strategy is tried at each rate, on
seeds of their own; then each is run at its best rate, on the seeds that are compared. Started again, it goes on where
it stopped. Exit code 0: all is run; 1: some runs failed; 75: stopped.
"""

import argparse
import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from difftrain_utils.commands import ledger
from difftrain_utils.commands.compare import number
from difftrain_utils.commands.parser import Parser
from difftrain_utils.commands.sweep_plan import TUNE, Plan, PlannedRun, load_plan, within
from difftrain_utils.commands.sweep_report import (
    FINISHED,
    Findings,
    choose_rate,
    findings,
    loaded,
    score,
    status_of,
    value_of,
)
from difftrain_utils.commands.train import has_accelerate_config, launch_command, num_gpus
from difftrain_utils.errors import InputError, RunError, blame, some
from difftrain_utils.files import write_file
from difftrain_utils.run.run_folder import DIVERGED
from difftrain_utils.terminal import STOPPED, printable

WAIT = 0.2  # seconds between two looks at the runs
WITHOUT_EFFECT = {  # what an option leaves nothing to do for
    "--report": ("--slurm", "--task", "--jobs"),
    "--slurm": ("--task", "--jobs", "--output"),
    "--task": ("--jobs", "--output"),
}


def say(text: str) -> None:
    print(printable(text), flush=True)


# ── The runs ─────────────────────────────────────────────────────────────────────────────────────────────────
def carry_out(plan: Plan, runs: Sequence[PlannedRun], jobs: int) -> list[str]:
    """Make the runs that are not done, so many at a time. Returns what became of those that failed.

    A run that another process is at is waited for. However this ends, the runs are stopped and saved.

    Raises:
        RunError: a run has not the metric that decides.
    """
    waiting = deque(run for run in runs if status_of(run.folder) not in (FINISHED, DIVERGED))
    running: dict[int, tuple[PlannedRun, subprocess.Popen]] = {}  # by slot
    waited_for, failures = [], []
    try:
        while waiting or running:
            free = [slot for slot in range(jobs) if slot not in running]
            for slot in free[: len(waiting)]:
                run = waiting.popleft()
                if not is_in_use(run.folder):
                    say(f"{run.folder}: starting")
                    running[slot] = run, start(plan, run, jobs, slot)
                elif status_of(run.folder) not in (FINISHED, DIVERGED):
                    waiting.append(run)
                    if run not in waited_for:
                        say(f"{run.folder}: another process is at it; waiting")
                        waited_for.append(run)
            time.sleep(WAIT)
            for slot, (run, process) in list(running.items()):
                if process.poll() is not None:
                    del running[slot]
                    if process.returncode == 2 and is_in_use(run.folder):  # another has been faster
                        waiting.append(run)
                    elif failure := end(plan, run, process.returncode):
                        failures.append(failure)
    finally:
        for _, process in running.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)  # also what a launcher has started, which may tell it nothing
        for _, process in running.values():
            process.wait()
    return failures


def is_in_use(folder: Path) -> bool:
    if not folder.exists():
        return False
    from difftrain_utils.run import lock  # with it comes torch

    return lock.is_in_use(folder)


def start(plan: Plan, run: PlannedRun, jobs: int, slot: int) -> subprocess.Popen:
    """Start a run: on all GPUs if it is alone, else on the slot's, or on its share of the CPU's cores."""
    rate = run.rate if run.stage == TUNE else choose_rate(plan, run.strategy).rate
    gpus, environment, command = num_gpus(), dict(os.environ), ["python"]
    if jobs == 1:
        command = launch_command(gpus, has_accelerate_config())
    elif gpus:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
        environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[slot % gpus]
    else:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // jobs)))
    command = [sys.executable, *command[1:], plan.script_of(run.strategy), *plan.options(run, rate)]
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    with log_of(run).open("a", encoding="utf-8") as log:
        log.write(f"\n$ {shlex.join(command)}\n")
        log.flush()
        # of a session of its own: Ctrl-C stops the sweep, which stops its runs
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)


def end(plan: Plan, run: PlannedRun, code: int) -> str | None:
    """Say what became of a run; returns that if it failed."""
    status = status_of(run.folder)
    if status == FINISHED:
        try:
            value = score(loaded(run), plan.what_decides)
        except ValueError as error:
            raise RunError(f"{run.folder}: {error}, which is to decide (metric): see its evaluation.* fields") from None
        say(f"{run.folder}: finished, {plan.measure} {number(value_of(value, plan.what_decides))}")
        return None
    if status == DIVERGED:
        say(f"{run.folder}: diverged, which counts as worst")
        return None
    last = log_of(run).read_text(errors="replace").rpartition("\n$ ")[2]
    said = [line for line in last.splitlines() if line.startswith("error: ")]
    reason = "stopped" if code == STOPPED else said[-1].removeprefix("error: ") if said else f"exit code {code}"
    failure = f"{run.folder}: {reason}; {log_of(run)} has what it said"
    say(failure)
    return failure


def log_of(run: PlannedRun) -> Path:
    """Beside the run's folder, which is its own."""
    return run.folder.with_name(f"{run.folder.name}.log")


def split_by_rate(plan: Plan, runs: Sequence[PlannedRun]) -> tuple[list[PlannedRun], list[str]]:
    """Those whose rate is known, or given; and of which strategies it is not, as not all rates are tried yet. Where
    none trains, there is nothing to run."""
    choices = {strategy: choose_rate(plan, strategy) for strategy in dict.fromkeys(run.strategy for run in runs)}
    ready = [run for run in runs if choices[run.strategy].is_complete and not choices[run.strategy].is_hopeless]
    untried = [f"{name}: not all of its rates are tried" for name, choice in choices.items() if not choice.is_complete]
    return ready, untried


# ── Slurm ────────────────────────────────────────────────────────────────────────────────────────────────────
SLURM = """#!/usr/bin/env bash
# {count} runs, one a task, submitted from any folder: first those that tune the learning rates, then the others.
{submit}
# Then `difftrain sweep {plan}` makes what is missing, if anything, and shows and notes what was found.
# Time, memory and GPUs of a run: add them here.
#SBATCH --job-name=sweep
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
cd {folder} || exit 2
srun --ntasks=1 {python} -m difftrain_utils sweep {plan} --task "$SLURM_ARRAY_TASK_ID"
code=$?
if [ "$code" -eq {stopped} ]; then # after a checkpoint, from which it goes on
    exec scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID"
fi
exit "$code"
"""


def slurm_script(plan: Plan, path: Path, script: Path) -> str:
    """An array whose task i is run i of the plan."""
    runs = plan.runs()
    tuning, last = sum(run.stage == TUNE for run in runs), len(runs) - 1
    submit = f"#   sbatch --array=0-{last} {script}"
    if tuning:
        submit = f"#   tune=$(sbatch --parsable --array=0-{tuning - 1} {script})\n"
        submit += f"#   sbatch --dependency=afterany:$tune --array={tuning}-{last} {script}"
    quoted = {"plan": shlex.quote(str(path)), "folder": shlex.quote(os.getcwd()), "python": shlex.quote(sys.executable)}
    return SLURM.format(count=len(runs), submit=submit, stopped=STOPPED, **quoted)


# ── The command ──────────────────────────────────────────────────────────────────────────────────────────────
def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="difftrain sweep", description=__doc__)
    parser.add_argument("plan", metavar="PLAN", type=Path, help="YAML file: strategies, learning rates, seeds")
    parser.add_argument("--jobs", metavar="N", type=int, help="runs at a time on this machine (1)")
    parser.add_argument("--report", action="store_true", help="run nothing: what is known by now")
    parser.add_argument("--output", metavar="REPORT.html", type=Path, help="also write it as one HTML file with curves")
    parser.add_argument("--slurm", metavar="FILE", type=Path, help="run nothing: write a script for an array of Slurm")
    parser.add_argument("--task", metavar="I", type=int, help="make the run I alone, of those of --slurm")
    args = parser.parse_args(argv)
    jobs = 1 if args.jobs is None else args.jobs
    if jobs < 1:
        raise InputError(f"--jobs: must be at least 1, got {jobs}")
    refuse_without_effect(args)
    if args.output and args.output.suffix != ".html":
        raise InputError(f"--output {args.output}: must end in .html")
    plan = load_plan(args.plan)
    runs = plan.runs()
    if args.task is not None and not 0 <= args.task < len(runs):
        raise InputError(f"--task: must be from 0 to {len(runs) - 1}, got {args.task}")
    plan.refuse_others()
    if args.report:
        report(plan, args.output)
        return 0
    if Path(plan.ledger).exists():
        with within(f"{args.plan}: ledger"):  # it shall not turn out to be another file when all is run
            ledger.read_lines(Path(plan.ledger))
    plan.keep()
    if args.slurm:
        with blame(f"--slurm {args.slurm}", OSError):
            write_file(args.slurm, slurm_script(plan, args.plan, args.slurm))
        say(f"{args.slurm} makes the {len(runs)} runs; it says how to submit it")
        return 0
    chosen = runs if args.task is None else [runs[args.task]]
    failures = carry_out(plan, [run for run in chosen if run.stage == TUNE], jobs)
    ready, untried = split_by_rate(plan, [run for run in chosen if run.stage != TUNE])
    failures += carry_out(plan, ready, jobs) + untried
    if failures:
        raise RunError(f"not all is run: {some(failures)}")
    if args.task is None:
        found = report(plan, args.output)
        if (number := ledger.append(plan, found)) is not None:
            say(f"\nThis is a line of {plan.ledger}: difftrain reproduce {plan.ledger}:{number}")
    return 0


def refuse_without_effect(args: argparse.Namespace) -> None:
    """Raise InputError for an option that another makes one of no effect."""
    given = {f"--{name}": value is not None and value is not False for name, value in vars(args).items()}
    for name, others in WITHOUT_EFFECT.items():
        for other in others:
            if given[name] and given[other]:
                raise InputError(f"{other}: cannot go with {name}")


def report(plan: Plan, output: Path | None) -> Findings:
    found = findings(plan)
    say(found.as_text())
    if output:
        with blame(f"--output {output}", OSError):
            output.parent.mkdir(parents=True, exist_ok=True)
            write_file(output, found.as_html(f"Sweep {plan.output_dir}", plan.measure))
        say(f"\n{output} shows it with curves")
    return found
