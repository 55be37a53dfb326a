"""What accelerate does without a word is refused."""

import shutil
import subprocess
import sys

import pytest
from accelerate import Accelerator
from helpers import ROOT, assert_refused, launch, launch_two

from difftrain_utils.config.data import DataConfig
from difftrain_utils.config.model import ModelConfig
from difftrain_utils.config.text_to_image import TextToImageConfig
from difftrain_utils.config.training import TrainConfig
from difftrain_utils.errors import InputError
from difftrain_utils.run.launch import check_launch


@pytest.mark.parametrize(
    ("environment", "train", "message"),
    [
        ({"WORLD_SIZE": "2"}, {}, "launched were 2 processes, accelerate runs 1; .*cpu_ddp.yaml"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, {}, "launched were 4 processes, accelerate runs 1"),
        ({"SLURM_STEP_NUM_TASKS": "8"}, {}, "launched were 8 processes, accelerate runs 1"),
        ({}, {"num_processes": 2}, "train.num_processes asks for 2 processes, accelerate runs 1"),
        (
            {"ACCELERATE_USE_FSDP": "true"},
            {},
            "asked for FSDP; this script .*: --train.shard full",
        ),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, {}, "asked for DeepSpeed"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, {}, "asked for Megatron-LM"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, {}, r"asked for torch.compile \(INDUCTOR\)"),
        ({}, {"precision": "bf16"}, "train.precision: asked for bf16, accelerate runs with no"),
    ],
)
def test_refused(monkeypatch, environment, train, message):
    accelerator = Accelerator(cpu=True)
    config = TextToImageConfig(ModelConfig("m"), DataConfig("d"), TrainConfig(**train))
    for name in ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    check_launch(TextToImageConfig(ModelConfig("m"), DataConfig("d")), accelerator)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=message):
        check_launch(config, accelerator)


def test_one_process_of_torchrun_a_node_is_fine(monkeypatch):
    """Under srun, torchrun's world is what counts, not Slurm's tasks."""
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    check_launch(TextToImageConfig(ModelConfig("m"), DataConfig("d")), Accelerator(cpu=True))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("000005.png", "no image", "not an image that Pillow knows"),  # which only the main process reads
        ("metadata.jsonl", "no json", "metadata.jsonl line 1: not JSON"),
    ],
)
def test_what_stops_the_main_process_stops_all_without_a_launcher(
    short_run, tmp_path, image_folder, name, content, message
):
    """As under srun, which kills nobody."""
    folder = shutil.copytree(image_folder, tmp_path / "images")
    (folder / name).write_text(content)
    result = launch_two([*short_run, "--data.dataset", str(folder)], timeout=120)
    assert result.returncode == 2, result.stderr
    errors = [line for line in result.stderr.splitlines() if "rror" in line]
    assert len(errors) == 1 and message in errors[0], result.stderr
    assert not (tmp_path / "run").exists()


def test_two_processes_that_are_each_alone_are_refused(short_run, tmp_path):
    """`accelerate launch --multi_gpu` without GPUs starts two that do not know of each other."""
    result = launch_two(short_run, environment={"ACCELERATE_USE_CPU": "false"})
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 2 and len(errors) == 1, result.stderr
    assert "launched were 2 processes, accelerate runs 1" in errors[0] and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_thread_ends_its_work_before_python_does():
    script = """if True:
        import sys, threading
        from types import SimpleNamespace
        from difftrain_utils.run.launch import pause_at_exit

        sys.setswitchinterval(10)  # the thread runs only where the main thread waits
        ended = threading.Event()
        threading.Thread(target=lambda: (ended.wait(), print("let go")), daemon=True).start()
        pause_at_exit(SimpleNamespace(num_processes=2))
        ended.set()
    """
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True).stdout == "let go\n"


def test_fsdp_on_a_cpu_is_refused(short_run, tmp_path):
    assert_refused(launch(short_run, environment={"ACCELERATE_USE_FSDP": "true"}), "accelerate launch: asked for FSDP")
    assert not (tmp_path / "run").exists()
