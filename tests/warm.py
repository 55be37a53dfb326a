"""Processes that run a script and have its packages imported already: one starts in a second instead of ten.

They are forks of a process that has done nothing but import, so a run in one is as good as a run of `python script.py`.
"""

import atexit
import ctypes
import functools
import multiprocessing
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parent.parent


class Run:
    """A script at work, with what tests need of `subprocess.Popen`. What it prints is written to two files."""

    def __init__(
        self,
        script: Path,
        argv: Sequence[str],
        environment: Mapping[str, str],
        cwd: Path = ROOT,
        new_session: bool = False,
        output: Path | None = None,
    ) -> None:
        folder = Path(tempfile.mkdtemp(prefix="run-", dir=_folder()))
        self.args = [str(script), *map(str, argv)]
        self._outputs = [output or folder / name for name in ("stdout", "stderr")]
        self._process = _context().Process(
            target=_run, args=(self.args, dict(environment), str(cwd), self._outputs, new_session)
        )
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def completed(self, timeout: float | None = None) -> subprocess.CompletedProcess:
        """Wait for its end, and kill it where that takes longer than `timeout` seconds."""
        try:
            code = self.wait(timeout)
        finally:
            self.kill()
        return subprocess.CompletedProcess(self.args, code, *(path.read_text() for path in self._outputs))


def _run(
    args: list[str], environment: dict[str, str], cwd: str, outputs: list[Path], new_session: bool
) -> None:  # in the new process
    multiprocessing.set_start_method(None, force=True)  # the default again, for workers of its own
    if new_session:
        os.setsid()
    for descriptor, path in enumerate(outputs, start=1):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    if "FAULT_AT" in environment:
        ctypes.CDLL(None).fault_at(ctypes.c_long(int(environment["FAULT_AT"])), int(environment["FAULT_ERROR"]))
    sys.argv = args
    try:
        runpy.run_path(args[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # a process of multiprocessing ends without them


@functools.cache
def _folder() -> str:
    folder = tempfile.mkdtemp(prefix="difftrain-runs-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def faults_library() -> Path | None:
    """faults/faults.c as a library to preload, where this can be done."""
    if sys.platform != "linux" or shutil.which("cc") is None:
        return None
    library = Path(_folder()) / "faults.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, ROOT / "tests/faults/faults.c", "-ldl"], check=True)
    return library


@functools.cache
def _context() -> multiprocessing.context.BaseContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train_text_to_image", "torch.utils.tensorboard", "preloaded"])
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    if library := faults_library():  # which does nothing until it is asked to
        environment["LD_PRELOAD"] = str(library)
    with mock.patch.dict(os.environ, environment):
        multiprocessing.forkserver.ensure_running()
    return context
