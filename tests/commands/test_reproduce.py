"""Runs that are run again: what is reported about them, and the verdict on what came out."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT, SCRIPT, launch_two, metrics_without_times, pipeline_bytes, short_options, train
from PIL import Image
from safetensors.torch import save_file
from warm import Run

from difftrain_utils.commands.compare import load_run, read_mapping
from difftrain_utils.commands.repetition import (
    Deviation,
    Weights,
    changes,
    circumstances,
    compare_weights,
    deviations,
    likely_reasons,
    verdict,
)
from difftrain_utils.commands.reproduce import describe_segments, main, overrides, rerun_environment, steps_to_compare
from difftrain_utils.errors import InputError
from difftrain_utils.files import file_digest
from difftrain_utils.terminal import STOPPED

SAME = Weights("final weights", "abc", True)


@pytest.fixture(scope="module", autouse=True)
def as_the_script(tmp_path_factory):
    """Runs in this process record the script's command; relative paths are those of the repository."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("sys.argv", [str(SCRIPT)])
        monkeypatch.setenv("PYTHONPATH", str(ROOT))
        yield


@pytest.fixture(scope="module")
def images(image_folder, tmp_path_factory) -> Path:
    return shutil.copytree(image_folder, tmp_path_factory.mktemp("images") / "shapes")


@pytest.fixture(scope="module")
def resumed_run(checkpoint_folder, images, tmp_path_factory) -> Path:
    """Six steps in two segments: stopped after the first one, then resumed."""
    argv = short_options(checkpoint_folder, images, tmp_path_factory.mktemp("runs") / "run")
    validation = ["--data.validation_dataset", str(images), "--evaluation.num_validation_samples", "8"]
    argv += [*validation, "--train.eval_every", "3"]
    train([*argv, "--train.max_hours", "1e-9"], exit_code=STOPPED)
    return train([*argv, "--resume-from", "latest"])


@pytest.fixture(scope="module")
def again(resumed_run) -> tuple[Path, int]:
    """The re-run, and reproduce's exit code."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        start_warm(monkeypatch)
        return Path(f"{resumed_run}-reproduced"), main([str(resumed_run)])


@pytest.fixture
def warm(monkeypatch):
    start_warm(monkeypatch)


def start_warm(monkeypatch) -> None:
    """Re-runs start without python's seconds."""
    warm = SimpleNamespace(Popen=lambda command, env: Run(Path(command[1]), command[2:], env))
    monkeypatch.setattr("difftrain_utils.commands.reproduce.subprocess", warm)


@pytest.fixture
def copied_run(resumed_run, tmp_path) -> Path:
    return shutil.copytree(resumed_run, tmp_path / "run")


def edit(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


# ── The command ──────────────────────────────────────────────────────────────────────────────────────────────
def test_a_resumed_run_comes_out_the_same_in_one_piece(resumed_run, again):
    folder, code = again
    assert code == 0
    assert pipeline_bytes(folder) == pipeline_bytes(resumed_run)
    assert metrics_without_times(folder) == metrics_without_times(resumed_run)
    assert len(read_mapping(folder / "run_manifest.json")["segments"]) == 1


def test_the_first_steps_alone_and_what_is_reported(warm, resumed_run, tmp_path, capfd):
    # checkpoint-4 is there: metrics and weights are compared, and the re-run stops before its end
    assert main([str(resumed_run), "--steps", "4", "--output-dir", str(tmp_path / "new")]) == 0
    lines = [line for line in capfd.readouterr().out.splitlines() if line]
    assert lines[0] == f"The run {resumed_run} had 2 segments, reproduced in one piece:"
    assert lines[1].endswith(", from step 0 to 1 (train.max_hours 1e-09)")
    assert lines[2].endswith(", from step 1 to 6 (finished)")
    assert lines[3] == "Differences in code, hardware and versions: none"
    assert "Further differences (data, base model, config, device): none" in lines
    assert "The re-run has saved checkpoint-4, all that is compared: stopping it" in lines
    assert lines[-1].startswith("bit-identical: the first 4 steps, 4 lines of metrics, weights of checkpoint-4 ")
    assert read_mapping(tmp_path / "new/run_manifest.json").get("final") is None or (tmp_path / "new/pipeline").exists()


def test_one_pixel_makes_another_run_and_the_data_is_named(warm, resumed_run, images, tmp_path, capfd):
    path = images / "000003.png"
    before = path.read_bytes()
    with Image.open(path) as image:
        pixels = image.convert("RGB")
    pixels.putpixel((18, 18), tuple(255 - value for value in pixels.getpixel((18, 18))))
    pixels.save(path)
    try:
        assert main([str(resumed_run), "--output-dir", str(tmp_path / "new")]) == 1
    finally:
        path.write_bytes(before)
    out = capfd.readouterr().out
    differs, likely, first = out[out.index("\ndiffers from step ") + 1 :].splitlines()[:3]
    step = int(differs.split()[3])
    then, now = (metrics_without_times(run) for run in (resumed_run, tmp_path / "new"))
    assert then[step - 1]["loss"] != now[step - 1]["loss"] and 1 <= step <= 3  # an epoch is two and a half steps
    assert likely == "likely because of:" and first.startswith("  data: data.train.sha256 ")
    assert out.index("  data: data.train.sha256") < out.index("differs from step")  # reported when the re-run starts


@pytest.mark.slow
def test_two_processes(checkpoint_folder, images, tmp_path, capfd):
    result = launch_two(short_options(checkpoint_folder, images, tmp_path / "run"))
    assert result.returncode == 0, result.stderr
    assert main([str(tmp_path / "run")]) == 0
    assert "bit-identical: 6 steps" in capfd.readouterr().out
    assert read_mapping(tmp_path / "run-reproduced/run_manifest.json")["num_processes"] == 2
    assert main([str(tmp_path / "run"), "--steps", "4", "--output-dir", str(tmp_path / "first")]) == 0


# ── Refusals ─────────────────────────────────────────────────────────────────────────────────────────────────
def test_what_cannot_be_run_again_is_refused(copied_run, tmp_path):
    def refused(message: str, *argv: str) -> None:
        with pytest.raises(InputError, match=message):
            main([str(copied_run), *argv])

    manifest = copied_run / "run_manifest.json"
    refused("--steps 7: must be from 1 to 6, the steps that", "--steps", "7")
    refused("run: already there; give another --output-dir", "--output-dir", str(copied_run))
    edit(manifest, lambda m: m["segments"][0].update(resumed_from=str(tmp_path / "checkpoint-3"), from_step=3))
    refused("branched off at step 3 from .*checkpoint-3, and can only be run again from there: no such folder")
    shutil.copytree(copied_run / "checkpoint-4", tmp_path / "checkpoint-3")
    (tmp_path / "checkpoint-3/denoiser.safetensors").write_bytes(b"")
    refused("from there: denoiser.safetensors has not the SHA-256")
    edit(manifest, lambda m: m["segments"][0].pop("resumed_from"))
    edit(manifest, lambda m: m.update(script_sha256="0" * 64))
    refused(r"train_text_to_image.py is not what it was when the run was made; --trust runs it: .*python.* --config ")
    foreign = tmp_path / "evil.py"
    foreign.write_text("open('evil', 'w')")
    edit(manifest, lambda m: m.update(command=[str(foreign)], script_sha256=file_digest(foreign)))
    refused(rf"was made by {foreign}, which is neither in this folder nor beside the package; --trust runs it: ")
    edit(manifest, lambda m: m.update(command=["no/such_script.py"]))
    refused("was made by no/such_script.py, which is not here")
    edit(manifest, lambda m: m.pop("final"))
    refused("the run is not finished, it is at step 6 of 6; --steps N compares its first N steps")
    edit(manifest, lambda m: m.pop("segments"))
    refused("not the files of a run: 'segments'")
    (copied_run / "env.json").unlink()
    refused("not the output folder of a run: it has no env.json")


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (["no.jsonl:1", "--steps", "4"], "--steps: is of a run, and no.jsonl:1 is a line of a ledger"),
        (["no.jsonl:1", "--output-dir", "a"], "--output-dir: is of a run, and no.jsonl:1 is a line of a ledger"),
        (["no.jsonl:1", "--rerun", "0"], "--rerun: must be at least 1, got 0"),
        (["runs/no", "--rerun", "2"], "--rerun: is of a line of a ledger, and runs/no is a run"),
    ],
)
def test_options_without_effect(argv, reason):
    with pytest.raises(InputError, match=f"^{reason}$"):
        main(argv)


@pytest.mark.slow
def test_the_scripts_own_refusal_is_passed_on(copied_run, tmp_path, capfd):
    config = copied_run / "config.resolved.yaml"
    config.write_text(
        config.read_text().replace("pretrained_model_name_or_path: /", "pretrained_model_name_or_path: /no/")
    )
    with pytest.raises(InputError, match="the re-run was refused: see above"):
        main([str(copied_run)])
    assert "error: model.pretrained_model_name_or_path: /no/" in capfd.readouterr().err
    assert not Path(f"{copied_run}-reproduced").exists()


def test_which_steps_can_be_compared(copied_run, capsys):
    run, manifest = load_run(copied_run, "run"), read_mapping(copied_run / "run_manifest.json")
    assert [steps_to_compare(run, manifest, n) for n in (None, 6, 4)] == [(None, True), (None, True), (4, True)]
    run.metrics[:] = [entry for entry in run.metrics if entry["step"] % 2 == 0]  # as with train.log_every 2
    assert steps_to_compare(run, manifest, 3) == (2, False)
    assert "has no checkpoint-3); rounded down to step 2, the last line of metrics" in capsys.readouterr().out
    (copied_run / "checkpoint-4/denoiser.safetensors").write_bytes(b"")
    assert steps_to_compare(run, manifest, 4) == (4, False)
    assert "no weights to compare (denoiser.safetensors has not the SHA-256" in capsys.readouterr().out
    with pytest.raises(InputError, match="--steps 1: no line of metrics up to there, the first is that of step 2"):
        steps_to_compare(run, manifest, 1)


# ── Settings of the re-run ───────────────────────────────────────────────────────────────────────────────────
def test_the_learning_rate_stays_that_of_the_whole_run(resumed_run):
    run, manifest = load_run(resumed_run, "run"), read_mapping(resumed_run / "run_manifest.json")
    assert "train.max_steps" not in overrides(run, manifest, None, 4)
    assert overrides(run, manifest, None, 4)["train.save_every"] == "4"
    assert overrides(run, manifest | {"mixed_precision": "bf16"}, None, None)["train.precision"] == "bf16"
    run.config["train.precision"] = "fp32"
    assert "train.precision" not in overrides(run, manifest, None, None)


def test_threads_and_device_are_those_of_then(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("MKL_NUM_THREADS", "7")
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    recorded = {"cpu_threads": 4, "environment": {"OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "0"}}
    variables = rerun_environment({"device": "cpu"}, recorded)
    assert variables["OMP_NUM_THREADS"] == "2" and "MKL_NUM_THREADS" not in variables
    assert variables["HF_HUB_OFFLINE"] == "1" and variables["ACCELERATE_USE_CPU"] == "true"
    assert rerun_environment({"device": "A GPU"}, recorded | {"environment": {}})["OMP_NUM_THREADS"] == "4"
    assert "ACCELERATE_USE_CPU" not in rerun_environment({"device": "A GPU"}, recorded)


# ── Then and now ─────────────────────────────────────────────────────────────────────────────────────────────
def test_differences_come_in_the_order_of_suspicion(resumed_run):
    files = ("run_manifest.json", "env.json")
    config, (manifest, env) = load_run(resumed_run, "").config, (read_mapping(resumed_run / name) for name in files)
    then = circumstances(config, manifest, env)
    assert changes(then, dict(then)) == []
    now = dict(then) | {"deterministic": True, "cpu_threads": 9, "versions.torch": "1.0", "processor": "Z80"}
    now |= {"package.foo": "1", "package.torch": "1.0", "mixed_precision": "bf16", "git.commit": "d" * 40}
    now |= {"config.train.seed": 5, "base_model.sha256.unet": "e" * 64, "data.train.sha256": "f" * 64}
    lines = changes(then, now)
    starts = (
        "data: data.train.sha256 ",
        "base model: base_model.sha256.unet ",
        "config: config.train.seed 0 then, 5 now",
    )
    starts += ("code: git.commit ", "precision: mixed_precision no then, bf16 now", "hardware: processor ")
    starts += ("versions: versions.torch ", "threads: cpu_threads 1 then, 9 now", "determinism: deterministic ")
    starts += ("versions: 1 other packages (foo)",)
    assert [line.startswith(start) for line, start in zip(lines, starts, strict=True)] == [True] * len(starts)


def test_reasons_that_lie_in_the_run_itself(copied_run):
    run, manifest = load_run(copied_run, "run"), read_mapping(copied_run / "run_manifest.json")
    resumed = "the run was resumed: of its settings, only those of its last start are recorded"
    assert likely_reasons(run, manifest, ["data"]) == ["data", resumed]
    manifest["segments"][1]["differs"] = {"versions": {}, "host": "b"}
    manifest["device"] = "A GPU"
    path = copied_run / "metrics.jsonl"
    path.write_text(path.read_text().replace('"step": 3, "loss": ', '"step": 3, "loss": 1'))
    first, *others = likely_reasons(run, manifest, [])
    assert "metrics.jsonl was changed after the run" in first
    assert others[0] == "segment 2 of the run was with other versions, host than the first"
    assert others[2] == "determinism: train.deterministic was off on a GPU (A GPU)"


def test_a_killed_segment_has_no_end():
    segment = {"started": "Monday", "host": "a", "from_step": 0, "differs": {"git": {}}}
    assert describe_segments([segment]) == [
        "1: Monday on a, from step 0 to no recorded end (killed); other than at first: git"
    ]


def scaled(metrics: list[dict], step: int, name: str, factor: float) -> list[dict]:
    return [e | {name: e[name] * factor} if e["step"] == step else e for e in metrics]


def test_metrics_decide(resumed_run):
    then = load_run(resumed_run, "run").metrics
    slower = [entry | {"samples_per_second": 0.1} for entry in then]
    assert verdict("6 steps", deviations(then, slower), SAME, []) == ("bit-identical: 6 steps, final weights abc", 0)

    text, code = verdict("6 steps", deviations(then, scaled(then, 3, "loss", 1 + 1e-7)), SAME, ["data"])
    assert code == 0
    assert text == (
        "equal within a tolerance: largest relative difference of a metric 1e-07 (allowed 1e-05), in loss at step 3; "
        "final weights abc; 6 steps"
    )
    text, code = verdict("", deviations(then, scaled(scaled(then, 5, "loss", 1.1), 3, "lr", 1 + 1e-7)), SAME, ["data"])
    was = then[4]["loss"]
    assert code == 1
    assert text == (
        f"differs from step 5 on (in the last bits from step 3 on): loss {was:.7g} then, {1.1 * was:.7g} now; "
        "final weights abc\nlikely because of:\n  data"
    )
    # a validation loss counts like a loss, each of its bins too
    assert verdict("", deviations(then, scaled(then, 6, "validation_loss", 1.1)), SAME, [])[1] == 1
    bins = [value * (1 + 1e-4 * (i == 7)) for i, value in enumerate(then[5]["validation_loss_bins"])]
    found = deviations(then, [*then[:5], then[5] | {"validation_loss_bins": bins}])
    assert [(d.step, d.name) for d in found] == [(6, "validation_loss_bins.7")] and found[0].relative > 9e-5
    # a line or a value that only one of them has
    assert {d.step for d in deviations(then, then[:5])} == {6} and verdict("", deviations(then, then[:5]), SAME, [])[1]
    text, _ = verdict("", deviations([{"step": 1, "loss": 0.5}], [{"step": 1}]), SAME, [])
    assert text.startswith("differs from step 1 on: loss 0.5 then, absent now")
    assert "no difference is recorded: perhaps of kernels that are not deterministic" in text


def test_what_is_not_finite():
    assert deviations([{"step": 1, "loss": math.nan}], [{"step": 1, "loss": math.nan}]) == []
    assert Deviation(1, "loss", math.nan, 0.5).relative == math.inf
    assert Deviation(1, "loss", 0.0, -0.0).relative == 0


def test_weights_decide_too(tmp_path):
    torch.manual_seed(0)
    tensors = {"a": torch.randn(4, 4), "b": torch.randn(3)}
    norm = math.sqrt(sum(tensor.square().sum().item() for tensor in tensors.values()))

    def compared(change: dict[str, torch.Tensor]) -> Weights:
        for name, content in (("then", tensors), ("now", tensors | change)):
            (tmp_path / name).mkdir(exist_ok=True)
            save_file(content, tmp_path / name / "model.safetensors")
        digests = [{"raw": "x", "pipeline": "p"}, {"raw": "y", "pipeline": "p"}]
        return compare_weights("final weights", [tmp_path / "then", tmp_path / "now"], digests)

    shift = torch.zeros(4, 4)
    shift[2, 1] = 1e-5
    near = compared({"a": tensors["a"] + shift})
    assert not near.same and near.digest == "p"
    assert near.largest == pytest.approx(1e-5, rel=0.05) and near.relative == pytest.approx(1e-5 / norm, rel=0.05)
    assert verdict("6 steps", [], near, [])[0].startswith("equal within a tolerance: all metrics are the same; final ")
    far = compared({"a": tensors["a"] + 100 * shift})
    text, code = verdict("6 steps", [], far, [])
    assert code == 1 and text.startswith("differs in the weights: final weights differ by 0.001 in the number")
    for unknown in (compared({"a": torch.zeros(2)}), compared({"b": torch.full((3,), math.nan)})):
        assert unknown.relative == math.inf and verdict("", [], unknown, [])[1] == 1
    assert verdict("2 steps", [], None, []) == ("bit-identical: 2 steps, no weights to compare", 0)
