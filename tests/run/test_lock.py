"""One run at a time in a folder."""

import errno
import fcntl
import json
import os
import platform
import subprocess
import sys

import psutil
import pytest
from helpers import assert_refused, last_step, launch, launch_environment, start, wait_for

from difftrain_utils.errors import InputError
from difftrain_utils.run import lock
from difftrain_utils.run.lock import lock_folder
from difftrain_utils.run.run_folder import list_checkpoints
from difftrain_utils.terminal import STOPPED


def lock_elsewhere(folder) -> subprocess.CompletedProcess:
    """In another process, which then ends."""
    code = "from pathlib import Path; from difftrain_utils.run.lock import lock_folder; "
    code += f"lock_folder(Path({str(folder)!r}))"
    return subprocess.run([sys.executable, "-c", code], env=launch_environment(), capture_output=True, text=True)


def test_a_second_run_in_a_folder_is_refused_and_the_first_one_ends_well(short_run, tmp_path, request):
    argv = [*short_run, "--train.max_steps", "100000", "--lr_scheduler.name", "constant_with_warmup"]
    first = start(argv)
    request.addfinalizer(first.kill)
    wait_for(lambda: last_step(tmp_path / "run") > 1, first)
    assert lock.is_in_use(tmp_path / "run")
    message = rf"train.output_dir: another run is writing into .*run \(process {first.pid} on {platform.node()}, since "
    for more in (["--train.overwrite"], ["--resume-from", "latest"]):
        result = launch([*argv, *more])
        assert_refused(result, message)
    first.terminate()
    assert first.wait() == STOPPED and not lock.is_in_use(tmp_path / "run")
    assert list_checkpoints(tmp_path / "run")[-1][0] == last_step(tmp_path / "run")
    assert not list((tmp_path / "run").glob("*.damaged"))


def test_the_lock_ends_with_the_process(tmp_path):
    assert lock_elsewhere(tmp_path / "run").returncode == 0
    lock_folder(tmp_path / "run")
    lock_folder(tmp_path / "run")  # it is this process's
    descriptor = lock._held[tmp_path / "run/run.lock"]  # reading the file would give the lock up
    assert json.loads(os.pread(descriptor, 1000, 0))["pid"] == os.getpid()
    result = lock_elsewhere(tmp_path / "run")
    assert result.returncode == 1 and "another run is writing into" in result.stderr


def test_a_fork_does_not_hold_it(tmp_path):
    """A worker that outlives its run for some seconds."""
    code = (
        "import os, time\n"
        "from pathlib import Path\n"
        "from difftrain_utils.run.lock import lock_folder\n"
        f"lock_folder(Path({str(tmp_path)!r}))\n"
        "if os.fork() == 0:\n"
        "    time.sleep(5)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], env=launch_environment(), check=False).returncode == 0
    lock_folder(tmp_path)


class TestWithoutLocks:
    """Of a file system that has none."""

    @pytest.fixture(autouse=True)
    def no_locks(self, monkeypatch):
        def refuse(descriptor, operation):
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(fcntl, "lockf", refuse)
        monkeypatch.setattr(lock, "_held", {})

    def owner(self, tmp_path, **fields) -> None:
        me = psutil.Process()
        content = {"host": platform.node(), "pid": me.pid, "started": me.create_time(), "since": "today"} | fields
        (tmp_path / "run.lock.owner").write_text(json.dumps(content))

    def test_who_is_there_owns_the_folder(self, tmp_path):
        lock_folder(tmp_path)
        lock._held.clear()  # as another process
        with pytest.raises(
            InputError, match=rf"another run .*\(process {os.getpid()} on .*if it is not, delete .*owner$"
        ):
            lock_folder(tmp_path)

    @pytest.mark.parametrize("stale", [{"pid": 2**22 - 3}, {"started": 1.0}], ids=["gone", "another has its number"])
    def test_a_dead_owner_of_this_host_is_replaced(self, tmp_path, stale):
        self.owner(tmp_path, **stale)
        lock_folder(tmp_path)
        assert json.loads((tmp_path / "run.lock.owner").read_text())["started"] == psutil.Process().create_time()

    def test_of_another_host_nobody_knows(self, tmp_path):
        self.owner(tmp_path, host="another", pid=2**22 - 3)
        with pytest.raises(InputError, match=r"on another, since today\); if it is not, delete "):
            lock_folder(tmp_path)
