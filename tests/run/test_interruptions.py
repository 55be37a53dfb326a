"""Stopping early: by a signal, by the clock, by a gradient that is not finite. Nothing is lost, and the run goes on."""

import contextlib
import json
import os
import signal
import time

import pytest
from accelerate import Accelerator
from helpers import (
    SCRIPT,
    last_step,
    launch,
    launch_two,
    metrics_without_times,
    pipeline_bytes,
    start,
    train,
    wait_for,
    without_dropout,
)

from difftrain_utils.config.training import TrainConfig
from difftrain_utils.errors import RunError
from difftrain_utils.files import weights_digest
from difftrain_utils.objective import noise
from difftrain_utils.run.interruptions import Interruptions
from difftrain_utils.run.manifest import loss_trace_digest
from difftrain_utils.run.metrics import read_metrics
from difftrain_utils.run.run_folder import list_checkpoints, read_manifest
from difftrain_utils.terminal import SIGNALS, STOPPED, stop_in_one_line


def poll(interruptions: Interruptions) -> tuple[str | None, bool]:
    interruptions.poll()
    return interruptions.stop, interruptions.save


def test_a_signal_waits_for_the_end_of_the_step_and_a_second_sigint_does_not():
    before = [signal.getsignal(number) for number in SIGNALS]
    with Interruptions(Accelerator(cpu=True), time.monotonic(), TrainConfig()) as interruptions:
        assert poll(interruptions) == (None, False)
        os.kill(os.getpid(), signal.SIGINT)
        assert interruptions.stop is None
        assert poll(interruptions) == ("SIGINT", False)
        os.kill(os.getpid(), signal.SIGTERM)  # a launcher passes both on
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_time_limits():
    config = TrainConfig(max_hours=2.0, save_minutes=10.0)
    interruptions = Interruptions(Accelerator(cpu=True), time.monotonic() - 1.9 * 3600, config)
    assert poll(interruptions) == (None, False)
    interruptions.last_save -= 601
    assert poll(interruptions) == (None, True)
    interruptions.saved()
    interruptions.started -= 361
    assert poll(interruptions) == ("train.max_hours 2", False)


def test_an_error_gives_the_signals_back():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RunError), Interruptions(Accelerator(cpu=True), time.monotonic(), TrainConfig()):
        assert signal.getsignal(signal.SIGTERM) != before
        raise RunError("in a step")
    assert signal.getsignal(signal.SIGTERM) == before


def test_stopped_by_every_signal_a_run_ends_like_an_unbroken_one(short_run, tmp_path):
    """The same command starts, goes on, and says at last that there is nothing to do."""
    argv = [*short_run, "--train.max_steps", "40", "--train.save_every", "0", "--train.log_every", "2"]
    unbroken = train([*argv, "--output-dir", str(tmp_path / "unbroken")])
    stopped, steps = tmp_path / "run", [0]
    command = [*argv, "--resume-from", "latest", "--data.num_workers", "1"]
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        run = start(command)
        wait_for(lambda: last_step(stopped) > steps[-1] + 1, run)
        run.send_signal(number)
        assert run.wait() == STOPPED
        steps.append(list_checkpoints(stopped)[-1][0])
        assert steps[-2] < last_step(stopped) <= steps[-1] < 40 and not (stopped / "pipeline").exists()
    result = launch(command)
    assert result.returncode == 0, result.stderr
    assert pipeline_bytes(stopped) == pipeline_bytes(unbroken)
    assert metrics_without_times(stopped) == metrics_without_times(unbroken)

    manifest = read_manifest(stopped)
    assert [s["from_step"] for s in manifest["segments"]] == steps
    assert [s.get("to_step") for s in manifest["segments"]] == [*steps[1:], 40]
    assert [s["reason"] for s in manifest["segments"]] == ["SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP", "finished"]
    assert manifest["final"] == read_manifest(unbroken)["final"]
    before = (stopped / "run_manifest.json").read_bytes()
    again = launch(command)
    assert again.returncode == 0
    assert "Nothing to do: " in again.stdout and "is finished, at checkpoint-40" in again.stdout
    assert (stopped / "run_manifest.json").read_bytes() == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_all_processes_finds_the_workers_at_work(short_run, tmp_path, number):
    """As Slurm sends it to all that belongs to a step, and a terminal to all in the foreground."""
    argv = [*short_run, "--train.max_steps", "100000", "--train.save_every", "0", "--data.num_workers", "2"]
    run = start(argv, new_session=True)
    try:
        wait_for(lambda: last_step(tmp_path / "run") > 2, run)
        os.killpg(run.pid, number)
        assert run.wait(60) == STOPPED and list_checkpoints(tmp_path / "run")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)


@pytest.mark.slow
def test_who_reads_what_is_printed_may_go_away(short_run, tmp_path):
    """`2>&1 | tee log` and Ctrl-C: a checkpoint as ever. `| head -c 1`: a run as ever."""
    argv = [*short_run, "--train.max_steps", "30", "--train.save_every", "0"]
    unbroken = train([*argv, "--output-dir", str(tmp_path / "unbroken")])
    for more in ([], ["--resume-from", "latest"]):
        pipe, before = tmp_path / f"pipe{len(more)}", last_step(tmp_path / "run")
        os.mkfifo(pipe)
        reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        run = start([*argv, *more], output=pipe)
        wait_for(lambda: last_step(tmp_path / "run") > before + 1, run)  # noqa: B023
        os.close(reader)
        if not more:
            run.send_signal(signal.SIGINT)
        assert run.wait() == (0 if more else STOPPED)
        assert list_checkpoints(tmp_path / "run")
    assert pipeline_bytes(tmp_path / "run") == pipeline_bytes(unbroken)
    assert metrics_without_times(tmp_path / "run") == metrics_without_times(unbroken)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
@pytest.mark.parametrize("place", ["    accelerator = launch(config)", "            weights = export_pipeline("])
def test_a_signal_before_and_after_training_ends_in_one_line(short_run, tmp_path, number, place):
    text, script = SCRIPT.read_text(), tmp_path / "train_stopped.py"
    assert text.count(place) == 1
    indent = place[: len(place) - len(place.lstrip())]
    script.write_text(text.replace(place, f"{indent}import os\n{indent}os.kill(os.getpid(), {int(number)})\n{place}"))
    argv = [*short_run, "--train.max_steps", "2", "--train.save_every", "1"]
    result = launch(argv, script=script)
    assert result.returncode == STOPPED and "Traceback" not in result.stderr
    assert f"\nstopped by {number.name}: run the same command again\n" in result.stderr
    assert not (tmp_path / "run/pipeline").exists()
    assert (train([*argv, "--resume-from", "latest"]) / "pipeline/model_index.json").is_file()


def test_nohup_keeps_sighup_away(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stop_in_one_line()
        with Interruptions(Accelerator(cpu=True), time.monotonic(), TrainConfig()) as interruptions:
            os.kill(os.getpid(), signal.SIGHUP)
            assert poll(interruptions) == (None, False)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_manifest_ends_with_digests(short_run, checkpoint_folder):
    from diffusers import DiffusionPipeline

    output_dir = train(short_run)
    final = read_manifest(output_dir)["final"]
    assert final["global_step"] == 6
    unet = DiffusionPipeline.from_pretrained(output_dir / "pipeline").unet
    assert final["weights"]["pipeline"] == weights_digest(unet) != final["weights"]["raw"]
    lines = (output_dir / "metrics.jsonl").read_text().splitlines()
    changed = [json.loads(line) | {"samples_per_second": 1.0} for line in lines]
    (output_dir / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in changed))
    assert loss_trace_digest(output_dir / "metrics.jsonl") == final["loss_trace"]
    changed[2]["loss"] += 1e-12
    (output_dir / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in changed))
    assert loss_trace_digest(output_dir / "metrics.jsonl") != final["loss_trace"]


def test_save_minutes_save_and_max_hours_stop(short_run, tmp_path):
    often = train([*short_run, "--train.save_minutes", "1e-9", "--train.keep_checkpoints", "0"])
    assert [step for step, _ in list_checkpoints(often)] == [1, 2, 3, 4, 5, 6]
    train([*short_run, "--output-dir", str(tmp_path / "short"), "--train.max_hours", "1e-9"], exit_code=STOPPED)
    assert read_manifest(tmp_path / "short")["segments"][0]["reason"] == "train.max_hours 1e-09"
    resumed = train([*short_run, "--output-dir", str(tmp_path / "short"), "--resume-from", "latest"])
    assert pipeline_bytes(resumed) == pipeline_bytes(often)


@pytest.mark.parametrize(("first", "then"), [(1, 2), (2, 1)])
def test_a_run_goes_on_with_another_number_of_processes(short_run, tmp_path, first, then):
    argv = [*short_run, "--model.pretrained_model_name_or_path", str(without_dropout(short_run, tmp_path))]
    whole = train([*argv, "--output-dir", str(tmp_path / "whole")])

    def run(num_processes: int, *options: str):
        return (launch_two if num_processes == 2 else launch)([*argv, "--resume-from", "latest", *options])

    stopped = run(first, "--train.max_hours", "1e-9")
    assert f"Stopped at step 1 by train.max_hours 1e-09; --resume-from latest goes on" in stopped.stdout  # noqa: F541
    resumed = run(then)
    assert resumed.returncode == 0, resumed.stderr
    losses = [[entry["loss"] for entry in read_metrics(path / "metrics.jsonl")] for path in (tmp_path / "run", whole)]
    assert len(losses[0]) == 6 and losses[0] == pytest.approx(losses[1], rel=1e-5)
    segments = read_manifest(tmp_path / "run")["segments"]
    assert read_manifest(tmp_path / "run")["num_processes"] == first
    assert segments[1]["from_step"] == 1 and segments[1]["differs"]["num_processes"] == then


class TestNonFinite:
    """Sample 9, of step 3, has a loss of NaN."""

    @pytest.fixture
    def poison(self, monkeypatch):
        keyed_randn = noise.keyed_randn

        def poisoned(seed, purpose, keys, *arguments):
            numbers = keyed_randn(seed, purpose, keys, *arguments)
            numbers[[key == 9 for key in keys]] = float("nan")
            return numbers

        monkeypatch.setattr(noise, "keyed_randn", poisoned)
        return monkeypatch

    @pytest.mark.parametrize("accumulation", ["1", "2"])
    def test_stop_names_the_samples_and_keeps_the_last_good_state(self, short_run, tmp_path, poison, accumulation):
        argv = [*short_run, "--train.gradient_accumulation_steps", accumulation, "--train.save_every", "0"]
        names = r"0{5}\d.png, .*0{5}\d.png, .*0{5}\d.png, .*0{5}\d.png"
        message = (
            rf"the norm of the gradient is nan at step 3, samples 8 to 11 \(.*{names}\); .*checkpoint-2 holds the st"
        )
        with pytest.raises(RunError, match=message):
            train(argv)
        poison.undo()
        resumed = train([*argv, "--resume-from", "latest"])
        unbroken = train([*argv, "--output-dir", str(tmp_path / "unbroken")])
        assert pipeline_bytes(resumed) == pipeline_bytes(unbroken)
        assert metrics_without_times(resumed) == metrics_without_times(unbroken)

    def test_skip_leaves_the_step_out_and_resumes_exactly(self, short_run, tmp_path, poison):
        argv = [*short_run, "--train.on_nonfinite", "skip", "--train.keep_checkpoints", "0"]
        unbroken = train(argv)
        metrics = metrics_without_times(unbroken)
        assert [entry.get("skipped_steps") for entry in metrics] == [None, None, 1, 1, 1, 1]
        assert ["loss" in entry and "grad_norm" in entry for entry in metrics] == [True, True, False, True, True, True]
        for step in (2, 4):
            branch = ["--output-dir", str(tmp_path / str(step)), "--resume-from", str(unbroken / f"checkpoint-{step}")]
            assert pipeline_bytes(train([*argv, *branch])) == pipeline_bytes(unbroken)
            assert metrics_without_times(tmp_path / str(step)) == metrics[step:]

    def test_skip_is_bounded(self, short_run, poison):
        with pytest.raises(RunError, match="the norm of the gradient is nan at step 3"):
            train([*short_run, "--train.on_nonfinite", "skip", "--train.max_skipped_steps", "0"])
