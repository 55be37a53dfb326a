"""Each command of the README and the docs has options of today, and a test runs it, or it is known what it needs."""

import argparse
import re
import shlex
from pathlib import Path

import pytest
import torch.distributed.run as torchrun
from accelerate.commands.launch import launch_command_parser
from helpers import ROOT, last_wins

from difftrain_utils.commands import main, plan
from difftrain_utils.config import command_line
from difftrain_utils.config.scripts import SCRIPTS, script_for

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = (
    "accelerate bash difftrain git make_dummy_imagefolder mkdir mkdocs npm nvidia-smi pip pytest python source torchrun"
)
COMMAND = re.compile(rf"(?:\w+=\S+ )*(?:{PROGRAMS.replace(' ', '|')}) .*|--\w+\.\w+ .*|nvidia-smi.*")

RUN_BY = {  # the tests that run a program, or a command of it, as the docs say it
    "accelerate launch": "test_smoke.py",
    "torchrun": "test_rendezvous.py",
    "difftrain best-guidance": "test_best_guidance.py",
    "difftrain caption": "test_newcomer.py",
    "difftrain check-data": "test_newcomer.py",
    "difftrain compare": "test_smoke.py",
    "difftrain draw-shapes": "test_smoke.py",
    "difftrain export": "test_newcomer.py",
    "difftrain generate": "test_newcomer.py",
    "difftrain init": "test_init.py",
    "difftrain migrate": "test_migrate.py",
    "difftrain plan": "test_plan.py",
    "difftrain posthoc-ema": "test_power_ema.py",
    "difftrain push": "test_newcomer.py",
    "difftrain ranks": "test_ranks.py",
    "difftrain report": "test_report.py",
    "difftrain reproduce": "test_smoke.py",
    "difftrain score": "test_score.py",
    "difftrain sweep": "test_sweep.py",
    "difftrain train": "test_newcomer.py",
    "difftrain validate-config": "test_smoke.py",
    "make_dummy_imagefolder": "test_smoke.py",
    "python examples/emoji/make.py": "test_emoji.py",
    "python examples/emoji/model.py": "test_emoji.py",
    "source scripts/setup_runtime_env.sh": "test_project.py",
    "options": "test_config.py",
}
NEEDED = {  # of what is run by none, or not whole
    r"\b(facebook|openai|stabilityai|stable-diffusion-v1-5|Salesforce)/": "the hub; tests run it with tiny models",
    r"configs/(photos|sd|sdxl|flux|zimage|qwen|wan|ltx|stable)\w+\.yaml": "a GPU and a checkpoint; tests run tiny ones",
    r"FIRST_MACHINE|--nproc-per-node 8": "many GPUs; tests run it with two processes of a CPU",
    r"^difftrain push (?!.*--dry-run)": "an account of the hub",
    r"^bash benchmarks/gpu_lane.sh|^nvidia-smi|^pytest .*cuda": "an NVIDIA GPU",
    r"^(git clone|npm pack|pip download)": "a network",
    r"^(pip install|pytest|mkdocs build)": "what .ci/run does",
    r"^(mkdocs serve|mkdir )": "a shell",
}


def commands_of(page: Path) -> list[str]:
    """The commands in a page's code, set in by four or more spaces, and in its tables, where a cell is
    one in backticks. What a sentence names is not looked at."""
    text = page.read_text().replace("\\\n", " ")
    for _ in range(2):  # of three lines of options each continues the one before
        text = re.sub(r"(?<=\n)( {4,}--.*)\n +(--.*)", r"\1 \2", text)
    lines = re.findall(r"^ {4,}(\S.*)$", text, re.MULTILINE) + re.findall(
        r"^\|[^`\n]*`([^`\n]*)` \|", text, re.MULTILINE
    )
    commands = [part for line in lines if COMMAND.fullmatch(line) for part in re.split(r" && | 2>&1 \| | \| ", line)]
    return [re.sub(r"\s+", " ", command) for command in commands if COMMAND.fullmatch(command)]


ALL = [(page.name, command) for page in PAGES for command in commands_of(page)]


def words(command: str) -> list[str]:
    """Without what stands for what the reader has, and without the variables before it."""
    command = re.sub(r"^(\w+=\S+ )+", "", command).replace("--config …", "").replace(" …", "")
    return shlex.split(command)


def name_of(command: str) -> str:
    program, *rest = words(command)
    if program.startswith("--"):
        return "options"
    return f"{program} {rest[0]}" if program in ("accelerate", "difftrain", "python", "source") else program


def check_config(argv: list[str]) -> None:
    config = ["--model.pretrained_model_name_or_path", "some/model", "--data.dataset", "some/data"]
    argv = argv if "--config" in argv else [*config, *argv]
    command_line.parse_config(SCRIPTS[script_for(argv)], last_wins(argv))


def check_command(name: str, argv: list[str], monkeypatch) -> None:
    """The options of a command that has its own."""

    class Parsed(Exception):
        pass

    for name_of_parse in ("parse_args", "parse_intermixed_args"):
        parse = getattr(argparse.ArgumentParser, name_of_parse)

        def parse_and_stop(parser, given, parse=parse):
            parse(parser, given)
            raise Parsed

        monkeypatch.setattr(argparse.ArgumentParser, name_of_parse, parse_and_stop)
    with pytest.raises(Parsed):
        main.run([name, *argv])


def test_the_commands_are_found():
    assert len(ALL) > 80 and {"difftrain", "accelerate", "torchrun", "pytest", "pip"} <= {words(c)[0] for _, c in ALL}


@pytest.mark.parametrize(("page", "command"), ALL, ids=[f"{page}-{command[:60]}" for page, command in ALL])
def test_a_command_is_one_of_today(page, command, monkeypatch):
    monkeypatch.chdir(ROOT)
    program, *argv = words(command)
    if program.startswith("--"):
        check_config([program, *argv])
    elif argv[:1] == ["plan"]:
        check_config(plan.parse_arguments(argv[1:])[1])
    elif program == "difftrain" and argv[0] in main.TAKE_CONFIG:
        check_config(argv[1:])
    elif program in ("difftrain", "make_dummy_imagefolder"):
        name, *argv = argv if program == "difftrain" else ["draw-shapes", *argv]
        check_command(name, argv, monkeypatch)
    elif program in ("accelerate", "torchrun"):
        parser = launch_command_parser() if program == "accelerate" else torchrun.get_args_parser()
        given = parser.parse_args(argv[1:] if program == "accelerate" else argv)
        assert (ROOT / given.training_script).is_file()
        check_config(given.training_script_args)
    elif program in ("python", "bash", "source"):
        assert argv[0].startswith("-") or (ROOT / argv[0]).is_file()
    elif program == "pip":
        extras = re.findall(r"\[([\w,]+)\]", command)
        known = (ROOT / "pyproject.toml").read_text()
        for extra in ",".join(extras).split(",") if extras else []:
            assert re.search(rf"^{extra} = \[", known, re.MULTILINE), extra
    elif program == "pytest":
        known = (ROOT / "pyproject.toml").read_text()
        for name in re.findall(r"\w+", argv[argv.index("-m") + 1]) if "-m" in argv else []:
            assert name in ("and", "or", "not") or f'"{name}: ' in known, name
        for path in [word for word in argv if word.startswith("tests/")]:
            assert (ROOT / path).exists(), path


@pytest.mark.parametrize(("page", "command"), ALL, ids=[f"{page}-{command[:60]}" for page, command in ALL])
def test_a_command_is_run_by_a_test_or_needs_what_there_is_not(page, command):
    assert name_of(command) in RUN_BY or any(re.search(pattern, command) for pattern in NEEDED), command


def test_what_runs_them_is_there():
    files = {path.name for path in (ROOT / "tests").rglob("test_*.py")}
    for name, file in RUN_BY.items():
        assert file in files, name
