"""Faults injected into real runs: kills at any moment, disks that fail, checkpoints that rot."""

import contextlib
import random
import re
import time
from pathlib import Path

import psutil  # accelerate brings it
import pytest
from helpers import (
    BUCKETS,
    CACHES,
    assert_refused,
    launch,
    launch_environment,
    metrics_without_times,
    options,
    parse_config,
    pipeline_bytes,
    start,
    start_two,
    train,
)
from warm import Run, faults_library

from difftrain_utils.errors import InputError
from difftrain_utils.files import PARTIAL
from difftrain_utils.run.checkpoints import find_checkpoint
from difftrain_utils.run.run_folder import list_checkpoints

HERE = Path(__file__).parent
ENOSPC, EIO, KILL = 28, 5, 0  # as faults.c takes them


@pytest.fixture
def faults() -> None:
    if faults_library() is None:
        pytest.skip("needs Linux and a C compiler")


def fault(path: str, at: int, error: int) -> dict[str, str]:
    """Environment variables that let the `at`-th operation on files named like `path` fail."""
    return {"FAULT_PATH": path, "FAULT_AT": str(at), "FAULT_ERROR": str(error)}


def start_processes(argv: list[str], num_processes: int, environment: dict[str, str]) -> list[Run]:
    if num_processes == 1:
        return [start(argv, environment=environment)]
    return start_two(argv, environment=environment)


def kill(runs: list[Run]) -> None:
    """SIGKILL for all that are left, and their workers."""
    for run in runs:
        if run.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended by itself
                for worker in psutil.Process(run.pid).children(recursive=True):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        worker.kill()
            run.kill()
            run.wait()


LINE = 250  # bytes of a line of metrics.jsonl, about


def run_with_kills(argv, output_dir, kills, num_processes, seed) -> int:
    """Start again and again, killed at random moments and, every third time, at a random file operation of its first
    save, then let it end. Returns how many kills left half a checkpoint behind."""
    chance, inside_a_save, done = random.Random(seed), 0, 0
    command = [*argv, "--output-dir", str(output_dir), "--resume-from", "latest"]
    while done < kills:
        in_save = done % 3 == 2
        environment = fault("/checkpoint-", chance.randint(1, 25), KILL) if in_save else {}
        metrics = output_dir / "metrics.jsonl"
        before = metrics.stat().st_mtime_ns if metrics.exists() else 0
        runs, until = start_processes(command, num_processes, environment), None
        while all(run.poll() is None for run in runs):
            if not in_save and metrics.exists() and metrics.stat().st_mtime_ns != before:
                if until is None:
                    until, first = time.monotonic() + chance.uniform(0, 1.5), metrics.stat().st_size
                # a fast machine would be at the end by then
                if time.monotonic() >= until or metrics.stat().st_size > 3 * LINE + first:
                    break
            time.sleep(0.005)
        if in_save and num_processes == 1:
            assert runs[0].poll() in (-9, 0)
        kill(runs)  # the others, where one was killed, as a launcher does
        assert not (output_dir / "pipeline").exists(), "the run is too short for so many kills"
        inside_a_save += bool(list(output_dir.glob(f"checkpoint-*{PARTIAL}")))
        done += 1
    assert [run.wait() for run in start_processes(command, num_processes, {})] == [0] * num_processes
    return inside_a_save


def assert_same_end(run: Path, unbroken: Path) -> None:
    assert pipeline_bytes(run) == pipeline_bytes(unbroken)
    assert metrics_without_times(run) == metrics_without_times(unbroken)
    assert list(run.glob(f"*{PARTIAL}")) == []


STREAM = {"data.streaming": True, "data.shuffle_buffer": 4}


@pytest.mark.parametrize(
    ("kills", "num_processes", "accumulation", "fields"),
    [
        (3, 1, 4, {}),
        *(pytest.param(9, n, a, {}, marks=pytest.mark.slow) for n, a in ((1, 1), (2, 4))),
        *(pytest.param(3, 2, 2, data, marks=pytest.mark.slow) for data in (CACHES | BUCKETS, STREAM)),
        pytest.param(3, 1, 2, {"model.lora.rank": 4, "model.lora.merge": True}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_killed_again_and_again_a_run_ends_with_the_same_bytes(
    short_run, tmp_path, faults, kills, num_processes, accumulation, fields
):
    fields = fields | {
        "train.max_steps": 15 * kills,
        "train.batch_size": 8,
        "train.gradient_accumulation_steps": accumulation,
    }
    # epochs of 10 images are crossed, and the loss of a line is that of 3 steps while every second is saved
    fields |= {"lr_scheduler.num_warmup_steps": 9, "train.log_every": 3, "data.num_workers": 1}
    argv = [*short_run, *options(fields)]
    unbroken = start_processes([*argv, "--output-dir", str(tmp_path / "unbroken")], num_processes, {})
    assert [run.wait() for run in unbroken] == [0] * num_processes
    inside = run_with_kills(argv, tmp_path / "killed", kills, num_processes, seed=accumulation)
    assert_same_end(tmp_path / "killed", tmp_path / "unbroken")
    assert inside >= 1


@pytest.mark.parametrize("error", [ENOSPC, EIO])
def test_a_write_that_fails_anywhere_in_a_save_loses_nothing(tmp_path, faults, error):
    environment = launch_environment() | fault(PARTIAL, -1, error)
    result = Run(HERE / "saves.py", [str(tmp_path), str(error)], environment).completed()
    assert result.returncode == 0, result.stderr
    failed, operations = (int(word) for word in result.stdout.split() if word.isdigit())
    assert failed >= operations - 1 > 40


def test_a_run_outlives_a_full_disk(short_run, tmp_path, faults):
    """The first save fails; the run goes on, and ends like one that had no such trouble."""
    unbroken = train([*short_run, "--output-dir", str(tmp_path / "unbroken")])
    run = tmp_path / "run"
    result = launch(short_run, environment=fault("checkpoint-2.partial", 9, ENOSPC))
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("warning: ")]
    assert len(lines) == 1 and f"cannot save {run}/checkpoint-2: " in lines[0]
    assert lines[0].endswith("training goes on, there is no checkpoint yet")
    assert_same_end(run, unbroken)
    assert [step for step, _ in list_checkpoints(run)] == [4, 6]


BESIDE = {
    "samples/": (3, "samples/step-000002.png"),
    "validation/": (3, "validation/step-000002.safetensors"),
    "ema_snapshots/": (3, "ema_snapshots/step-000002-0.100.safetensors"),
    "weights/": (3, "weights/step-000006.safetensors"),
    "profile/": (3, "profile/trace.json.gz"),
    "events.out.tfevents": (12, None),
}


@pytest.mark.slow
def test_what_is_beside_the_run_ends_none(short_run, tmp_path, faults):
    """A warning names what could not be written; checkpoints and pipeline are those of a run without trouble."""
    fields = {"train.eval_every": 2, "train.report_to": "tensorboard", "ema.snapshot_every": 2}
    fields |= {"train.save_weights_every": 6}
    fields |= {"ema.power_sigma_rels": [0.1], "data.validation_split": 0.2, "evaluation.prompts": ["a", "b"]}
    argv = [*short_run, *options(fields), "--evaluation.num_inference_steps", "1"]
    unbroken = train([*argv, "--output-dir", str(tmp_path / "unbroken")])
    for number, (path, (at, missing)) in enumerate(BESIDE.items()):
        run = tmp_path / f"run-{number}"
        command = [*argv, "--output-dir", str(run), *(["--train.profile", "1"] if path == "profile/" else [])]
        result = launch(command, environment=fault(path, at, ENOSPC))
        assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr
        warnings = [line for line in result.stderr.splitlines() if line.startswith("warning: ")]
        named = f"cannot write {run / missing}: " if missing else "train.report_to: tensorboard: "
        assert len(warnings) == 1 and named in warnings[0] and "; training goes on without it" in warnings[0], warnings
        assert missing is None or not (run / missing).exists()
        assert_same_end(run, unbroken)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("metrics.jsonl", "error: cannot write .*: No space left on device"),
        ("checkpoint-6.partial", "error: cannot save .*checkpoint-6: .*; the newest checkpoint is checkpoint-4"),
        ("pipeline.partial", "error: cannot write .*pipeline: .*No space left on device.*"),
    ],
)
def test_where_a_run_cannot_go_on_it_says_so_in_a_line(short_run, tmp_path, faults, path, message):
    result = launch(short_run, environment=fault(path, 7, ENOSPC))
    assert result.returncode == 1
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and re.fullmatch(message, errors[0]) and "Traceback" not in result.stderr, result.stderr
    # and the same command, with room again, ends like a run that had no such trouble
    assert launch([*short_run, "--resume-from", "latest"]).returncode == 0
    assert_same_end(tmp_path / "run", train([*short_run, "--output-dir", str(tmp_path / "unbroken")]))


def test_a_byte_that_flips_in_a_checkpoint_is_noticed(short_run, tmp_path):
    """Each file of the newest checkpoint in turn: an explicit resume refuses it, `latest` takes the one before."""
    output_dir = train([*short_run, "--ema.power_sigma_rels", "[0.1]"])
    common = [*short_run, "--ema.power_sigma_rels", "[0.1]"]
    latest = parse_config([*common, "--resume-from", "latest"])
    newest, before = output_dir / "checkpoint-6", output_dir / "checkpoint-4"
    explicit = parse_config([*common, "--output-dir", str(tmp_path / "branch"), "--resume-from", str(newest)])
    assert find_checkpoint(latest) == find_checkpoint(explicit) == newest
    paths = sorted(path for path in newest.iterdir())
    assert len(paths) == 11
    chance = random.Random(0)
    for path in paths:
        content = path.read_bytes()
        for place in (0, len(content) - 1, chance.randrange(len(content))):
            flipped = bytearray(content)
            flipped[place] ^= 1 << chance.randrange(8)
            path.write_bytes(flipped)
            with pytest.raises(InputError, match=r"checkpoint-6 is damaged: ") as reported:
                find_checkpoint(explicit)
            if path.name != "SHA256SUMS":
                assert str(reported.value).endswith(f"{path.name} has not the SHA-256 that SHA256SUMS says")
            assert find_checkpoint(latest) == before
        path.unlink()
        assert find_checkpoint(latest) == before
        path.write_bytes(content)
    assert find_checkpoint(latest) == newest
    (newest / "more.bin").touch()
    assert find_checkpoint(latest) == before

    # a run goes on from the intact one, and ends as it did; the damaged one is kept aside
    first = pipeline_bytes(output_dir), metrics_without_times(output_dir)
    result = launch([*common, "--resume-from", "latest"])
    assert f"warning: {newest} is damaged: SHA256SUMS does not list what is there; going on" in result.stderr
    assert (pipeline_bytes(output_dir), metrics_without_times(output_dir)) == first
    assert find_checkpoint(latest) == newest and (output_dir / "checkpoint-6.damaged").is_dir()
    for step in (4, 6):
        (output_dir / f"checkpoint-{step}/denoiser.safetensors").write_bytes(b"")
    assert_refused(
        launch([*common, "--resume-from", "latest"]),
        r"train.resume_from: no intact checkpoint: .*checkpoint-6 is damaged: .*checkpoint-4 is damaged: denoiser.sa",
    )
