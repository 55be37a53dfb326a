"""launch/ and accelerate_configs/: what they name is there, what they ask for is known, and they start a run."""

import dataclasses
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed.run as torchrun
import yaml
from accelerate.commands import launch as accelerate_launch
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from helpers import ROOT, SCRIPT, launch_environment, options

SHELL = [ROOT / "launch/torchrun.sh", ROOT / "launch/slurm.sbatch"]
ACCELERATE = sorted((ROOT / "accelerate_configs").iterdir())
SHORT = options(
    {
        "config": ROOT / "configs/smoke_text2image.yaml",
        "train.overwrite": False,
        "train.eval_every": 0,
        "train.max_steps": 2,
    }
)


def run(command: list[str], environment: dict[str, str], cwd: Path = ROOT) -> subprocess.CompletedProcess:
    environment = launch_environment() | {"ACCELERATE_USE_CPU": "true"} | environment
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=540)


@pytest.mark.parametrize("path", [*SHELL, ROOT / "launch/kubernetes.yaml", *ACCELERATE], ids=lambda path: path.name)
def test_each_is_headed_by_its_command_and_names_what_there_is(path):
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#!")]
    assert f"{path.parent.name}/{path.name}" in lines[0] and "#" in lines[1:3]
    for name in re.findall(r"(?:configs/|train_)\w+\.(?:yaml|py)", path.read_text()):
        assert (ROOT / name).exists() or (ROOT / "accelerate_configs" / Path(name).name).exists(), name
    if path.parent.name == "launch":
        assert "# Tried: " in path.read_text() and "Not tried: " in path.read_text()


@pytest.mark.parametrize("path", SHELL, ids=lambda path: path.name)
def test_the_shell_reads_it(path):
    assert subprocess.run(["bash", "-n", str(path)]).returncode == 0


def test_torchrun_knows_the_options():
    (job,) = yaml.safe_load((ROOT / "launch/kubernetes.yaml").read_text())["spec"]["replicatedJobs"]
    container = job["template"]["spec"]["template"]["spec"]["containers"][0]
    pods = job["template"]["spec"]["parallelism"]
    words = shlex.split(container["args"][0].replace("$JOB_COMPLETION_INDEX", "1"))
    arguments = torchrun.get_args_parser().parse_args(words[words.index("torch.distributed.run") + 1 :])
    assert arguments.training_script == SCRIPT.name and arguments.nnodes == str(pods) and arguments.node_rank == 1
    text = SHELL[0].read_text().replace("\\\n", "").replace("${PROCESSES:-gpu}", "2").replace("${RESTARTS:-3}", "3")
    words = shlex.split(text[text.index("torch.distributed.run") :])[1:]
    arguments = torchrun.get_args_parser().parse_args(words)
    assert arguments.training_script == SCRIPT.name and (arguments.nproc_per_node, arguments.max_restarts) == ("2", 3)


@pytest.mark.slow
def test_torchrun_sh_runs(tmp_path):
    command = ["bash", str(SHELL[0]), *SHORT, "--output-dir", str(tmp_path / "run")]
    result = run(command, {"PROCESSES": "2", "RESTARTS": "0"}, tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "run/pipeline/model_index.json").is_file()


SRUN = """#!/usr/bin/env bash
# Starts the tasks here; returns the highest exit code, as srun does.
while [ "$1" != bash ]; do shift; done
echo x >> started
for ((task = 0; task < SLURM_NTASKS; task++)); do
    SLURM_PROCID=$task SLURM_LOCALID=$task "$@" & tasks+=($!)
done
highest=0
for task in "${tasks[@]}"; do
    code=0; wait "$task" || code=$?
    ((code > highest)) && highest=$code
done
exit "$highest"
"""
SCONTROL = """#!/usr/bin/env bash
if [ "$1" = show ]; then echo localhost; else echo "$@" > requeued; fi
"""


@pytest.mark.slow
def test_slurm_requeues_what_was_stopped_and_leaves_what_is_wrong(tmp_path):
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / SCRIPT.name).symlink_to(SCRIPT)
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    slurm = {"PATH": path, "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_ID": str(os.getpid())}
    started, requeued = tmp_path / "started", tmp_path / "requeued"

    def submit(*more: str) -> int:
        command = ["bash", str(SHELL[1]), *SHORT, "--output-dir", str(tmp_path / "run"), *more]
        return run(command, slurm, tmp_path).returncode

    assert submit("--train.max_hours", "1e-9") == 0
    assert requeued.read_text() == f"requeue {slurm['SLURM_JOB_ID']}\n" and started.read_text() == "x\n"
    requeued.unlink()
    assert submit() == 0
    assert (tmp_path / "run/pipeline/model_index.json").is_file() and not requeued.exists()
    started.unlink()
    assert submit("--train.max_step", "3") == 2
    assert started.read_text() == "x\n" and not requeued.exists()
    (tmp_path / SCRIPT.name).unlink()
    (tmp_path / SCRIPT.name).write_text("raise SystemExit(1)")
    assert submit() == 1
    assert started.read_text() == 5 * "x\n"


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda path: path.name)
def test_accelerate_knows_the_fields(path):
    fields = {field.name for field in dataclasses.fields(ClusterConfig)}
    assert yaml.safe_load(path.read_text()).keys() <= fields
    assert load_config_from_file(str(path)).num_processes >= 1


@pytest.mark.parametrize(
    ("name", "more", "expected"),
    [
        ("cpu_ddp", [], {"nproc_per_node": "2"}),
        ("multi_gpu", ["--max_restarts", "3"], {"nproc_per_node": "8", "max_restarts": 3}),
        (
            "multi_node",
            [
                *("--rdzv_backend", "c10d", "--max_restarts", "3"),
                *("--main_process_ip", "first", "--machine_rank", "1"),
            ],
            {
                **{"nnodes": "2", "nproc_per_node": "8", "max_restarts": 3, "node_rank": 1},
                **{"rdzv_backend": "c10d", "rdzv_endpoint": "first:29500"},
            },
        ),
    ],
)
def test_what_accelerate_asks_torchrun_for(monkeypatch, name, more, expected):
    asked = []
    monkeypatch.setattr(torchrun, "run", asked.append)
    config = ["--config_file", str(ROOT / f"accelerate_configs/{name}.yaml")]
    arguments = accelerate_launch.launch_command_parser().parse_args([*config, *more, str(SCRIPT)])
    accelerate_launch.launch_command(arguments)
    assert {field: getattr(asked[0], field) for field in expected} == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cpu", "cpu_ddp"])
def test_accelerate_launches(tmp_path, name):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"accelerate_configs/{name}.yaml"]
    command += ["--main_process_port", "0"] if name == "cpu_ddp" else []
    result = run([*command, str(SCRIPT), *SHORT, "--output-dir", str(tmp_path / "run")], {})
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "run/pipeline/model_index.json").is_file()
