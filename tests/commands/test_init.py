"""What is installed has the scripts and configs in it: `difftrain init` lays them out, and they run."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from helpers import ROOT, launch_environment

from difftrain_utils.commands import main as console
from difftrain_utils.commands.init import main
from difftrain_utils.errors import InputError


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the installed package, away from the checkout."""
    folder = tmp_path_factory.mktemp("installed")
    source = folder / "source"  # a copy: building leaves files in it, and tests run in parallel
    for name in ("difftrain_utils", "configs", "accelerate_configs", "launch"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (ROOT / "pyproject.toml", ROOT / "README.md", ROOT / "LICENSE", *ROOT.glob("train_*.py")):
        shutil.copy(path, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(folder), str(source)]
    result = subprocess.run(build, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (wheel,) = folder.glob("difftrain-*.whl")
    result = subprocess.run(
        [*pip, "install", "--no-deps", "--no-index", "--target", str(folder / "site"), str(wheel)],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return folder


def test_a_wheel_has_all_modules_and_the_scripts(installed):
    (wheel,) = installed.glob("difftrain-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    here = {str(path.relative_to(ROOT)) for path in (ROOT / "difftrain_utils").rglob("*.py")}
    starter = [*ROOT.glob("train_*.py"), *(ROOT / "configs").rglob("*.*")]
    starter += [*(ROOT / "accelerate_configs").iterdir(), *(ROOT / "launch").iterdir()]
    here |= {str(path.relative_to(ROOT)) for path in (ROOT / "difftrain_utils/commands/report_page").iterdir()}
    here |= {f"difftrain_utils/starter/{path.relative_to(ROOT)}" for path in starter}
    assert here - names == set()
    added = {name for name in names if name.startswith("difftrain_utils/") and name not in here}
    shipped = ("/tiny_stable_diffusion/", "/tiny_scenes/", "/tiny_moving_shapes/")  # built-in checkpoints
    assert all(any(folder in name for folder in shipped) for name in added)


@pytest.mark.slow
def test_the_scripts_run_where_the_package_is_installed(installed, tmp_path):
    environment = launch_environment() | {"PYTHONPATH": str(installed / "site"), "HF_HUB_OFFLINE": "1"}

    def run(*command: str, cwd) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", *command]
        result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return result

    said = run("difftrain_utils", "init", "project", cwd=tmp_path).stdout
    scripts = (
        "train_few_step.py, train_preference.py, train_text.py, train_text_to_audio.py, train_text_to_image.py, "
        "train_text_to_video.py"
    )
    assert said == f"project holds {scripts}, configs, accelerate_configs and launch\n"
    project = tmp_path / "project"
    assert (project / "train_text_to_image.py").read_bytes() == (ROOT / "train_text_to_image.py").read_bytes()
    smoke = ("train_text_to_image.py", "--config", "configs/smoke_text2image.yaml")
    run("accelerate.commands.launch", *smoke, cwd=project)
    assert (project / "runs/smoke/pipeline/model_index.json").is_file()
    where = "import difftrain_utils; print(difftrain_utils.__file__)"
    found = subprocess.run([sys.executable, "-c", where], cwd=project, env=environment, capture_output=True, text=True)
    assert found.stdout.startswith(str(installed))


def test_a_folder_that_is_not_empty_is_refused(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(InputError, match=r"already there, and not an empty folder$"):
        main([str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_an_empty_folder_that_one_is_in_is_filled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["."])
    for folder in (Path(), tmp_path):  # the same one still
        names = {path.name for path in folder.iterdir()}
        scripts = {path.name for path in ROOT.glob("train_*.py")}
        assert names == scripts | {"configs", "accelerate_configs", "launch"}


def test_the_command_lists_its_commands_and_refuses_others(capsys):
    assert console.run(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in console.COMMANDS)
    for name in console.COMMANDS:
        with pytest.raises(SystemExit) as stopped:
            console.run([name, "--help"])
        assert stopped.value.code == 0 and f"difftrain {name}" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"^difftrain: no command 'trian'; there is init, migrate, caption, "):
        console.run(["trian"])
