"""A process that hangs ends by itself, and says where."""

import re
import subprocess
import sys
import time

import pytest
from helpers import ROOT, launch

from difftrain_utils.run.time_limit import time_limit


def test_what_takes_too_long_ends_with_a_line_that_says_where(tmp_path):
    script = tmp_path / "hangs.py"
    lines = ["import threading", "from difftrain_utils.run.time_limit import time_limit"]
    lines += ["with time_limit(0.1 / 60, 'step 3 has not ended'):", "    threading.Event().wait()"]
    script.write_text("\n".join(lines))
    result = subprocess.run(
        [sys.executable, str(script)], cwd=ROOT, capture_output=True, text=True, timeout=60, env={"PYTHONPATH": "."}
    )
    message = rf"error: step 3 has not ended; process 0 of 1 on .* is in {script} line 4 \(<module>\), wait\n"
    assert result.returncode == 1
    assert re.fullmatch(message, result.stderr.lstrip()), result.stderr


def test_what_ends_in_time_is_let_be():
    with time_limit(0.1 / 60, "never said"):
        pass
    with time_limit(None, "never said"):
        time.sleep(0.2)


@pytest.mark.slow
def test_a_step_that_hangs_is_named(short_run, tmp_path):
    script = tmp_path / "hangs.py"
    text = """if True:
        import runpy, time
        from difftrain_utils.data.samples import Samples

        def get_or_hang(self, k, get=Samples.__getitem__):
            if k == 12:
                time.sleep(1000)  # as where a file system does not answer
            return get(self, k)

        Samples.__getitem__ = get_or_hang
        runpy.run_path("train_text_to_image.py", run_name="__main__")
    """
    script.write_text(text)
    # sample 12 is of step 4
    result = launch([*short_run, "--train.step_minutes", "0.1"], script=script, timeout=120)
    assert result.returncode == 1
    line = [line for line in result.stderr.splitlines() if line.startswith("error: ")][-1]
    assert line.startswith("error: step 4 has not ended after 0.1 minutes (train.step_minutes); process 0 of 1 on ")
    assert " is in " in line and "get_or_hang" in line
