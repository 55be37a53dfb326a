"""Sweeps, with a script that trains nothing: what it logs is a function of strategy, learning rate and seeds."""

import dataclasses
import datetime
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml
from helpers import ROOT
from scipy import stats
from test_compare import write_run

from difftrain_utils.commands import reproduce, sweep_report
from difftrain_utils.commands.compare import Run
from difftrain_utils.commands.sweep import main
from difftrain_utils.commands.sweep_plan import PlannedRun, load_plan
from difftrain_utils.commands.sweep_report import choose_rate, cost_table, curve_of, findings
from difftrain_utils.errors import InputError, RunError
from difftrain_utils.run.metrics import read_metrics

SCRIPT = """
import json, math, random, signal, sys, time
from pathlib import Path

sys.path.insert(0, "{tests}/commands"), sys.path.insert(0, "{tests}"), sys.path.insert(0, "{root}")
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
folder, lr = Path(given["--train.output_dir"]), float(given["--optimizer.init_args.lr"])
seed, loss = int(given["--train.seed"]), given.get("--loss.type", "mse")
own = [int(given.get(f"--train.seeds.{source}", seed)) for source in ("weights", "data", "noise")]
folder.mkdir(parents=True, exist_ok=True)
with (folder / "starts").open("a") as file:
    file.write("started ")
segments = [{"started": "now", "from_step": 0}]
manifest = {"command": [sys.argv[0]], "git": {"commit": "c" * 40}, "segments": segments}


def write(manifest, scores=()):
    config = {"loss": {"type": loss}, "optimizer": {"init_args": {"lr": lr}}, "train": {"seed": seed, "batch_size": 8}}
    config["train"] |= {"seeds": dict(zip(("weights", "data", "noise"), own)), "max_steps": 40, "log_every": 10}
    (folder / "config.resolved.yaml").write_text(json.dumps(config))
    (folder / "env.json").write_text("{}")
    lines = [
        {"step": step, "loss": 1.0, "samples_per_second": 8.0, "flops": step * 1000 * (1 + (loss == "huber"))}
        | {"validation_loss": score, "validation_loss_bins": [2 * score, score], "shapes_right": 1 / (1 + score)}
        for step, score in zip((10, 20, 30, 40), scores)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
    (folder / "run_manifest.json").write_text(json.dumps(manifest))


if Path("hold").exists():
    write(manifest)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    time.sleep(30)
if lr > 1:
    segments[0]["reason"] = "diverged"
    write(manifest)
    print("error: the norm of the gradient is nan")
    sys.exit(1)
draws = [random.Random(f"{source} {value}").gauss(0, sd) for source, value, sd in zip("wdn", own, (0.03, 0.002, 0.01))]
best = {"mse": 0.01, "huber": 0.003}[loss]
score = math.exp(0.3 * math.log10(lr / best) ** 2 + sum(draws)) * (0.9 if loss == "huber" else 1.0)
write(manifest | {"final": {"weights": {"raw": f"{loss} {lr} {own}"}}}, [4 * score, 2 * score, 1.1 * score, score])
"""
PLAN = {
    "config": "base.yaml",
    "script": "fake.py",
    "output_dir": "sweep",
    "strategies": {"mse": {}, "huber": {"loss.type": "huber"}},
    "learning_rates": ["1e-3", 0.003, 0.01, 0.03],
    "tuning_seeds": [100, 101],
    "seeds": [0, 1, 2],
}


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """A function that writes a plan with other fields, in a folder of its own, and returns its path."""
    monkeypatch.chdir(tmp_path)
    Path("fake.py").write_text(SCRIPT.replace("{root}", str(ROOT)).replace("{tests}", str(ROOT / "tests")))
    Path("base.yaml").write_text("train: {max_steps: 40}\n")

    def write(**fields) -> str:
        Path("plan.yaml").write_text(yaml.safe_dump(PLAN | fields, sort_keys=False))
        return "plan.yaml"

    return write


def starts() -> dict[str, int]:
    """How often each run was started."""
    found = sorted(Path("sweep").rglob("starts"))
    return {str(path.parent.relative_to("sweep")): len(path.read_text().split()) for path in found}


def rows_of(found, column: str) -> dict[str, dict[str, str]]:
    """The rows, by name, of the table with this column."""
    rows = next(rows for _, rows, _ in found.tables if column in rows[0])
    return {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows[1:]}


def test_it_tunes_and_then_compares_and_makes_no_run_twice(sweep, capsys):
    plan = sweep(strategies=PLAN["strategies"] | {"hot": {"learning_rates": [2, 3]}}, control_seeds=[10, 11, 12])
    assert main([plan, "--jobs", "4"]) == 0
    found = findings(load_plan(Path(plan)))
    assert {name: choice.rate for name, choice in found.choices.items()} == {"mse": 0.01, "huber": 0.003, "hot": None}
    rows = rows_of(found, "p (Holm)")
    assert rows["huber"]["verdict"] == "better" and rows["huber"]["difference"].startswith("-10.0")
    assert rows["hot"]["verdict"] == "hot diverged at each rate" and rows["mse"]["verdict"] == "baseline"
    assert found.results["control"].verdict == "not distinguishable"
    assert found.missing == [] and len(starts()) == 2 * 4 * 2 + 2 * 2 + 2 * 3 + 3 and set(starts().values()) == {1}
    assert "sweep/compare/mse/seed-1: finished, " in (said := capsys.readouterr().out)
    assert "This is a line of experiments.jsonl: difftrain reproduce experiments.jsonl:1" in said
    assert main([plan]) == 0 and set(starts().values()) == {1}
    (line,) = Path("experiments.jsonl").read_text().splitlines()
    assert json.loads(line)["settings"]["huber"]["verdict"] == "better" and json.loads(line)["commit"] == "c" * 40

    assert reproduce.main(["experiments.jsonl:1"]) == 0
    metrics = Path("sweep/compare/huber/seed-1/metrics.jsonl")
    metrics.write_text(metrics.read_text().replace('"validation_loss_bins": [', '"validation_loss_bins": [1'))
    capsys.readouterr()
    assert reproduce.main(["experiments.jsonl:1"]) == 1
    said = capsys.readouterr().out
    assert "sweep/compare/huber/seed-1: other metrics than then" in said and "huber: verdict was better and is" in said
    with pytest.raises(InputError, match=r"^experiments.jsonl:2: no such line; it has 1$"):
        reproduce.main(["experiments.jsonl:2"])


def test_it_stops_with_its_runs_and_goes_on(sweep):
    plan = sweep()
    Path("hold").touch()
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-m", "difftrain_utils", "sweep", plan, "--jobs", "2"], env=environment)
    while sum(starts().values()) < 2:
        time.sleep(0.05)
    time.sleep(0.2)
    runs = psutil.Process(process.pid).children()
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 75 and len(starts()) == len(runs) == 2
    assert not any(run.is_running() for run in runs)
    Path("hold").unlink()
    assert main([plan, "--jobs", "4"]) == 0
    assert sorted(starts().values()) == [1] * 20 + [2] * 2  # the fake ones have no checkpoints to go on from


def test_a_run_that_fails_stops_no_other_and_is_tried_again(sweep):
    plan = sweep(strategies={"mse": {}, "other": {"loss.type": "none"}})
    with pytest.raises(
        RunError, match=r"^not all is run: sweep/tune/other/lr-0.001/seed-100: exit code 1; .*\.log has"
    ):
        main([plan, "--jobs", "4"])
    assert "compare/mse/seed-2" in starts() and "compare/other/seed-2" not in starts()
    assert {count for name, count in starts().items() if "other" in name} == {1}
    assert "KeyError: 'none'" in Path("sweep/tune/other/lr-0.001/seed-100.log").read_text()


def test_a_task_of_slurm_is_a_run(sweep):
    plan = sweep(learning_rates=[0.003, 0.01], tuning_seeds=[100], seeds=[0])
    assert main([plan, "--slurm", "array.sbatch"]) == 0
    script = Path("array.sbatch").read_text()
    assert "--array=0-3 array.sbatch" in script and "--dependency=afterany:$tune --array=4-5 array.sbatch" in script
    Path("srun").write_text('#!/bin/sh\nshift\nexec "$@"\n')
    Path("srun").chmod(0o755)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "SLURM_ARRAY_TASK_ID": "0"}
    environment["PATH"] = f"{Path.cwd()}:{os.environ['PATH']}"
    subprocess.run(["bash", "array.sbatch"], env=environment, check=True)
    assert list(starts()) == ["tune/mse/lr-0.003/seed-100"]
    with pytest.raises(RunError, match="mse: not all of its rates are tried"):
        main([plan, "--task", "4"])
    for task in range(1, 6):
        assert main([plan, "--task", str(task)]) == 0
    assert list(starts().values()) == [1] * 6 and starts().keys() == {
        *(f"tune/{name}/lr-{rate}/seed-100" for name in ("mse", "huber") for rate in (0.003, 0.01)),
        *(f"compare/{name}/seed-0" for name in ("mse", "huber")),
    }
    with pytest.raises(InputError, match=r"^--task: must be from 0 to 5, got 6$"):
        main([plan, "--task", "6"])


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"seeds": [0, 100]}, r"plan.yaml: tuning_seeds: .* no seed may be in seeds, too, got \[100\]$"),
        ({"variance_seeds": [101]}, r"tuning_seeds: .* no seed may be in variance_seeds, too, got \[101\]$"),
        ({"control_seeds": [5]}, "control_seeds: must be as many as seeds, 3, got 1$"),
        ({"tuning_seeds": []}, "tuning_seeds: mse has rates to tune: empty$"),
        ({"seed": [1]}, r"plan.yaml: seed: no such field; did you mean seeds\?$"),
        ({"metric": "fod"}, "metric: must be one of .*fid.*, got 'fod'$"),
        ({"baseline": "x"}, "baseline: must be one of mse, huber, got 'x'$"),
        ({"strategies": {"a": {"train.seed": 3}}}, "strategies.a.train.seed: the sweep sets it$"),
        ({"fields": {"optimizer.init_args.lr": 3}}, "fields.optimizer.init_args.lr: learning_rates has it$"),
        ({"strategies": {"a": {"lr": 3}}}, "strategies.a: must have dotted names of fields, or config.*'lr'$"),
        ({"script": str(ROOT / "train_text_to_image.py"), "strategies": {"a": {"loss.tipe": 1}}},
         r"plan.yaml: strategies.a: base.yaml|strategies.a: --loss.tipe: no such field; did you mean --loss.type\?$"),
        ({"learning_rates": ["high"]}, r"learning_rates: must be a list of numbers, got \['high'\]$"),
        ({"learning_rates": [0.01]}, "tuning_seeds: without effect: no strategy has rates to tune$"),
        ({"learning_rates": [True]}, r"learning_rates: must be a list of numbers, got \[True\]$"),
        ({"output_dir": 3}, "plan.yaml: output_dir: must be a folder, got 3$"),
        ({"output_dir": "s3://runs"}, "plan.yaml: output_dir: must be a folder of this machine, got s3://runs$"),
        ({"ledger": 3}, "plan.yaml: ledger: must be a file, got 3$"),
        ({"ledger": "."}, r"plan.yaml: ledger: must be a file, in a folder, got \.$"),
        ({"ledger": "base.yaml/a"}, "plan.yaml: ledger: must be a file, in a folder, got base.yaml/a$"),
        ({"variance_seeds": [2**63]}, "variance_seeds: must be whole numbers from 0 to "),
        ({"fields": {"train.run_name": datetime.date(2024, 1, 1)}}, "fields.train.run_name: Object of type date"),
        ({"strategies": {1: {}}}, "plan.yaml: strategies: must be called by texts, got 1"),
        ({"strategies": {"a": {"script": 3}}}, "plan.yaml: strategies.a: script: must be a text or null, got 3$"),
        ({"looks": "x"}, "plan.yaml: looks: must be a whole number, got 'x'$"),
        ({"looks": 1.5}, "plan.yaml: looks: must be a whole number, got 1.5$"),
        ({"config": 3}, "plan.yaml: config: must be a file or a list of files, got 3$"),
        ({"script": 3}, "plan.yaml: script: must be a text or null, got 3$"),
        ({"fields": {"optimizer.init_args": "x"}}, "fields.optimizer.init_args: must be {argument: value}, got 'x'$"),
        ({"fields": {"optimizer.init_args": {"lr": 1}}}, "fields.optimizer.init_args.lr: learning_rates has it$"),
    ],
)  # fmt: skip
def test_what_a_plan_may_not_have(sweep, fields, reason):
    with pytest.raises(InputError, match=reason):
        load_plan(Path(sweep(**fields)))
    assert not Path("sweep").exists()


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (["--slurm", "a.sbatch", "--report"], "--slurm: cannot go with --report"),
        (["--report", "--jobs", "1"], "--jobs: cannot go with --report"),
        (["--task", "0", "--output", "a.html"], "--output: cannot go with --task"),
    ],
)
def test_options_without_effect(sweep, argv, reason):
    with pytest.raises(InputError, match=f"^{reason}$"):
        main([sweep(), *argv])
    assert not Path("a.sbatch").exists()


def test_files_that_are_not_there_or_are_others(sweep):
    with pytest.raises(InputError, match=r"^no.yaml: No such file or directory$"):
        main(["no.yaml"])
    Path("notes.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match=r"^plan.yaml: ledger: notes.jsonl line 1: not a line of a ledger of"):
        main([sweep(ledger="notes.jsonl")])
    assert not Path("sweep").exists()


@pytest.mark.parametrize(
    ("fields", "strategy", "reason"),
    [
        ({}, {"data.validation_split": 0}, "metric: needs data.validation_split or .*, and train.eval_every above 0$"),
        ({}, {"train.eval_every": 0}, "metric: needs data.validation_split or .*, and train.eval_every above 0$"),
        ({"metric": "fid"}, {}, "metric: needs evaluation.fid_features, and train.eval_every above 0$"),
        ({"metric": "valid"}, {}, "metric: is another script's: here it is one of .*, scenes_right$"),
        ({}, {"loss.contrastive": 0.1, "train.group_size": 3}, "train.group_size: must divide a part of the batch"),
        ({}, {"config": "own.yaml"}, "train.overwrite: cannot go with train.resume_from"),
    ],
)
def test_what_the_config_of_a_strategy_may_not_have(sweep, fields, strategy, reason):
    Path("own.yaml").write_text("train: {overwrite: true}\n")
    script, config = str(ROOT / "train_text_to_image.py"), str(ROOT / "configs/quickstart.yaml")
    plan = sweep(
        script=script,
        config=config,
        strategies={"base": {}, "a": strategy},
        **fields,
    )
    named = "base" if fields else "a"
    with pytest.raises(InputError, match=rf"^plan.yaml: strategies.{named}: {reason}"):
        load_plan(Path(plan))


def test_the_plan_of_the_experiments(monkeypatch):
    monkeypatch.chdir(ROOT)
    plan = load_plan(Path("configs/sweeps/experiments.yaml"))
    assert len(plan.runs()) == 6 * 5 + 6 * 5 and plan.baseline == "baseline"
    assert plan.strategies.keys() == {path.stem for path in Path("configs/experiments").glob("*.yaml")}


def test_runs_of_two_plans_do_not_mix(sweep):
    """A strategy may be added."""
    few = {"learning_rates": [0.003], "tuning_seeds": []}
    assert main([sweep(**few), "--jobs", "4"]) == 0
    more = PLAN["strategies"] | {"again": {"loss.type": "huber"}}
    assert main([sweep(**few, strategies=more), "--jobs", "4"]) == 0
    assert len(starts()) == 9 and set(starts().values()) == {1}
    assert len(Path("experiments.jsonl").read_text().splitlines()) == 2
    for fields, reason in (
        ({"seeds": [0, 1, 2, 3]}, r"seeds was \[0, 1, 2\] and is \[0, 1, 2, 3\]"),
        ({"strategies": {"mse": {"loss.type": "huber"}}}, "strategies.mse was {}; strategies.huber is gone"),
    ):
        with pytest.raises(InputError, match=rf"^sweep/plan.yaml: its runs are of another plan, .*: .*{reason}"):
            main([sweep(**(few | fields)), "--report"])
    Path("base.yaml").write_text("train: {max_steps: 50}\n")
    with pytest.raises(InputError, match=r"base.yaml is not as it was"):
        main([sweep(**few, strategies=more)])


def test_a_comparison_is_one_line_of_the_ledger(sweep):
    few = {"learning_rates": [0.003], "tuning_seeds": [], "seeds": [0]}
    for folder in ("sweep", "other", "sweep", "other"):
        assert main([sweep(**few, output_dir=folder), "--jobs", "4"]) == 0
    lines = [json.loads(line) for line in Path("experiments.jsonl").read_text().splitlines()]
    assert [line["folder"] for line in lines] == ["sweep", "other"]


def test_a_strategy_that_has_no_runs_may_be_changed_or_removed(sweep):
    few = {"learning_rates": [0.003], "tuning_seeds": []}
    Path("bad.yaml").write_text("train: {max_steps: 40}\n")
    bad = {"config": "bad.yaml", "loss.type": "none"}
    with pytest.raises(RunError, match=r"^not all is run: sweep/compare/bad/seed-0: exit code 1"):
        main([sweep(**few, strategies={"bad": bad} | PLAN["strategies"]), "--jobs", "4"])
    Path("bad.yaml").write_text("train: {max_steps: 40, log_every: 10}\n")
    with pytest.raises(InputError, match=r"mix: strategies.mse was {}; strategies.huber is gone; give"):
        main([sweep(**few, strategies={"bad": {}, "mse": {"train.log_every": 5}})])
    with pytest.raises(InputError, match=r"mix: seeds was \[0, 1, 2\] and is \[3, 4\]; give"):
        main([sweep(**few, strategies=PLAN["strategies"], seeds=[3, 4])])
    mended = {"bad": bad | {"loss.type": "huber"}} | PLAN["strategies"]
    assert main([sweep(**few, strategies=mended, baseline="bad"), "--slurm", "array.sbatch"]) == 0
    assert main([sweep(**few, strategies=PLAN["strategies"])]) == 0  # without it, and its place as baseline
    assert set(starts().values()) == {1} and rows_of(findings(load_plan(Path("plan.yaml"))), "p (Holm)").keys() == {
        *PLAN["strategies"]
    }


def test_a_rate_at_the_edge_and_one_that_diverged(sweep, capsys):
    plan = load_plan(Path(sweep(learning_rates=[0.001, 0.003, 2.0])))
    assert main(["plan.yaml", "--jobs", "4"]) == 0
    choices = {name: choose_rate(plan, name) for name in plan.strategies}
    assert choices["mse"].rate == 0.003 and choices["mse"].scores[2.0] == math.inf and not choices["mse"].is_at_edge
    assert "2: diverged with 2 of 2 seeds" in capsys.readouterr().out
    edge = choose_rate(load_plan(Path(sweep(learning_rates=[0.001, 0.003]))), "mse")
    assert edge.rate == 0.003 and edge.is_at_edge


def test_the_spread_by_source_is_that_of_its_runs(sweep, capsys):
    fields = {"learning_rates": [0.01], "tuning_seeds": [], "metric": "validation_loss", "variance_seeds": [20, 21, 22]}
    plan = load_plan(Path(sweep(**fields, strategies={"mse": {}})))
    assert main(["plan.yaml", "--jobs", "4", "--output", "report.html"]) == 0
    rows = rows_of(findings(plan), "seeds of")

    def last(folder: str) -> float:
        return json.loads(Path("sweep", folder, "metrics.jsonl").read_text().splitlines()[-1])["validation_loss"]

    for source in ("weights", "data", "noise"):
        values = [last("compare/mse/seed-0"), *(last(f"variance/{source}/seed-{seed}") for seed in (20, 21, 22))]
        sd, factors = statistics.stdev(values), (3 / stats.chi2.ppf([0.975, 0.025], 3)) ** 0.5
        assert rows[source]["runs"] == "4" and rows[source]["sd"] == f"{sd:.3g}"
        assert rows[source]["95 % interval of it"] == f"{sd * factors[0]:.3g} to {sd * factors[1]:.3g}"
    assert {row["share of the variance"] for row in rows.values()} == {"–"}  # of three
    assert float(rows["weights"]["sd"]) > 3 * float(rows["data"]["sd"])
    assert "validation_loss by FLOPs" in Path("report.html").read_text()


def test_what_one_seed_says_of_the_spread_and_five_of_its_sources(sweep):
    few = {"learning_rates": [0.01], "tuning_seeds": [], "seeds": [0], "variance_seeds": [20, 21]}
    for fields in (few, few | {"output_dir": "more", "seeds": [0, 1, 2, 3, 4], "variance_seeds": [20, 21, 22, 23]}):
        plan = load_plan(Path(sweep(**fields)))
        for run in plan.runs():
            spread = 0.3 * run.seeds.get("train.seeds.weights", 0) + 0.1 * (run.seeds["train.seed"] % 7)
            lines = [{"step": 40, "loss": 1.0, "validation_loss": math.exp(spread), "samples_per_second": 8.0}]
            manifest = {"segments": [], "final.weights.raw": "x"}
            write_run(run.folder, config=run.seeds | {"loss.type": run.strategy}, manifest=manifest, metrics=lines)
        found = findings(plan)
        shares = {name: row["share of the variance"] for name, row in rows_of(found, "seeds of").items()}
        spreads = [row[f"{plan.measure}, mean ± sd"] for row in rows_of(found, "verdict").values()]
        if fields is few:
            assert spreads == ["1.000"] * 2 and shares == dict.fromkeys(("weights", "data", "noise"), "–")
            assert "Fewer than 5 runs, in a row or of all, are too few for a share of the variance." in found.as_text()
        else:
            assert shares["all"] == "100 %" and shares["data"] == "0 %" and "Fewer than" not in found.as_text()


def test_what_it_costs_to_come_to_where_the_baseline_ended():
    """The first has 10, 6, 5, 4 at 10, 20, 30, 40 steps of 8 samples, 100 FLOPs and a second; the other is there after
    20 steps, each of which takes three times as many FLOPs and twice the time."""

    def run(losses: list[float], flops: int, speed: float) -> Run:
        metrics = [
            {"step": 10 * i, "validation_loss": loss, "flops": 10 * i * flops, "samples_per_second": speed}
            for i, loss in enumerate(losses, 1)
        ]
        return Run(Path("nowhere"), "a", {"train.batch_size": 8}, {}, metrics)

    curves = {
        "base": curve_of([run([10, 6, 5, 3], 100, 8.0), run([10, 6, 5, 5], 100, 8.0)], None),
        "fast": curve_of([run([8, 3, 2, 1], 300, 4.0)], None),
        "slow": curve_of([run([12, 9, 8, 7], 100, 8.0)], None),
    }
    header, *rows = cost_table(curves, "base", "lowest", "validation loss")
    base, fast, slow = (dict(zip(header, row, strict=True)) for row in rows)
    assert [base[name] for name in ("steps", "samples", "FLOPs", "seconds")] == ["40", "320", "4000", "40"]
    to_it = [f"{name} to it" for name in ("steps", "samples", "FLOPs", "seconds")]
    assert [fast[name] for name in to_it] == ["0.50", "0.50", "1.50", "1.00"]
    assert [base[name] for name in to_it] == ["1.00"] * 4 and slow["steps to it"] == "never"
    assert (fast["at equal FLOPs"], fast["at equal seconds"]) == ("8.000", "3.000")


def test_the_report_has_one_measure(sweep):
    """At one noise level, which is most of the mean, huber is worse; at the others it is better by more. So it is as a
    geometric mean, in the rates, the verdicts and the costs."""
    few = {"learning_rates": [0.003], "tuning_seeds": [], "seeds": [0, 1, 2]}
    plan = load_plan(Path(sweep(**few)))
    for run in plan.runs():
        lines = [
            {"step": step, "loss": 1.0, "samples_per_second": 8.0, "validation_loss": (high + low) / 2}
            | {"validation_loss_bins": [high, low]}
            for step, spread in ((20, 2.0), (40, 1 + 1e-3 * run.seeds["train.seed"]))
            for high, low in [
                (spread * 10.0, spread * 0.1) if run.strategy == "mse" else (spread * 11.0, spread * 0.05)
            ]
        ]
        manifest = {"segments": [], "final.weights.raw": "x"}
        write_run(run.folder, config=run.seeds | {"loss.type": run.strategy}, manifest=manifest, metrics=lines)
    found = findings(plan)
    row, cost = (rows_of(found, column)["huber"] for column in ("p (Holm)", "steps to it"))
    assert row["verdict"] == "better" and cost["steps to it"] == "1.00"
    assert row["geometric mean of the validation losses, mean ± sd"] == f"{(11 * 0.05) ** 0.5 * 1.001:.4f} ± 0.00074"


def test_strategies_that_are_the_same_are_told_apart_at_most_as_often_as_promised(tmp_path, monkeypatch):
    """Of plans of three strategies that are the baseline, whose five seeds have noise of their own, and some
    in common that pairing takes out, at most 5 % may have a verdict on any of the three, and 5 % of their controls; of
    100 no more than the bound, with a probability of 99 %."""
    monkeypatch.chdir(tmp_path)
    random, wrong, wrong_controls = np.random.default_rng(1), 0, 0
    count, bound = 100, int(stats.binom.ppf(0.99, 100, 0.05))
    Path("base.yaml").write_text("{}")
    Path("fake.py").touch()
    fields = {"strategies": {name: {} for name in "abcd"}, "control_seeds": [5, 6, 7, 8, 9], "seeds": [0, 1, 2, 3, 4]}
    Path("plan.yaml").write_text(
        yaml.safe_dump(
            PLAN | fields | {"learning_rates": [], "tuning_seeds": [], "metric": "validation_loss"}, sort_keys=False
        )
    )
    plan = load_plan(Path("plan.yaml"))
    runs = {run.folder: run for run in plan.runs()}
    for folder, run in runs.items():
        write_run(folder, config=run.seeds | {"loss.type": "mse"}, manifest={"segments": [], "final.weights.raw": "x"})
    read = {folder: sweep_report.loaded(run) for folder, run in runs.items()}  # all but the metrics, which change

    def loaded(run: PlannedRun) -> Run:
        return dataclasses.replace(read[run.folder], metrics=read_metrics(run.folder / "metrics.jsonl"))

    monkeypatch.setattr(sweep_report, "loaded", loaded)
    for _ in range(count):
        in_common = dict(enumerate(random.normal(0, 0.05, 10)))
        for folder, run in runs.items():
            loss = math.exp(in_common[run.seeds["train.seed"]] + random.normal(0, 0.02))
            line = {"step": 40, "loss": 1.0, "validation_loss": loss, "samples_per_second": 1.0}
            (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        results = findings(plan).results
        wrong += any(results[name].verdict != "not distinguishable" for name in "bcd")
        wrong_controls += results["control"].verdict != "not distinguishable"
    assert wrong <= bound and wrong_controls <= bound, (wrong, wrong_controls)
