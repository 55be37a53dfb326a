"""Processes find each other, also those that a launcher has started again, or say who is missing."""

import os
import socket
import subprocess
import sys
import threading
from datetime import timedelta
from pathlib import Path

import pytest
from helpers import ROOT, SCRIPT, launch_environment, metrics_without_times, pipeline_bytes
from torch.distributed import TCPStore

from difftrain_utils.errors import InputError, ProcessError
from difftrain_utils.run.rendezvous import init_method, meet
from difftrain_utils.run.run_folder import read_manifest

WAIT = timedelta(hours=12)
ELASTIC = {"TORCHELASTIC_MAX_RESTARTS": "3", "TORCHELASTIC_USE_AGENT_STORE": "True"}
LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"],
    "accelerate launch": [
        *("accelerate.commands.launch", "--config_file", str(ROOT / "accelerate_configs/cpu_ddp.yaml")),
        *("--num_processes", "4", "--main_process_port", "0", "--max_restarts", "1"),
    ],
}


@pytest.fixture
def agent_store(monkeypatch) -> TCPStore:
    """The store of an agent of one machine, and the environment that it gives to the first of two processes."""
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    world = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port)}
    for name, value in (world | ELASTIC | {"TORCHELASTIC_RESTART_COUNT": "0", "GROUP_WORLD_SIZE": "1"}).items():
        monkeypatch.setenv(name, value)
    return store


def test_an_attempt_does_not_meet_what_the_one_before_has_left(agent_store, monkeypatch):
    for attempt in range(2):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(attempt))
        agent_store.set(f"attempt{attempt}/here/1", "")
        store, rank, world_size = next(meet(init_method(1), WAIT))
        assert (rank, world_size) == (0, 2) and not store.check(["address"])
        store.set("address", "")


def test_who_does_not_come_is_named(agent_store, monkeypatch):
    with pytest.raises(
        ProcessError, match=r"^process 1 of 2 did not come within 0.002 minutes \(train.init_minutes\)$"
    ):
        next(meet(init_method(0.002), WAIT))
    with socket.socket() as closed:
        closed.bind(("localhost", 0))
        monkeypatch.setenv("MASTER_PORT", str(closed.getsockname()[1]))
        with pytest.raises(ProcessError, match=r"^process 0 of 2 did not reach localhost:\d+ within 0.002 minutes"):
            next(meet(init_method(0.002), WAIT))


def test_without_an_agent_the_first_process_has_the_store(monkeypatch):
    """As under srun."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    world = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    for name, value in world.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)

    def come() -> None:
        TCPStore("localhost", port, wait_for_workers=False).set("here/1", "")

    other = threading.Thread(target=come)
    other.start()
    store, *_ = next(meet(init_method(1), WAIT))
    other.join()
    assert store.check(["here/0", "here/1"])


def test_machines_that_count_their_restarts_for_themselves_are_refused(monkeypatch):
    for name, value in (ELASTIC | {"GROUP_WORLD_SIZE": "2"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=r"^--max-restarts 3 on 2 machines needs .* TORCH_DISABLE_SHARE_RDZV"):
        init_method(1)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    init_method(1)


def run(launcher: str, script: Path, argv: list[str], output_dir: Path) -> None:
    command = [sys.executable, "-m", *LAUNCHERS[launcher], str(script), *argv, "--output-dir", str(output_dir)]
    environment = launch_environment() | {"ACCELERATE_USE_CPU": "true"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=540)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_process_is_killed_and_the_job_starts_again_by_itself(short_run, tmp_path, launcher):
    """Two and four processes, of which one is killed at step 3: one command, and the bytes of a run without a kill."""
    text, place, killed = SCRIPT.read_text(), "            # ── The update ──", tmp_path / "train_killed.py"
    assert text.count(place) == 1
    first = 'os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and state.step == 3 and accelerator.process_index == 1'
    kill = f"            import os\n            if {first}:\n                os.kill(os.getpid(), 9)\n"
    killed.write_text(text.replace(place, kill + place))
    at = short_run.index("--train.output_dir")
    argv = [*short_run[:at], *short_run[at + 2 :], "--resume-from", "latest"]
    run(launcher, killed, argv, tmp_path / "killed")
    run(launcher, SCRIPT, argv, tmp_path / "unbroken")
    assert [s["from_step"] for s in read_manifest(tmp_path / "killed")["segments"]] == [0, 2]
    assert pipeline_bytes(tmp_path / "killed") == pipeline_bytes(tmp_path / "unbroken")
    assert metrics_without_times(tmp_path / "killed") == metrics_without_times(tmp_path / "unbroken")
    for name in ("denoiser.safetensors", "ema.safetensors", "optimizer.safetensors"):
        paths = [tmp_path / folder / "checkpoint-6" / name for folder in ("killed", "unbroken")]
        assert os.path.exists(paths[0]) and paths[0].read_bytes() == paths[1].read_bytes(), name
