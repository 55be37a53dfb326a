"""`difftrain train` and `difftrain --print_shtab`."""

import os
import subprocess
import sys

import pytest

from difftrain_utils.commands import main, train
from difftrain_utils.errors import InputError

CONFIG = ["--config", "configs/smoke_text2image.yaml"]


@pytest.mark.parametrize(
    ("num_gpus", "is_configured", "command"),
    [
        (0, False, ["python"]),
        (1, False, ["python"]),
        (4, False, ["python", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4"]),
        (4, True, ["python", "-m", "accelerate.commands.launch"]),
    ],
)
def test_how_it_starts(num_gpus, is_configured, command):
    assert train.launch_command(num_gpus, is_configured) == command


@pytest.mark.parametrize(("visible", "number"), [("", 0), ("-1", 0), ("0", 1), ("0,2", 2), ("0,-1,2", 1)])
def test_gpus_that_are_seen(monkeypatch, visible, number):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert train.num_gpus() == number


def test_it_becomes_the_script(monkeypatch, tmp_path, capsys):
    executed = []
    monkeypatch.setattr(os, "execv", lambda *arguments: executed.append(arguments))
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    train.main(CONFIG)
    assert executed == [(sys.executable, [sys.executable, "train_text_to_image.py", *CONFIG])]
    assert capsys.readouterr().out == f"Starting python train_text_to_image.py {' '.join(CONFIG)}\n"
    (tmp_path / "accelerate").mkdir()
    (tmp_path / "accelerate/default_config.yaml").touch()
    train.main(CONFIG)
    assert executed[1][1][1:3] == ["-m", "accelerate.commands.launch"]


def test_what_is_wrong_is_said_at_once(monkeypatch, tmp_path):
    with pytest.raises(InputError, match=r"--train.max_step: no such field; did you mean --train.max_steps"):
        train.main([*CONFIG, "--train.max_step", "3"])
    config = [CONFIG[0], os.path.abspath(CONFIG[1])]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"no train_text_to_image.py in this folder; `difftrain init FOLDER` makes"):
        train.main(config)


def test_bash_completes_commands_fields_and_values(capsys, tmp_path):
    pytest.importorskip("shtab")
    assert main.run(["--print_shtab", "bash"]) == 0
    script = tmp_path / "completion.sh"
    asked = [["va"], ["train", "--loss.ty"], ["validate-config", "--train.precision", ""], ["compare", "--loss"]]
    lines = [f"COMP_WORDS=(difftrain {' '.join(map(repr, words))}); complete_last" for words in asked]
    last = "COMP_CWORD=$((${#COMP_WORDS[@]} - 1))"
    complete = f"complete_last() {{ {last}; COMPREPLY=(); _shtab_difftrain; echo ${{COMPREPLY[*]}}; }}"
    script.write_text("\n".join([capsys.readouterr().out, complete, *lines]))
    done = subprocess.run(["bash", str(script)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["validate-config", "--loss.type", "fp32 fp16 bf16 null", ""]


def test_a_shell_that_there_is_not():
    pytest.importorskip("shtab")
    with pytest.raises(InputError, match="--print_shtab: must be bash, zsh, tcsh, got 'fish'"):
        main.run(["--print_shtab", "fish"])
