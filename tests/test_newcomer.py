"""The newcomer's way, docs/photos.md: each of its commands is run, with tiny models."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from blip import make_blip
from helpers import ROOT, forget_accelerator, last_wins, options, train
from PIL import Image

from difftrain_utils.builtins.checkpoints import builtin_checkpoint
from difftrain_utils.commands import draw_shapes, main
from difftrain_utils.commands import train as train_command

PAGE = (ROOT / "docs/photos.md").read_text()
COMMANDS = [line.strip() for line in PAGE.splitlines() if re.match(r" {4,}(git|pip|difftrain|accelerate) ", line)]
TINY = {"stabilityai/stable-diffusion-xl-base-1.0": "builtin:tiny-sdxl"}
SMALL = {
    "model.pretrained_model_name_or_path": "builtin:tiny-sdxl",
    "data.resolution": 32,
    "data.epochs": 2.5,  # of 6 photos: 4 steps
    "train.precision": "fp32",
    "train.gradient_accumulation_steps": 2,
    "train.eval_every": 0,
    "train.save_every": 2,
    "evaluation.num_inference_steps": 2,
    "optimizer.init_args": '{"lr": 0.001}',
}


@pytest.fixture
def photos(monkeypatch, tmp_path) -> Path:
    """A checkout in which the photos are."""
    for name in ("configs", "train_text_to_image.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    draw_shapes.main(["--output-dir", str(tmp_path / "photos"), "--num-images", "6", "--image-size", "40"])
    (tmp_path / "photos/metadata.jsonl").unlink()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(command: str) -> None:
    """A command of the page, in this process."""
    for real, tiny in TINY.items():
        command = command.replace(real, tiny)
    command = (
        command.replace("--train.max_steps 2500 ", "")
        .replace("--num-images 200", "--num-images 2")
        .replace("--checkpoint 1000 1250", "--checkpoint 2 4")
    )
    program, name, *argv = shlex.split(command)
    assert program == "difftrain"
    if name == "generate":
        argv += ["--steps", "2"]
    if name in main.TAKE_CONFIG:
        argv = last_wins([*argv, *options(SMALL)])
    if name == "train":
        train(argv)
    else:
        forget_accelerator()
        assert main.run([name, *argv]) in (None, 0)


@pytest.mark.slow
def test_each_command_of_the_page_runs(photos, tmp_path, capsys, monkeypatch):
    executed = []
    monkeypatch.setattr(train_command.os, "execv", lambda program, argv: executed.append(argv))
    assert [command.split()[0] for command in COMMANDS[:2]] == ["git", "pip"]  # which are for the reader's machine
    caption, *commands = COMMANDS[2:]
    for command in commands:
        if command.startswith("difftrain generate stabilityai"):
            assert (photos / "runs/photos/lora/pytorch_lora_weights.safetensors").is_file()
        run(command)
    assert "Nothing to do: runs/photos is finished" in capsys.readouterr().out  # --resume-from latest, once more
    assert len(list((photos / "data/dogs").glob("*.png"))) == 2 and (photos / "runs/photos-prior/lora").is_dir()
    assert Image.open("generated.png").width > Image.open("generated.png").height
    assert (photos / "table.png").is_file() and (photos / "runs/photos/lora/kohya.safetensors").is_file()

    run(caption.replace("Salesforce/blip-image-captioning-base", str(make_blip(tmp_path / "blip"))))
    captions = sorted((photos / "photos").glob("*.txt"))
    assert len(captions) == 6 and all(path.read_text().startswith("a photo of sks dog, ") for path in captions)

    snippet = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1]
    snippet = re.sub(r"\.to\(\s*\"cuda\"\s*\)", "", snippet)
    for real, tiny in TINY.items():
        snippet = snippet.replace(real, str(builtin_checkpoint(tiny)))
    snippet = snippet.replace('on the moon")', 'on the moon", num_inference_steps=2, height=32, width=32)')
    subprocess.run([sys.executable, "-c", snippet], check=True)
    assert Image.open("moon.png").size == (32, 32)
