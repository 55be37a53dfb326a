"""Parts of files, from this machine or by fsspec from another one (hf://, s3://, https://): tried again where the
network fails, and kept in a folder of bounded size."""

import contextlib
import hashlib
import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import fsspec

from difftrain_utils.errors import RunError, one_line, warn
from difftrain_utils.files import write_file

T = TypeVar("T")

WAITS = (1, 2, 4, 8, 16)  # seconds before each further try
FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotImplementedError, ImportError)  # trying helps not
COUNTED = re.compile(r"\{(\d+)\.\.(\d+)\}")  # as WebDataset writes it
CLEANED = 0.05  # part of the cache's size that is written before a process looks how full it is


class StoredFile(NamedTuple):
    """A file as it was found: where it lies, its bytes, what changes when its content does, and a digest of that where
    the file system knows one."""

    path: str
    size: int
    version: str
    digest: str | None = None

    @property
    def name(self) -> str:
        """Without its folders."""
        return self.path.rstrip("/").rpartition("/")[2]


def is_remote(path: str) -> bool:
    """Whether a file is read by fsspec."""
    return "://" in path


def list_urls(url: str, kinds: Sequence[str]) -> list[str]:
    """The files that a URL stands for, sorted: of a folder those that end as one of `kinds`; else what it matches with
    `*`, and `{0000..0099}` counted through. Raises OSError if it cannot be listed."""
    if counted := COUNTED.search(url):
        first, last = counted.groups()
        numbers = (f"{i:0{len(first)}d}" for i in range(int(first), int(last) + 1))
        return [file for n in numbers for file in list_urls(url[: counted.start()] + n + url[counted.end() :], kinds)]
    ending = url.rpartition(".")[2]
    if ending in kinds and "*" not in url:
        return [url]

    def look_up() -> list[str]:
        system, within = fsspec.url_to_fs(url)
        paths = system.glob(within) if "*" in url else system.find(within)
        return sorted(system.unstrip_protocol(path) for path in paths if path.rpartition(".")[2] in kinds)

    return again(look_up)


def find_file(path: str) -> StoredFile:
    """Look a file up. Raises OSError if that fails."""
    if not is_remote(path):
        stat = os.stat(path)
        return StoredFile(path, stat.st_size, f"{stat.st_mtime_ns}/{stat.st_ctime_ns}")

    def look_up() -> StoredFile:
        system, within = fsspec.url_to_fs(path)
        found = system.info(within)
        digest = found.get("blob_id") or found.get("ETag")
        times = (found[name] for name in ("mtime", "LastModified", "created") if found.get(name))
        return StoredFile(path, found["size"], str(digest or next(times, "")), digest)

    return again(look_up)


def again(function: Callable[[], T]) -> T:
    """What `function` returns, tried again after some seconds where it fails, but for want of the file or the right to
    read it. Raises OSError for the last failure, which names what there was."""
    for wait in (*WAITS, None):
        try:
            return function()
        except FINAL as error:
            raise error if isinstance(error, OSError) else OSError(one_line(error)) from error
        except Exception as error:  # each file system has its own
            if wait is None:
                raise OSError(f"{one_line(error)} (tried {len(WAITS) + 1} times)") from error
        time.sleep(wait)
    raise AssertionError


class Reader:
    """Reads parts of files. Those of other machines are kept in `folder`, of which the parts that were not read for the
    longest time go when it has more than `limit` bytes; 0: nothing is kept. Several processes may share the folder."""

    def __init__(self, folder: Path, limit: float):
        self.folder, self.limit = folder, limit
        self._written = 0

    def read(self, file: StoredFile, start: int, stop: int) -> bytes:
        """The bytes [start, stop). Raises OSError if they cannot be read."""
        if is_remote(file.path):
            return self._read_remote(file, start, stop)
        with open(file.path, "rb", buffering=0) as opened:
            content = os.pread(opened.fileno(), stop - start, start)
            while len(content) < stop - start and (more := os.pread(opened.fileno(), 1 << 30, start + len(content))):
                content += more[: stop - start - len(content)]
        return _checked(content, start, stop)

    def _read_remote(self, file: StoredFile, start: int, stop: int) -> bytes:
        name = hashlib.sha256(f"{file.path}\n{file.version}\n{start}-{stop}".encode()).hexdigest()
        kept = self.folder / name[:2] / name
        with contextlib.suppress(OSError):
            content = kept.read_bytes()
            if len(content) == stop - start:
                os.utime(kept)
                return content

        def fetch() -> bytes:
            system, within = fsspec.url_to_fs(file.path)
            return _checked(system.cat_file(within, start, stop), start, stop)

        content = again(fetch)
        if 0 < len(content) <= self.limit:
            self._keep(kept, content)
        return content

    def _keep(self, path: Path, content: bytes) -> None:
        if self._written == 0 or self._written > CLEANED * self.limit:
            self._written = 0
            self._make_room(len(content))
        try:
            write_file(path, content, shared=True)
        except RunError as error:
            warn(f"data.stream_cache_gb: {error}; what is read is not kept from here on")
            self.limit = 0
        self._written += len(content)

    def _make_room(self, needed: int) -> None:
        """Delete down to what leaves room for `needed` and for what is written until the next look."""
        parts = []
        for path in self.folder.glob("*/*"):
            with contextlib.suppress(OSError):  # another process has deleted it
                stat = path.stat()
                parts.append((stat.st_mtime, stat.st_size, path))
        excess = sum(size for _, size, _ in parts) + needed - (1 - CLEANED) * self.limit
        for _, size, path in sorted(parts):
            if excess <= 0:
                break
            with contextlib.suppress(OSError):
                path.unlink()
                excess -= size


def _checked(content: bytes, start: int, stop: int) -> bytes:
    if len(content) != stop - start:
        raise OSError(f"has only {len(content)} of the bytes from {start} to {stop}")
    return content
