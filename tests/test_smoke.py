"""docs/mvp_smoke_checklist.md, gone through as a user does: on the GPU of this machine, if it has one."""

import re
import shlex
import subprocess
import sys

import pytest
from helpers import ROOT, launch_environment

ROWS = re.findall(r"^\| (\d+) \| `(.*?)` \|(.*)\|$", (ROOT / "docs/mvp_smoke_checklist.md").read_text(), re.MULTILINE)
PROGRAMS = {  # what the installation calls by these names, of this checkout
    "difftrain": "from difftrain_utils.commands.main import main; main()",
    "accelerate": "from accelerate.commands.accelerate_cli import main; main()",
    "make_dummy_imagefolder": "from difftrain_utils.commands.main import make_dummy_imagefolder as main; main()",
}


def test_the_list_is_whole_and_in_order():
    assert [int(number) for number, _, _ in ROWS] == list(range(1, len(ROWS) + 1)) and len(ROWS) >= 12


@pytest.mark.integration
@pytest.mark.text2image
def test_each_command_of_the_list_runs(tmp_path):
    """One test: later commands need what earlier ones leave."""
    for name in ("configs", "train_text_to_image.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    for number, command, leaves in ROWS:
        program, *argv = shlex.split(command)
        argv = [sys.executable, "-c", PROGRAMS[program], *argv]
        environment = launch_environment()
        result = subprocess.run(argv, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
        assert result.returncode == 0, f"{number}: {command}\n{result.stdout}{result.stderr}"
        for path in re.findall(r"`(.*?)`", leaves):
            assert (tmp_path / path).is_file(), f"{number}: {path}"
