"""One run at a time in a folder."""

import fcntl
import json
import os
from pathlib import Path

from difftrain_utils.errors import InputError, blame
from difftrain_utils.processes import is_gone, read_process, this_process
from difftrain_utils.run.run_folder import LOCK_FILE, holds_run

_held: dict[Path, int] = {}  # descriptors, which stay open as long as the process lives


def lock_folder(output_dir: Path) -> None:
    """Keep other runs out of `output_dir`, which is made, until this process ends, in whichever way.

    The lock is POSIX's on the file `run.lock` (`fcntl.lockf`): the kernel takes it back when the process dies, the
    workers that it forks do not have it, and NFS passes it on to other hosts. Where a file system has no locks, who
    made `run.lock.owner` has the folder; of an owner that is dead on this host, it is taken over.

    Raises:
        InputError: another run is in the folder; or the folder is none.
    """
    path = (output_dir / LOCK_FILE).resolve()
    if path in _held:
        return
    with blame(f"train.output_dir: {output_dir}", OSError):
        output_dir.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        _refuse(output_dir, read_process(path))
    except OSError:  # no locks here
        _own(path.with_name(f"{path.name}.owner"), output_dir)
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(this_process()).encode(), 0)
    _held[path] = descriptor


def lock_used_folder(output_dir: Path) -> None:
    """The same, of a folder that holds a run; others are left as they are."""
    if holds_run(output_dir):
        lock_folder(output_dir)


def is_in_use(output_dir: Path) -> bool:
    """Whether a run is in the folder now."""
    path = (output_dir / LOCK_FILE).resolve()
    owner = path.with_name(f"{path.name}.owner")
    if owner.exists():
        return not is_gone(read_process(owner))
    if path in _held or not path.exists():
        return path in _held
    descriptor = os.open(path, os.O_RDWR)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return True
    except OSError:  # no locks here
        return False
    finally:
        os.close(descriptor)
    return False


def _own(path: Path, output_dir: Path) -> None:
    for _ in range(2):
        try:
            with path.open("x") as file:
                json.dump(this_process(), file)
            return
        except FileExistsError:
            owner = read_process(path)
            if not is_gone(owner):
                _refuse(output_dir, owner, f"; if it is not, delete {path}")
            path.unlink(missing_ok=True)
    _refuse(output_dir, read_process(path))


def _refuse(output_dir: Path, owner: dict, more: str = "") -> None:
    who = f" (process {owner['pid']} on {owner['host']}, since {owner['since']})" if owner else ""
    raise InputError(f"train.output_dir: another run is writing into {output_dir}{who}{more}")
