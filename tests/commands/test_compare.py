import base64
import json
import math
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import yaml
from helpers import difftrain
from PIL import Image
from safetensors.numpy import save_file
from scipy import stats

from difftrain_utils.commands.compare import (
    KINDS,
    Contest,
    Metric,
    as_text,
    brief,
    by_value,
    contest,
    group_names,
    headline,
    load_runs,
    main,
    notes,
    number,
    seeds_of,
    settings_of,
    steps_done,
    summary,
    summary_table,
    text_table,
    unfair,
)
from difftrain_utils.commands.compare_html import BOTTOM, LEFT, RIGHT, TOP, smooth, ticks
from difftrain_utils.config.scripts import SCRIPTS
from difftrain_utils.errors import InputError

CONFIG = {
    "model.pretrained_model_name_or_path": "builtin:tiny-stable-diffusion",
    "model.train_from_scratch": False,
    "data.dataset": "builtin:shapes",
    "data.validation_split": 0.05,
    "train.seed": 0,
    "train.max_steps": 40,
    "train.batch_size": 8,
    "train.log_every": 10,
    "loss.type": "mse",
    "optimizer.init_args": {"lr": 0.001},
    "evaluation.prompts": ["a red circle"],
}
MANIFEST = {
    "git.commit": "c" * 40,
    "git.dirty": False,
    "git.diff": "",
    "versions.torch": "2.9.0",
    "versions.diffusers": "0.36.0",
    "versions.numpy": "2.0.0",
    "device": "cpu",
    "num_processes": 1,
    "mixed_precision": "no",
    "deterministic": False,
    "base_model.name": "builtin:tiny-stable-diffusion",
    "base_model.sha256.vae": "a" * 64,
    "data.train.dataset": "builtin:shapes",
    "data.train.sha256": "d" * 64,
}
ENV = {"cpu_threads": 2, "cpu_capability": "AVX2", "host": "a"}


def write_run(folder: Path, losses=(0.5, 0.4), config=None, manifest=None, env=None, metrics=None) -> Path:
    """A run's folder: 40 steps, `losses` are the validation losses at steps 20 and 40."""
    config = CONFIG | {"train.output_dir": str(folder)} | (config or {})
    manifest = MANIFEST | {"base_model.sha256.unet": f"{config['train.seed']}" * 64} | (manifest or {})
    if metrics is None:
        metrics = [{"step": s, "loss": 10 / s, "lr": 1e-3, "samples_per_second": s} for s in (10, 20, 30, 40)]
        for entry, loss in zip(metrics[1::2], losses, strict=True):
            entry |= {"validation_loss": loss + 0.1, "validation_loss_ema": loss, "shapes_right": loss / 2}
            entry |= {"validation_loss_ema_bins": [2 * loss, loss], "validation_loss_bins": [9.0, 9.0]}
    folder.mkdir(parents=True)
    (folder / "config.resolved.yaml").write_text(yaml.safe_dump(nested(config)))
    (folder / "run_manifest.json").write_text(json.dumps(nested(manifest)))
    (folder / "env.json").write_text(json.dumps(ENV | (env or {})))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in metrics))
    return folder


def nested(flat: dict) -> dict:
    tree = {}
    for name, value in flat.items():
        *sections, last = name.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    return tree


def seeds(folder: Path, name: str, finals: list[float], **config) -> list[Path]:
    """A run for each final validation loss, with the seeds 0, 1, …"""
    return [
        write_run(folder / f"{name}{seed}", (0.5, final), config | {"train.seed": seed})
        for seed, final in enumerate(finals)
    ]


def test_runs_of_every_script_can_be_compared():
    assert KINDS.keys() == SCRIPTS.keys()


def pair(folder: Path, **second):
    """Two runs that differ in what `second` says."""
    return load_runs([write_run(folder / "a"), write_run(folder / "b", **second)])


# ── The table ────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_run_is_a_row_of_its_final_and_best_values(tmp_path):
    metrics = [
        {"step": 10, "loss": 0.9, "samples_per_second": 100.0, "validation_loss": 0.1, "validation_loss_ema": 0.7},
        {"step": 20, "loss": 0.8, "samples_per_second": 5.0, "validation_loss": 0.1, "validation_loss_ema": 0.25},
        {"step": 40, "loss": 0.625, "samples_per_second": 120.0, "validation_loss_ema": 0.5, "shapes_right": 0.75},
        {"step": 41, "lr": 1e-4, "fid": 31.5},
    ]
    (run,) = load_runs([write_run(tmp_path / "a", metrics=metrics)])
    header, row = summary_table([run])
    assert dict(zip(header, row, strict=True)) == {
        "run": "a",
        "steps": "41",
        "final val. loss": "0.5000",
        "best val. loss": "0.2500 @ 20",
        "shapes_right": "0.7500",
        "fid": "31.50",
        "final train loss": "0.6250",
        "samples/s": "100.0",  # the median, which a step that had to wait does not move
    }


def test_raw_validation_loss_where_there_is_no_ema_and_says_so(tmp_path):
    raw = [{"step": 40, "loss": 0.5, "validation_loss": 0.25, "validation_loss_bins": [0.125, 0.375]}]
    runs = pair(tmp_path, metrics=raw)
    assert [summary(run)["final val. loss"] for run in runs] == [0.4, 0.25]
    assert "note: the validation loss of b is that of the raw weights, not the EMA weights" in notes(runs)
    assert notes(runs[:1]) == []


def test_absent_values_are_a_dash_and_a_run_alone_needs_no_others(tmp_path, capsys):
    main([str(write_run(tmp_path / "a", metrics=[{"step": 10, "loss": 0.5}]))])
    assert capsys.readouterr().out.split("\n") == [
        "run     steps  final train loss",
        "a    10 of 40            0.5000",
        "",
    ]
    runs = pair(tmp_path / "pair", config={"loss.type": "huber"}, metrics=[{"step": 40, "loss": 0.5}])
    assert summary_table(runs)[2] == ["b", "40", "–", "–", "–", "0.5000", "–"]
    assert contest(runs).rows[1][-1] == "no verdict: no validation loss"


def test_groups_of_seeds_have_mean_and_sample_standard_deviation(tmp_path):
    """Of 1, 2 and 6: mean 3, variance (4 + 1 + 9) / 2 = 7."""
    folders = seeds(tmp_path, "mse-", [1.0, 2.0, 6.0]) + seeds(tmp_path, "huber-", [0.25], **{"loss.type": "huber"})
    rows = summary_table(load_runs(folders))
    assert [row[0] for row in rows] == [
        "run", "mse-0", "mse-1", "mse-2", "huber-0", "mse: mean ± sd over 3 seeds",
    ]  # fmt: skip
    assert rows[-1][rows[0].index("final val. loss")] == f"3.000 ± {math.sqrt(7):.1f}"
    # the best are 0.5, 0.5 and 0.5: one of step 20 each
    assert rows[-1][rows[0].index("best val. loss")] == "0.5000 ± 0.0"


def test_only_the_seed_makes_a_group(tmp_path):
    other_place = {"train.seed": 1, "train.resume_from": "latest", "train.overwrite": True}
    for i, (expected, second) in enumerate(
        [
            (True, {"config": other_place}),
            (False, {"config": {"train.seed": 1, "loss.type": "huber"}}),
            (False, {"config": {"train.seed": 1}, "manifest": {"data.train.sha256": "e" * 64}}),
            (False, {"config": {"train.seed": 1}, "manifest": {"git.commit": "e" * 40}}),
            (False, {"config": {"train.seed": 1}, "env": {"cpu_capability": "AVX512"}}),
            (False, {"config": {"train.seed": 1}, "metrics": [{"step": 10, "loss": 0.5}]}),
        ]
    ):
        rows = summary_table(pair(tmp_path / str(i), **second))
        assert (rows[-1][0] == "group A: mean ± sd over 2 seeds") == expected, second


def test_runs_that_differ_in_one_of_the_seeds_make_a_group(tmp_path):
    """Null, and a run of before there were seeds by source, have train.seed for all."""
    sources = [{}, {"train.seeds": None}, {"train.seeds.noise": 4, "train.seeds.data": None}, {"train.seeds.noise": 5}]
    runs = load_runs([write_run(tmp_path / f"a{i}", (0.5, i + 1.0), config) for i, config in enumerate(sources)])
    assert [seeds_of(run) for run in runs] == [(0, 0, 0), (0, 0, 0), (0, 0, 4), (0, 0, 5)]
    assert summary_table(runs)[-1][0] == "a: mean ± sd over 3 seeds of noise"
    assert "note: a1 repeats a seed and is not counted twice" in notes(runs)
    assert headline(runs[1:]) == "The runs differ in: train.seeds.noise"
    other = write_run(tmp_path / "b", config={"train.seeds.noise": "4"})
    with pytest.raises(InputError, match=r"train.seeds.noise: must be a whole number, got '4'"):
        load_runs([other])


def test_a_verdict_says_of_which_seeds_it_is(tmp_path):
    """Runs that share a seed of what varies elsewhere are no independent ones."""

    def found(name: str, *seeds: dict) -> Contest:
        folders = [
            write_run(
                tmp_path / name / f"{loss}{i}",
                (0.5, 1 + (0.1 + 0.01 * i) * (loss == "huber")),
                {"loss.type": loss} | own,
            )
            for loss in ("mse", "huber")
            for i, own in enumerate(seeds)
        ]
        return contest(load_runs(folders))

    noise = found("noise", *({"train.seeds.noise": seed} for seed in range(4)))
    assert noise.rows[1][1] == "4" and noise.rows[1][-1] == "worse"
    assert noise.sentences == ["huber: holds for these seeds of weights and data, which its runs share."]
    mixed = found("mixed", {}, {"train.seeds.noise": 1}, {"train.seeds.data": 1})
    assert mixed.rows[1][-1] == "no verdict: its runs share seeds of data, and so do not count as 3"


def test_another_metric_decides_in_its_own_direction(tmp_path, capsys):
    """shapes_right is half the loss here: what is worse by the one is better by the other."""
    folders = seeds(tmp_path, "a", [0.5, 0.52, 0.51]) + seeds(
        tmp_path, "b", [0.6, 0.63, 0.61], **{"loss.type": "huber"}
    )
    runs = load_runs(folders)
    assert contest(runs).rows[1][-1] == "worse"
    row = contest(runs, metric=Metric("shapes_right", "highest")).rows[1]
    low, high = map(float, row[3].split(" to "))
    assert row[2] == "+0.05167" and row[-1] == "better" and 0 < low < 0.05167 < high
    assert contest(runs, metric=Metric("fid", "lowest")).rows[1][-1] == "no verdict: no fid"
    main([*map(str, folders), "--metric", "shapes_right"])
    assert "by how much shapes_right is lower (-) or higher (+), of which the highest is best" in " ".join(
        capsys.readouterr().out.split()
    )
    with pytest.raises(InputError, match=r"^--metric: must be one of validation_loss, .*, got 'x'$"):
        main([*map(str, folders), "--metric", "x"])


def test_a_repeated_seed_counts_once(tmp_path):
    folders = [*seeds(tmp_path, "a", [0.25, 0.75]), write_run(tmp_path / "again", (0.5, 0.25))]
    runs = load_runs(folders)
    assert summary_table(runs)[-1][:3] == ["a: mean ± sd over 2 seeds", "40", "0.5000 ± 0.35"]
    assert "note: again repeats a seed and is not counted twice" in notes(runs)


def test_steps_of_a_complete_run_whose_last_steps_had_no_line(tmp_path):
    (run,) = load_runs([write_run(tmp_path / "a", config={"train.max_steps": 45})])
    assert steps_done(run) == 40 and summary_table([run])[1][1] == "40 of 45"
    (tmp_path / "a" / "pipeline").mkdir()  # which a run leaves at its end
    assert steps_done(run) == 45
    run.config["train.max_steps"] = 90  # the pipeline is that of a shorter run, which this one extends
    assert steps_done(run) == 40


def test_wide_tables_go_on_underneath():
    rows = [["run", "aaaa", "bbbb", "cccc"], ["long", "1", "2", "3"]]
    assert text_table(rows, width=16) == "run   aaaa  bbbb\nlong     1     2\n\nrun   cccc\nlong     3"
    assert text_table(rows, width=22) == "run   aaaa  bbbb  cccc\nlong     1     2     3"


def test_bins_at_the_last_step(tmp_path, capsys):
    main([str(write_run(tmp_path / "a", (0.75, 0.375)))])
    table = capsys.readouterr().out.split("high:\n")[1].splitlines()
    assert [line.split() for line in table] == [
        ["run", "step", "bin", "1", "bin", "2"],
        ["a", "40", "0.7500", "0.3750"],
    ]


def test_numbers():
    assert [number(v) for v in (0.5, 0.0, 12.345678, 999.96, 41600.4, 0.00001234, math.nan, -math.inf)] == [
        "0.5000", "0.000", "12.35", "1000", "41600", "1.234e-05", "nan", "-inf",
    ]  # fmt: skip


# ── Against a baseline ───────────────────────────────────────────────────────────────────────────────────────


def rows_of(runs, *args) -> dict[str, dict[str, str]]:
    header, *rows = contest(runs, *args).rows
    return {row[0]: dict(zip(header, row, strict=True)) for row in rows}


def test_differences_are_paired_by_seed(tmp_path):
    """The seeds differ by much more than the settings: 0.3 to 0.6, and 2 % within each of them."""
    base, tilt = [0.3, 0.4, 0.5, 0.6], [0.979, 0.981, 0.980, 0.980]
    own = [loss * factor for loss, factor in zip(base, tilt, strict=True)]
    runs = load_runs(seeds(tmp_path, "m", base) + seeds(tmp_path, "h", own, **{"loss.type": "huber"}))
    expected = stats.ttest_1samp(np.log(tilt), 0)
    low, high = expected.confidence_interval()
    row = rows_of(runs)["h"]
    assert row["seeds"] == "4" and row["difference"] == "-2.00 %" and row["verdict"] == "better"
    assert row["95 % interval"] == f"{100 * np.expm1(low):+.2f} % to {100 * np.expm1(high):+.2f} %"
    assert row["p (Holm)"] == f"{expected.pvalue:.2g}"
    assert rows_of(runs, "h")["m"]["verdict"] == "worse"  # against the other one
    assert rows_of(runs, "h2")["m"]["verdict"] == "worse"  # by the name of a run
    with pytest.raises(InputError, match=r"--baseline x: no such setting or run; there is m, h"):
        contest(runs, "x")


def test_an_unfair_setting_has_no_share_of_the_5_percent(tmp_path):
    base, tilt = [0.3, 0.4, 0.5, 0.6], [0.985, 0.978, 0.981, 0.99]
    own = [loss * factor for loss, factor in zip(base, tilt, strict=True)]
    folders = seeds(tmp_path, "m", base) + seeds(tmp_path, "h", own, **{"loss.type": "huber"})
    alone = rows_of(load_runs(folders))["h"]
    folders += seeds(tmp_path, "unfair", own, **{"train.batch_size": 4})
    both = rows_of(load_runs(folders))
    assert both["h"] == alone and both["unfair"]["p (Holm)"] == "–"


def test_a_run_that_diverged_is_a_row_too(tmp_path):
    runs = seeds(tmp_path, "m", [0.5, 0.4]) + seeds(tmp_path, "h", [0.5, 4e7], **{"loss.type": "huber"})
    row = rows_of(load_runs(runs))["h"]
    assert row["verdict"] == "not distinguishable" and "e^" in row["95 % interval"]


def test_losses_of_different_steps_are_unfair(tmp_path):
    losses = [{"step": step, "loss": 0.1, "validation_loss": 0.5} for step in (20, 30)]
    rest = [{"step": 40, "loss": 0.1}]
    runs = load_runs(
        [write_run(tmp_path / "a", metrics=losses[:1] + rest), write_run(tmp_path / "b", metrics=losses[1:] + rest)]
    )
    assert unfair(runs) == ["unfair: validated at different steps: 20, 30"]


def test_what_differs_no_more_than_seeds_do_is_not_distinguishable(tmp_path):
    other = seeds(tmp_path, "h", [0.51, 0.44, 0.5], **{"loss.type": "huber"})
    found = contest(load_runs(seeds(tmp_path, "m", [0.5, 0.45, 0.48]) + other))
    assert found.rows[1][-1] == "not distinguishable"
    (sentence,) = found.sentences
    ratios = np.log([0.51 / 0.5, 0.44 / 0.45, 0.5 / 0.48])
    gap = (stats.t.ppf(0.975, 2) + stats.t.ppf(0.8, 2)) * ratios.std(ddof=1) / 3**0.5
    assert sentence.startswith(
        f"h: 3 seeds detect a gap of {100 * np.expm1(gap):.2f} % in about four of five cases; for one as"
    )
    needed = int(sentence.removesuffix(".").split()[-1])
    assert 10 < needed < 60
    # of two planned looks each has half of the 5 %, and of two settings the correction may ask for half of that
    third = seeds(tmp_path, "x", [0.5, 0.45, 0.4801], **{"loss.type": "l1"})
    found = contest(load_runs([*seeds(tmp_path / "again", "m", [0.5, 0.45, 0.48]), *other, *third]), looks=2)
    gap = (stats.t.ppf(1 - 0.05 / 8, 2) + stats.t.ppf(0.8, 2)) * ratios.std(ddof=1) / 3**0.5
    assert f"h: 3 seeds detect a gap of {100 * np.expm1(gap):.2f} % in about four" in " ".join(found.sentences)


@pytest.mark.parametrize(
    ("finals", "config", "verdict"),
    [
        ([0.4], {}, "no verdict: one seed has no spread"),
        ([0.4, math.nan], {}, "no verdict: a loss is not a finite number above 0"),
        ([0.4, 0.41], {"data.dataset": "other"}, "better"),
        ([0.4, 0.41], {"data.resolution": 64}, "unfair: different validation settings (data.resolution)"),
        ([0.4, 0.41], {"train.batch_size": 4}, "unfair: different numbers of samples seen"),
    ],
)
def test_no_verdict_that_statistics_do_not_carry(tmp_path, finals, config, verdict):
    other = seeds(tmp_path, "h", finals, **{"loss.type": "huber"}, **config)
    runs = load_runs(seeds(tmp_path, "m", [0.8, 0.8201]) + other)
    (row,) = rows_of(runs).values()
    assert row["verdict"].startswith(verdict)


def test_runs_without_a_seed_in_common_are_not_paired(tmp_path):
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b", config={"train.seed": 1, "loss.type": "huber"})
    assert rows_of(load_runs([a, b]))["b"]["verdict"] == "no verdict: no seed in common with the baseline"


def test_each_noise_level_counts_the_same(tmp_path):
    """The first level's losses are a hundred times those of the others, and 10 % higher; three are 10 % lower."""

    def with_bins(name, levels, loss):
        lines = [{"step": 40, "validation_loss": 1.0, "validation_loss_bins": levels}]
        return [
            write_run(tmp_path / f"{name}{seed}", metrics=lines, config={"train.seed": seed, "loss.type": loss})
            for seed in (0, 1)
        ]

    runs = load_runs(with_bins("m", [100, 1, 1, 1], "mse") + with_bins("h", [110, 0.9, 0.9, 0.9], "huber"))
    mean = (math.log(1.1) + 3 * math.log(0.9)) / 4
    assert rows_of(runs)["h"]["difference"] == f"{100 * math.expm1(mean):.2f} %"
    assert contest(runs).bins[1] == ["h", "+10.00 %", "-10.00 %", "-10.00 %", "-10.00 %"]


def test_the_bootstrap_draws_seeds_and_images_again(tmp_path):
    random, folders = np.random.default_rng(0), []
    triples = np.arange(64, dtype=np.int32)
    for name, factor in (("m", 1.0), ("h", 0.9)):
        folders += seeds(tmp_path, name, [0.5 * factor, 0.52 * factor, 0.51 * factor], **{"loss.type": name})
        for folder in folders[-3:]:
            losses = {"validation_loss_ema": (factor * random.uniform(0.3, 0.7, 64)).astype(np.float32)}
            (folder / "validation").mkdir()
            save_file(
                losses | {"image": triples % 7, "bin": triples % 4}, folder / "validation/step-000040.safetensors"
            )
    shown = rows_of(load_runs(folders))["h"]["over images, too"]
    low, high = (float(part.split()[0]) for part in shown.split(" to "))
    assert -35 < low < -10 < high < 15
    (folders[0] / "validation/step-000040.safetensors").write_bytes(b"damaged")
    with pytest.raises(InputError, match=r"step-000040.safetensors: "):
        contest(load_runs(folders))
    (folders[0] / "validation/step-000040.safetensors").unlink()
    assert rows_of(load_runs(folders))["h"]["over images, too"] == "–"


def test_seeds_of_one_setting_do_not_compete(tmp_path, capsys):
    folders = seeds(tmp_path, "m", [0.5, 0.4])
    assert contest(load_runs(folders)) is None
    main([str(folder) for folder in folders])
    assert "All runs are one setting: nothing to compare." in capsys.readouterr().out


# ── What differs, and what is unfair ─────────────────────────────────────────────────────────────────────────


def test_the_config_fields_that_differ_are_named(tmp_path):
    places = {"train.output_dir": "elsewhere", "train.resume_from": "latest", "train.overwrite": True}
    runs = pair(tmp_path, config={"loss.type": "huber", "optimizer.init_args": {"lr": 0.01}, **places})
    assert headline(runs) == "The runs differ in: loss.type, optimizer.init_args.lr"
    assert unfair(runs) == []


def test_equal_runs_differ_in_nothing(tmp_path):
    """A moved data set and another host are the same data and machine."""
    runs = pair(tmp_path, env={"host": "b"}, manifest={"data.train.dataset": "moved/here"})
    assert headline(runs) == "The runs differ in nothing that is recorded."


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("device", "NVIDIA H100"),
        ("num_processes", 2),
        ("mixed_precision", "bf16"),
        ("deterministic", True),
        ("versions.numpy", "2.1.0"),
        ("git.dirty", True),
    ],
)
def test_differences_outside_of_the_config_are_named_but_not_unfair(tmp_path, name, value):
    runs = pair(tmp_path, manifest={name: value})
    assert headline(runs) == f"The runs have the same config, but differ outside the config in: {name}"
    assert unfair(runs) == []


def test_the_machine_of_env_json_is_compared(tmp_path):
    runs = pair(tmp_path, env={"cpu_threads": 1, "cpu_capability": "AVX512"}, config={"loss.type": "huber"})
    expected = "The runs differ in: loss.type; and outside the config in: cpu_threads, cpu_capability"
    assert headline(runs) == expected


@pytest.mark.parametrize(
    ("second", "warning"),
    [
        ({"manifest": {"data.train.sha256": "e" * 64}}, "different data fingerprint (data.train.sha256)"),
        ({"manifest": {"data.validation.sha256": "e" * 64}}, "different data fingerprint (data.validation.sha256)"),
        ({"manifest": {"base_model.sha256.vae": "e" * 64}}, "different base model (base_model.sha256.vae)"),
        ({"manifest": {"git.commit": "e" * 40}}, "different code (git.commit)"),
        ({"manifest": {"git.diff": "+import this"}}, "different code (git.diff)"),
        ({"manifest": {"versions.torch": "2.8.0"}}, "different versions of torch or diffusers (versions.torch)"),
        ({"manifest": {"versions.diffusers": "1"}}, "different versions of torch or diffusers (versions.diffusers)"),
        ({"manifest": {"stream": 2}}, "different streams of samples, and so triples to validate on (stream)"),
        ({"config": {"evaluation.prompts": []}}, "different validation settings (evaluation.prompts)"),
        ({"config": {"data.validation_split": 0.1}}, "different validation settings (data.validation_split)"),
        (
            {"config": {"train.batch_size": 16}},
            "different numbers of samples seen (steps × batch size): 320 (a); 640 (b)",
        ),
        (
            {"metrics": [{"step": 30, "loss": 1.0}]},
            "different numbers of samples seen (steps × batch size): 320 (a); 240 (b)",
        ),
    ],
)
def test_unfair_comparisons(tmp_path, capsys, second, warning):
    assert unfair(pair(tmp_path, **second)) == [f"unfair: {warning}"]
    main([str(tmp_path / "a"), str(tmp_path / "b")])
    assert f"unfair: {warning}" in capsys.readouterr().out.splitlines()


def test_two_experts_are_judged_at_other_noise_levels(tmp_path):
    """Each is the denoiser of one run and a frozen part of the other."""
    experts = ("transformer", "transformer_2")
    digests = {f"base_model.sha256.{name}": name[-1] * 64 for name in experts}
    folders = [write_run(tmp_path / name, manifest=digests | {"base_model.denoiser": name}) for name in experts]
    assert unfair(load_runs(folders))[0].startswith("unfair: different base model")


def test_more_steps_of_smaller_batches_are_as_many_samples(tmp_path):
    metrics = [{"step": 20, "loss": 1.0}]
    runs = pair(tmp_path, config={"train.batch_size": 16, "train.max_steps": 20}, metrics=metrics)
    assert unfair(runs) == []


def test_what_a_terminal_would_obey_is_shown_instead(tmp_path, capsys):
    pair(tmp_path, manifest={"git.commit": "\x1b[31mred\x1b]0;title\x07"})
    main([str(tmp_path / "a"), str(tmp_path / "b")])
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and "\x07" not in printed and r"\x1b[31mred\x1b]0;title\x07" in printed


def test_the_verdict_says_that_the_comparison_is_unfair(tmp_path, capsys):
    pair(tmp_path, config={"evaluation.seed": 1})
    main([str(tmp_path / "a"), str(tmp_path / "b")])
    assert "unfair: different validation settings (evaluation.seed)" in capsys.readouterr().out.split("verdict")[1]


def test_a_long_verdict_has_lines_of_its_own(tmp_path, capsys):
    fields = [f"evaluation.a_field_of_a_long_name_{number}" for number in range(9)]
    pair(tmp_path, config=dict.fromkeys(fields, 1))
    main([str(tmp_path / "a"), str(tmp_path / "b")])
    table, _, below = capsys.readouterr().out.partition("p (Holm)")[2].partition("b: unfair: different validation s")
    assert table.split()[-1] == "unfair" and all(field in below for field in fields)
    assert max(map(len, (table + below).split("\n\n")[0].splitlines())) <= 120


def test_random_denoisers_of_different_seeds_are_fair(tmp_path):
    warning = ["unfair: different base model (base_model.sha256.denoiser)"]
    named = {"model.pretrained_model_name_or_path": "some/model"}
    assert unfair(pair(tmp_path / "builtin", config={"train.seed": 1})) == []
    # trained weights do not depend on the seed, random ones are the same for the same seed
    for name, scratch, expected in (("trained", False, warning), ("scratch", True, [])):
        config = named | {"model.train_from_scratch": scratch}
        folders = [write_run(tmp_path / f"{name}{s}", config=config | {"train.seed": s}) for s in (0, 1)]
        assert unfair(load_runs(folders)) == expected
    assert unfair(pair(tmp_path / "same seed", manifest={"base_model.sha256.unet": "e" * 64})) == warning
    other = {"train.seed": 1, "model.pretrained_model_name_or_path": "builtin:other"}
    assert unfair(pair(tmp_path / "other model", config=other)) == warning


def test_code_outside_of_git(tmp_path):
    outside = {"git.commit": None, "git.dirty": None, "git.diff": None}
    assert unfair(pair(tmp_path / "one", manifest=outside)) == ["unfair: different code (git.commit, git.diff)"]
    for name in "ab":
        write_run(tmp_path / name, config={"train.seed": ord(name)})
        manifest = json.loads((tmp_path / name / "run_manifest.json").read_text()) | {"git": None}
        (tmp_path / name / "run_manifest.json").write_text(json.dumps(manifest))
    runs = load_runs([tmp_path / "a", tmp_path / "b"])
    assert unfair(runs) == []
    assert notes(runs) == ["note: no run recorded a git commit: whether the code was the same is unknown"]
    runs = load_runs([tmp_path / "one" / "a", tmp_path / "b"])
    assert unfair(runs) == ["unfair: different code (git.commit, git.diff, git)"]


def test_notes_on_what_the_numbers_mean(tmp_path):
    metrics = [{"step": 10, "validation_loss_ema": 0.5}, {"step": 40, "loss": 1.0}]
    runs = pair(tmp_path, config={"loss.type": "huber"}, metrics=metrics)
    assert notes(runs) == [
        "note: b was last validated at step 10, not at its last step",
        "note: the training losses are of different objectives: do not compare them",
    ]


def test_samples_of_skipped_rows_are_noted_and_no_column(tmp_path):
    metrics = [{"step": step, "loss": 1.0, "skipped_rows": count} for step, count in ((10, 3), (20, 0), (40, 4))]
    runs = load_runs([write_run(tmp_path / "a", metrics=metrics)])
    assert notes(runs) == ["note: a took 7 samples from other rows than were due, which could not be read"]
    assert "skipped_rows" not in summary(runs[0])


def test_values_are_reported_in_one_line_with_their_runs(tmp_path):
    runs = load_runs([write_run(tmp_path / name) for name in "abc"])
    assert by_value(runs, ["mse", "huber", "mse"]) == "mse (a, c); huber (b)"
    assert brief("0123456789abcdef" * 4) == "0123456789ab"
    assert brief("") == "(empty)" and brief(as_text(None)) == "null"
    one, two = ("diff --git a/some/long/file/name.py\n+" + line for line in ("first", "second"))
    assert "\n" not in brief(one) and brief(one) != brief(two)


# ── The HTML report ──────────────────────────────────────────────────────────────────────────────────────────


def report(folders: list[Path], path: Path) -> ElementTree.Element:
    """The report as a tree; a parse error if it is not well-formed."""
    main([*map(str, folders), "--output", str(path)])
    text = path.read_text(encoding="utf-8")
    assert "http" not in text and "<script" not in text and "<link" not in text and "url(" not in text
    return ElementTree.fromstring(text.removeprefix("<!DOCTYPE html>"))


def polylines(tree: ElementTree.Element, title: str) -> list[list[tuple[float, float]]]:
    (svg,) = (svg for svg in tree.iter("svg") if svg.get("aria-label").startswith(title))
    return [[tuple(map(float, p.split(","))) for p in line.get("points").split()] for line in svg.iter("polyline")]


def test_charts_show_the_data(tmp_path):
    tree = report([write_run(tmp_path / "a"), write_run(tmp_path / "b", (0.3, 0.2))], tmp_path / "report.html")
    # faint and smoothed for each run; losses from 10/10 at step 10 to 10/40 at step 40 fill the frame
    training = polylines(tree, "Training loss")
    assert len(training) == 4 and training[0] == training[2]
    assert [training[0][0], training[0][-1]] == [(LEFT, TOP), (RIGHT, BOTTOM)]
    second = LEFT + (RIGHT - LEFT) / 3, TOP + (BOTTOM - TOP) * (1 - 0.5) / 0.75  # 0.5 at step 20
    assert training[0][1] == pytest.approx(second, abs=0.06)
    assert training[1][1] == pytest.approx((second[0], TOP + (BOTTOM - TOP) * (1 - 11 / 18) / 0.75), abs=0.06)
    # from 0.5 (a, step 20) down to 0.2 (b, step 40)
    middle = TOP + (BOTTOM - TOP) / 3  # 0.4
    assert polylines(tree, "Validation loss") == [
        [(LEFT, TOP), (RIGHT, pytest.approx(middle, abs=0.06))],
        [(LEFT, pytest.approx(2 * middle - TOP, abs=0.06)), (RIGHT, BOTTOM)],
    ]
    # bins at step 40: 0.8 and 0.4 for a, 0.4 and 0.2 for b
    assert polylines(tree, "Last validation loss")[0][0] == (LEFT, TOP)
    assert polylines(tree, "Last validation loss")[1][1] == (RIGHT, BOTTOM)


def test_charts_have_ticks_and_a_legend(tmp_path):
    tree = report([write_run(tmp_path / "a"), write_run(tmp_path / "b", (0.3, 0.2))], tmp_path / "report.html")
    svg = list(tree.iter("svg"))[1]
    texts = ["".join(text.itertext()) for text in svg.iter("text")]
    assert {"0.2", "0.3", "0.4", "0.5", "20", "30", "40", "step"} <= {*texts}
    assert texts[-2:] == ["aa", "bb"]  # the title that shows under the pointer, and the label
    colors = [line.get("stroke") for line in svg.iter("polyline")]
    assert len(colors) == len({*colors}) == 2


def test_the_last_sample_of_each_run_is_in_the_file(tmp_path):
    folders = [write_run(tmp_path / name) for name in "abc"]
    for folder, color in zip(folders[:2], ("red", "blue"), strict=True):
        (folder / "samples").mkdir()
        for step in (999999, 1000000, 20):  # seven digits sort before six as text
            Image.new("RGB", (4, 4), color if step == 1000000 else "black").save(
                folder / "samples" / f"step-{step:06d}.png"
            )
    tree = report(folders, tmp_path / "new folder" / "report.html")
    images = [image.get("src").removeprefix("data:image/png;base64,") for image in tree.iter("img")]
    expected = [(folder / "samples" / "step-1000000.png").read_bytes() for folder in folders[:2]]
    assert [base64.b64decode(image, validate=True) for image in images] == expected
    captions = [caption.text for caption in tree.iter("figcaption")]
    assert captions == ["a, step 1000000", "b, step 1000000", "c, no samples"]


def test_the_report_holds_tables_differences_and_warnings_and_escapes_them(tmp_path):
    strange = '<img src=x onerror="alert(1)"> & co'
    second = write_run(tmp_path / "<b>&", (0.5, 0.3), {"loss.type": strange}, {"git.commit": "e" * 40})
    (second / "samples").mkdir()
    Image.new("RGB", (4, 4)).save(second / "samples" / "step-000040.png")
    tree = report([write_run(tmp_path / "a"), second], tmp_path / "report.html")
    assert [image.get("alt") for image in tree.iter("img")] == ["<b>&, step 40"]
    text = " ".join("".join(tree.itertext()).split())
    assert "The runs differ in: loss.type; and outside the config in: git.commit" in text
    assert strange in text and "unfair: different code (git.commit)" in text
    assert [p.text for p in tree.iter("p") if p.get("class") == "unfair"] == ["unfair: different code (git.commit)"]
    cells = [[cell.text for cell in row] for row in tree.iter("tr")]
    assert ["a", "40", "0.4000", "0.4000 @ 40", "0.2000", "0.2500", "25.00"] in cells
    assert ["loss.type", "mse", strange] in cells
    assert ["a", "40", "0.8000", "0.4000"] in cells


def test_a_report_of_little(tmp_path):
    """One run of one line; and values that cannot be drawn."""
    tree = report([write_run(tmp_path / "a", metrics=[{"step": 1, "loss": 0.5}])], tmp_path / "one.html")
    assert polylines(tree, "Training loss")[0] == [(LEFT, (TOP + BOTTOM) / 2)]
    tree = report([write_run(tmp_path / "b", (0.5, math.nan))], tmp_path / "nan.html")
    assert polylines(tree, "Validation loss") == [[(LEFT, (TOP + BOTTOM) / 2)]]
    tree = report([write_run(tmp_path / "all nan", (math.nan, math.nan))], tmp_path / "all-nan.html")
    assert [cell.text for cell in tree.iter("td")][2:4] == ["nan", "nan"]
    assert [svg.get("aria-label")[:8] for svg in tree.iter("svg")] == ["Training"]
    tree = report([write_run(tmp_path / "c", metrics=[{"step": 1}])], tmp_path / "none.html")
    assert not list(tree.iter("svg"))


def test_smoothing_is_light_and_keeps_the_ends():
    assert smooth([(0, 1.0), (1, 4.0), (2, 1.0), (3, 7.0)]) == [(0, 1.0), (1, 2.0), (2, 4.0), (3, 7.0)]
    assert smooth([]) == []


def test_ticks_are_round():
    assert ticks(0.21, 1.02) == pytest.approx([0.4, 0.6, 0.8, 1.0])
    assert ticks(10, 40, smallest=1) == [10, 20, 30, 40]
    assert ticks(1, 3, smallest=1) == [1, 2, 3]
    assert ticks(-0.1, 0.1) == pytest.approx([-0.1, -0.05, 0, 0.05, 0.1])


# ── What is refused ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.resolved.yaml", None, r"run: not the output folder of a run: it has no config.resolved.yaml"),
        ("run_manifest.json", None, r"run: not the output folder of a run: it has no run_manifest.json"),
        ("env.json", None, r"run: not the output folder of a run: it has no env.json"),
        ("metrics.jsonl", None, r"run/metrics.jsonl: no such file; the run has not logged a step"),
        ("metrics.jsonl", "", r"run/metrics.jsonl: empty; the run has not logged a step"),
        ("metrics.jsonl", '{"step": 1, "lo', r"run/metrics.jsonl: empty; the run has not logged a step"),
        ("metrics.jsonl", '{"step": 1}\n{"st\n{"step": 3}\n', r"run/metrics.jsonl line 2: not JSON: "),
        ("metrics.jsonl", '{"step": 1}\n[2]\n', r"run/metrics.jsonl line 2: must be a JSON object with a step"),
        ("metrics.jsonl", '{"loss": 1}\n', r"run/metrics.jsonl line 1: must be a JSON object with a step"),
        ("metrics.jsonl", b"\xff\xfe\n", r"run/metrics.jsonl line 1: not JSON: .*utf-8"),
        ("config.resolved.yaml", "model: [", r"run/config.resolved.yaml: not YAML: "),
        ("config.resolved.yaml", "!!python/object/apply:os.getcwd []", r"run/config.resolved.yaml: not YAML: .*python"),
        ("config.resolved.yaml", "- a list", r"run/config.resolved.yaml: must hold a mapping"),
        ("config.resolved.yaml", b"\xff\xfe\xfd", r"run/config.resolved.yaml: not YAML: "),
        ("run_manifest.json", "{", r"run/run_manifest.json: not JSON: "),
        ("run_manifest.json", '{"segments": null}', r"run/run_manifest.json: damaged: .*NoneType.* not iterable"),
        ("run_manifest.json", '{"segments": ["a"]}', r"run/run_manifest.json: damaged: 'str' object has no "),
        ("config.resolved.yaml", "train: {seed: [1]}", r"run/config.resolved.yaml: train.seed: must be a whole number"),
        ("env.json", "3", r"run/env.json: must hold a mapping"),
    ],
)
def test_damaged_runs_are_refused_in_one_line(tmp_path, file, content, message):
    path = write_run(tmp_path / "run") / file
    path.unlink()
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message) as error:
        main([str(tmp_path / "run")])
    assert "\n" not in str(error.value)


def test_wrong_arguments_are_refused(tmp_path):
    run = str(write_run(tmp_path / "a"))
    with pytest.raises(InputError, match="no RUN: give the output folder of at least one run"):
        main([])
    with pytest.raises(InputError, match="nowhere: no such folder"):
        main([run, str(tmp_path / "nowhere")])
    with pytest.raises(InputError, match=r"env\.json: not a folder"):
        main([f"{run}/env.json"])
    with pytest.raises(InputError, match="a: given twice"):
        main([run, run + "/"])
    for name in ("report.png", "report", "report.html.gz"):
        with pytest.raises(InputError, match=rf"--output {name}: must end in \.html"):
            main([run, "--output", name])
    with pytest.raises(InputError, match=r"--output .*config.resolved.yaml/report.html: .*"):
        main([run, "--output", f"{run}/config.resolved.yaml/report.html"])


def test_names_are_as_short_as_they_can_be(tmp_path):
    folders = [write_run(tmp_path / name) for name in ("mse/0", "huber/0", "huber/1")]
    assert [run.name for run in load_runs(folders)] == ["mse/0", "huber/0", "huber/1"]
    assert [run.name for run in load_runs(folders[1:])] == ["0", "1"]


@pytest.mark.parametrize("command", ["compare", "report"])
def test_starts_without_torch_and_reports_errors_in_one_line(tmp_path, command):
    code = (
        f"import sys, difftrain_utils.commands.{command} as c; c.main(sys.argv[1:]); assert 'torch' not in sys.modules"
    )
    run, html = str(write_run(tmp_path / "a")), str(tmp_path / "report.html")
    assert subprocess.run([sys.executable, "-c", code, run, "--output", html]).returncode == 0
    done = difftrain(command, str(tmp_path / "nowhere"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {tmp_path / 'nowhere'}: no such folder\n"


def test_groups_are_called_after_their_runs(tmp_path):
    """By how the names begin; the differences then name the group instead of each run."""
    names = ["dream_p1-0", "dream_p1-1", "dream_p10-0", "dream_p10-1", "x-seed-10", "x-seed-11", "one", "two"]
    configs = [{"loss.huber_c": 0.1 * (i // 2 + 1), "train.seed": i % 2} for i in range(8)]
    runs = load_runs([write_run(tmp_path / name, config=c) for name, c in zip(names, configs, strict=True)])
    assert list(group_names(settings_of(runs)).values()) == [
        "dream_p1", "dream_p1", "dream_p10", "dream_p10", "x", "x", "group D", "group D",
    ]  # fmt: skip
    assert by_value(runs, list("aabbbcdd")) == "a (dream_p1-*); b (dream_p10-*, x-seed-10); c (x-seed-11); d (one, two)"


def test_a_run_that_was_resumed_with_other_code_is_reported(tmp_path):
    segments = [{"from_step": 0}, {"from_step": 20, "differs": {"git": {"commit": "e"}, "num_processes": 2}}]
    runs = [
        write_run(tmp_path / "a"),
        write_run(tmp_path / "b", config={"train.seed": 1}, manifest={"segments": segments}),
    ]
    runs = load_runs(runs)
    assert headline(runs).endswith("differ in: train.seed; and outside the config in: resumed with other")
    assert by_value(runs, [run.facts.get("resumed with other", "-") for run in runs]) == "- (a); git, num_processes (b)"
    assert unfair(runs) == ["unfair: different code (resumed with other)"]
