import http.server
import threading
from functools import partial
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from test_streaming import write_parquet, write_tars

from difftrain_utils.config.data import DataConfig
from difftrain_utils.data import remote
from difftrain_utils.data.remote import Reader, again, find_file, list_urls
from difftrain_utils.data.streaming import open_stream
from difftrain_utils.errors import InputError


@pytest.fixture
def waits(monkeypatch) -> list[float]:
    """Instead of waiting."""
    waited: list[float] = []
    monkeypatch.setattr(remote.time, "sleep", waited.append)
    return waited


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_parquet(tmp_path_factory.mktemp("remote") / "parquet")


@pytest.fixture
def memory(folder):
    """A file system with the same files at memory://rows, and what was read from it."""
    system, asked = fsspec.filesystem("memory"), []
    for path in folder.iterdir():
        system.pipe(f"/rows/{path.name}", path.read_bytes())
    yield system, asked
    system.rm("/rows", recursive=True)


@pytest.fixture
def flaky(memory, monkeypatch) -> list[str]:
    """Every second read fails, or stops short."""
    original, reads = MemoryFileSystem.cat_file, []

    def cat_file(self, path, start=None, end=None, **kwargs):
        reads.append(path)
        if len(reads) % 2:
            return original(self, path, start, end, **kwargs)
        if len(reads) % 4:
            raise ConnectionResetError("the network")
        return original(self, path, start, end, **kwargs)[:-1]

    monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)
    return reads


def captions(config: DataConfig) -> list[str]:
    rows = open_stream(config)
    order = rows.order(0, 4)
    found = [rows[order[k]].captions for k in range(30)]
    rows._pool.shutdown()
    return found


def test_rows_of_another_machine_come_in_the_same_order_whatever_its_network_does(folder, flaky, waits, tmp_path):
    fields = {"resolution": 16, "streaming": True, "shuffle_buffer": 5, "cache_dir": str(tmp_path)}
    expected = captions(DataConfig(str(folder), **fields))
    assert not flaky
    assert captions(DataConfig("memory://rows", **fields)) == expected
    assert len(flaky) > 16 and set(waits) - {0.05} == {1}
    flaky.clear()
    assert captions(DataConfig("memory://rows", **fields)) == expected
    assert not flaky  # all of it is kept


def test_https_and_counted_names(tmp_path, waits):
    pytest.importorskip("aiohttp")
    folder = write_tars(tmp_path / "files")
    (folder / "0.tar").rename(folder / "00.tar")
    handler = partial(RangeHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("localhost", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://localhost:{server.server_port}"
        fields = {"image_column": "png", "caption_column": "txt", "resolution": 16, "streaming": True}
        config = DataConfig(f"{url}/{{1..3}}.tar", **fields, cache_dir=str(tmp_path / "cache"))
        assert set(captions(config)) == {str(i) for i in range(5, 13)}
        server.shutdown()
    assert list_urls("s3://a/b-{08..11}.tar", ["tar"]) == [f"s3://a/b-{i}.tar" for i in ("08", "09", "10", "11")]


class RangeHandler(http.server.SimpleHTTPRequestHandler):
    """As file servers are: knows ranges of bytes."""

    def log_message(self, *arguments) -> None:
        pass

    def do_GET(self) -> None:
        content = Path(self.translate_path(self.path)).read_bytes()
        first, last = 0, len(content) - 1
        if asked := self.headers.get("Range"):
            begin, end = asked.removeprefix("bytes=").split("-")
            first, last = int(begin), min(int(end or last), last)
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(last - first + 1))
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        self.wfile.write(content[first : last + 1])


def test_the_cache_stays_within_its_bounds(tmp_path, memory):
    system, _ = memory
    system.pipe("/rows/large", bytes(range(256)) * 4000)
    file, reader = find_file("memory://rows/large"), Reader(tmp_path, 100_000)
    for i in range(100):
        assert reader.read(file, i * 10_000, (i + 1) * 10_000) == (bytes(range(256)) * 4000)[i * 10_000 :][:10_000]
        assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) <= 105_000
    kept = list(tmp_path.rglob("*"))
    nothing = Reader(tmp_path / "nothing", 0)
    assert len(nothing.read(file, 0, 10)) == 10 and not (tmp_path / "nothing").exists() and len(kept) > 5
    system.pipe("/rows/large", bytes(1_024_000))  # another content is not that which was kept
    assert reader.read(find_file("memory://rows/large"), 990_000, 1_000_000) == bytes(10_000)


def test_what_fails_for_good_says_so(waits, memory, tmp_path):
    calls = []

    def fail(error: Exception) -> None:
        calls.append(error)
        raise error

    with pytest.raises(OSError, match=r"^the network \(tried 6 times\)$"):
        again(partial(fail, ConnectionResetError("the network")))
    assert waits == [1, 2, 4, 8, 16] and len(calls) == 6
    with pytest.raises(FileNotFoundError):
        again(partial(fail, FileNotFoundError("gone")))
    assert len(calls) == 7
    for url, message in (
        ("memory://none", r"^data.dataset: memory://none has no files that end in tar, parquet, arrow; a folder with"),
        ("memory://rows/none.parquet", r"^data.dataset: cannot load 'memory://rows/none.parquet'"),
        ("nonsense://rows", r"^data.dataset: cannot load 'nonsense://rows'.*nonsense"),
    ):
        with pytest.raises(InputError, match=message):
            open_stream(DataConfig(url, streaming=True, cache_dir=str(tmp_path)))
