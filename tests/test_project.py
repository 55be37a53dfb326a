"""What the project promises beside its code: lanes, markers, extras, the environment of runs, docs/mvp_spec.md."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers import ROOT

from difftrain_utils.commands.main import COMMANDS
from difftrain_utils.config.config import field_names
from difftrain_utils.config.text_to_image import TextToImageConfig

PYTHONS = ["3.10", "3.11", "3.12", "3.13"]
SPEC = (ROOT / "docs/mvp_spec.md").read_text()
FOLDER_OF_A_RUN = {"config.resolved.yaml", "env.json", "run_manifest.json"}


def workflow(name: str) -> dict:
    return yaml.load((ROOT / f".github/workflows/{name}.yml").read_text(), yaml.BaseLoader)  # `on` is no boolean


def steps_of(job: dict) -> str:
    return "\n".join(step.get("run", step.get("uses", "")) for step in job["steps"])


def test_the_lane_of_tests():
    tests = workflow("tests")
    assert tests["on"].keys() == {"push", "pull_request"}
    jobs = tests["jobs"]
    assert jobs["pytest"]["strategy"]["matrix"]["python-version"] == PYTHONS
    (pattern,) = re.findall(r"sed -n '(.*)' README.md", steps_of(jobs["pytest"]))
    assert pattern in (ROOT / ".ci/run").read_text()  # the same command as there, and one there is
    command = subprocess.run(["sed", "-n", pattern, ROOT / "README.md"], capture_output=True, text=True).stdout
    assert command.startswith("pip install -c constraints.txt") and command.endswith("&& pytest\n")
    assert {"ruff check .", "ruff format --check ."} <= set(steps_of(jobs["style"]).splitlines())
    assert "actionlint" in steps_of(jobs["style"]) and "mkdocs build --strict" in steps_of(jobs["docs"])


def test_the_lane_of_text_to_image_on_a_gpu():
    smoke = workflow("text2image-smoke")
    assert smoke["on"].keys() == {"schedule", "workflow_dispatch"} and len(smoke["on"]["schedule"]) == 1
    (job,) = smoke["jobs"].values()
    assert job["runs-on"] == ["self-hosted", "linux", "x64", "gpu"]
    known = yaml.safe_load((ROOT / ".github/actionlint.yaml").read_text())["self-hosted-runner"]["labels"]
    assert known == ["gpu"]
    (upload,) = [step["with"] for step in job["steps"] if "upload-artifact" in step.get("uses", "")]
    assert upload["name"] == "text2image-smoke-${{ github.run_id }}"
    assert upload["path"].split() == ["_ci_tmp/logs/text2image_smoke.log", "_ci_tmp/pytest_tmp"]
    for path in upload["path"].split():
        assert path in steps_of(job)
    assert 'pytest -n 0 -m "cuda or (text2image and integration)"' in steps_of(job)


EXAMPLES = """
import pytest

def test_quick(): pass
def test_trains(): train()
@pytest.fixture
def short_run(): pass
@pytest.mark.slow
def test_slow(short_run): pass
@pytest.mark.integration
def test_integration(): pass
@pytest.mark.cuda
def test_cuda(): pass
"""


@pytest.mark.parametrize(
    ("options", "chosen"),
    [
        ([], {"quick", "trains"}),
        (["--run-slow"], {"quick", "trains", "slow"}),
        (["--run-integration"], {"quick", "trains", "integration"}),
        (["-m", "slow"], {"slow"}),
        (["-m", "integration"], {"integration"}),
        (["-m", "cuda"], {"cuda"}),
        (["-m", "unit"], {"quick"}),
        (["-m", "text2image"], {"trains"}),
        (["-m", "text2image", "--run-slow"], {"trains", "slow"}),
        (["-m", "not slow"], {"quick", "trains"}),
    ],
    ids=lambda value: " ".join(sorted(value)),
)
def test_markers_choose(tmp_path, options, chosen):
    (tmp_path / "test_examples.py").write_text(EXAMPLES)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = slow\n  integration\n  cuda\n  unit\n  text2image\n")
    command = [sys.executable, "-m", "pytest", "-p", "markers", "-p", "no:xdist", "--collect-only", "-q", *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests")}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert set(re.findall(r"::test_(\w+)", result.stdout)) == chosen, result.stdout + result.stderr


def project() -> dict:
    tomllib = pytest.importorskip("tomllib")  # of Python 3.11
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_extras():
    extras = project()["project"]["optional-dependencies"]

    def named(extra: str) -> set[str]:
        (requirement,) = extras[extra]
        return set(re.fullmatch(r"difftrain\[(.*)\]", requirement)[1].split(","))

    assert named("text2image") <= extras.keys()
    assert named("all") | named("text2image") == extras.keys() - {"all", "dev", "docs"}


ROWS = re.findall(r"^\| (.*?) \| (.*?) \| (.*?) \|$", SPEC.split("## The MVP")[1], re.MULTILINE)[2:]


def test_what_the_mvp_had_is_where_the_table_says():
    fields = {*field_names(TextToImageConfig), *TextToImageConfig.__dataclass_fields__}
    scripts = {*project()["project"]["scripts"], "pytest", "pip", "python"}
    for subject, where, tests in ROWS:
        assert "`" in where or where.startswith("the same"), subject
        assert "`" in tests, subject
        for name in re.findall(r"`(.*?)`", where):
            words = shlex.split(name)
            if words[0] in scripts:
                assert words[0] != "difftrain" or words[1] in COMMANDS, name
            elif re.fullmatch(r"\w+\.\w+", name) and name not in FOLDER_OF_A_RUN and not name.endswith(".py"):
                assert name in fields, name
            elif "/" in name or name.endswith(".py"):
                assert (ROOT / name).exists(), name
    assert len(ROWS) == 40


def run_setup(tmp_path: Path, answers: tuple[str, ...], **environment: str) -> dict[str, str]:
    """What scripts/setup_runtime_env.sh sets where only these addresses answer."""
    curl = tmp_path / "bin/curl"
    curl.parent.mkdir(exist_ok=True)
    cases = "|".join(answers) or "nothing"
    curl.write_text(f'#!/bin/sh\nfor last; do :; done\ncase "$last" in {cases}) exit 0;; esac\nexit 22\n')
    curl.chmod(0o755)
    command = "source scripts/setup_runtime_env.sh && env"
    environment = {"PATH": f"{curl.parent}:/usr/bin:/bin", "DIFFTRAIN_CACHE": str(tmp_path / "cache")} | environment
    result = subprocess.run(
        ["bash", "-euc", command], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    return dict(line.split("=", 1) for line in result.stdout.splitlines() if "=" in line)


HUB, MIRROR = "https://huggingface.co", "https://mirror.example"


def test_the_environment_of_runs(tmp_path):
    found = run_setup(tmp_path, (HUB,), HF_MIRROR=MIRROR, TORCH_HOME="/tmp")
    assert found["HF_HOME"] == str(tmp_path / "cache/huggingface") and Path(found["HF_HOME"]).is_dir()
    assert found["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8" and found["TORCH_HOME"] == "/tmp"
    assert "HF_ENDPOINT" not in found


def test_another_hub_only_where_the_official_one_fails_and_one_is_named(tmp_path):
    assert run_setup(tmp_path, (MIRROR,), HF_MIRROR=MIRROR)["HF_ENDPOINT"] == MIRROR
    assert "HF_ENDPOINT" not in run_setup(tmp_path, (), HF_MIRROR=MIRROR)
    assert "HF_ENDPOINT" not in run_setup(tmp_path, (MIRROR,))
    assert (
        run_setup(tmp_path, (), HF_MIRROR=MIRROR, HF_ENDPOINT="https://own.example")["HF_ENDPOINT"]
        == "https://own.example"
    )


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0" and {"message", "title", "authors"} <= citation.keys()
    assert str(citation["version"]) == project()["project"]["version"]
