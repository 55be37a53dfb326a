"""The units of a data set in files: the runs of rows that are read in one go. Row groups of parquet, record batches of
arrow, runs of a tar's members (WebDataset) and of the lines of JSONL, files of text; of a table in memory runs of its
rows.

What units a file has is found once, from footers and headers alone, and kept beside the caches: see `find_units`.
"""

import dataclasses
import io
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.table import cast_table_to_features
from safetensors.numpy import load, save

from difftrain_utils.data.remote import Reader, StoredFile, is_remote
from difftrain_utils.data.rows import map_in_threads
from difftrain_utils.errors import FileError, InputError, RowError, one_line
from difftrain_utils.terminal import progress

VERSION = 1  # of the index that is kept: raise it when units are found otherwise
TAR_UNIT = 2**22  # bytes of members, or of lines, after which a unit ends
TABLE_UNIT = 64  # rows
FOOTER = 2**16  # bytes of a parquet file's end that are asked for at once: most footers lie in them
GAP = 2**20  # bytes between two columns that are rather read than asked for apart
HEADER_BLOCK = 512
BLOCK = 2**22  # bytes of a remote file that are asked for at once to look through it
MANY = 64  # files whose footer or schema stays in memory
FIELD = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")  # WebDataset's: the key of a row, and the column

NO_LINES = "its first line is no object, {…}: a stream reads JSONL"
NAME = "__name__"  # in a row, how errors call it
Rows = list[dict[str, Any] | RowError | None]


@dataclasses.dataclass
class Units:
    """`of_file[f]`, the number of units of file f; of each unit its rows, and where it begins and ends in the file; of
    parquet the footers of all files one after another, and where each ends."""

    of_file: np.ndarray
    rows: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    footers: np.ndarray
    footer_ends: np.ndarray

    def __post_init__(self):
        self.first = np.concatenate([[0], np.cumsum(self.of_file)])

    def file_of(self, unit: int) -> int:
        """The number of a unit's file."""
        return int(np.searchsorted(self.first, unit, "right")) - 1

    def footer(self, file: int) -> bytes:
        """The end of a parquet file, from its footer on."""
        return self.footers[(self.footer_ends[file - 1] if file else 0) : self.footer_ends[file]].tobytes()

    def to_bytes(self) -> bytes:
        """As `from_bytes` reads it."""
        return save({field.name: getattr(self, field.name) for field in dataclasses.fields(self)})

    @classmethod
    def from_bytes(cls, content: bytes) -> "Units":
        """What `to_bytes` has written."""
        return cls(**load(content))


class Found(NamedTuple):
    """What is found in a file: (rows, first byte, end) of each unit, and parquet's footer."""

    units: list[tuple[int, int, int]]
    footer: bytes = b""


# ── Finding them ─────────────────────────────────────────────────────────────────────────────────────────────
def find_units(kind: str, files: Sequence[StoredFile], culprit: str, reader: Reader) -> Units:
    """Look for the units of all files, in threads. Parquet's footers are read, tar's headers (of a file on another
    machine all of it, because its headers lie between its members), and arrow's.

    Raises:
        InputError: a file is damaged or cannot be read.
    """

    def find(file: StoredFile) -> Found:
        try:
            return FINDERS[kind](file, reader)
        except (OSError, ValueError, EOFError, pa.ArrowException) as error:
            raise InputError(f"{culprit}: {file.path}: {one_line(error)}") from None

    found = list(progress(map_in_threads(find, files), len(files), "Looking through the files"))
    units = np.array([unit for of_file in found for unit in of_file.units], np.int64).reshape(-1, 3)
    return Units(
        of_file=np.array([len(of_file.units) for of_file in found], np.int64),
        **{name: units[:, i].copy() for i, name in enumerate(("rows", "starts", "ends"))},
        footers=np.frombuffer(b"".join(of_file.footer for of_file in found), np.uint8),
        footer_ends=np.cumsum([len(of_file.footer) for of_file in found], dtype=np.int64),
    )


def _find_in_parquet(file: StoredFile, reader: Reader) -> Found:
    asked = min(file.size, FOOTER)
    end = reader.read(file, file.size - asked, file.size)
    if end[-4:] != b"PAR1":
        raise ValueError("no parquet file, or cut off: it does not end with PAR1")
    length = int.from_bytes(end[-8:-4], "little") + 8
    if length > file.size:
        raise ValueError("the parquet footer is damaged")
    end = end[-length:] if length <= asked else reader.read(file, file.size - length, file.size)
    metadata = pq.read_metadata(pa.BufferReader(end))
    sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    return Found([(rows, group, group + 1) for group, rows in enumerate(sizes) if rows], end)


def _find_in_arrow(file: StoredFile, reader: Reader) -> Found:
    """Of a stream, as `datasets` writes it, or a file, which is a stream after eight bytes."""
    source = pa.BufferReader(reader.read(file, 0, file.size)) if is_remote(file.path) else pa.memory_map(file.path)
    units, schema = [], None
    with source:
        if source.read(6) != b"ARROW1":
            source.seek(0)
        else:
            source.seek(8)
        while True:
            start = source.tell()
            try:
                message = pa.ipc.read_message(source)
            except EOFError:
                break
            if message.type == "schema":
                schema = pa.ipc.read_schema(message)
            elif message.type != "record batch":
                raise ValueError(f"arrow's {message.type} messages are not read as a stream")
            else:
                rows = pa.ipc.read_record_batch(message, schema).num_rows
                units += [(rows, start, source.tell())] if rows else []
    if schema is None:
        raise ValueError("no arrow file: it has no schema")
    return Found(units)


def _find_in_tar(file: StoredFile, reader: Reader) -> Found:
    units, keys, start, end, last = [], 0, 0, 0, None
    for name, head, _, stop in walk_tar(_blocks(file, reader), file.size):
        key = _split_name(name)[0] if name is not None else None
        if key is not None and key != last:
            if keys and head - start >= TAR_UNIT:
                units.append((keys, start, head))
                keys, start = 0, head
            keys, last = keys + 1, key
        end = stop
    return Found([*units, (keys, start, end)] if keys else units)


def _find_in_lines(file: StoredFile, reader: Reader) -> Found:
    """Blank lines are no rows."""
    read, units, rows, start, at, rest = _blocks(file, reader), [], 0, 0, 0, b""
    while at < file.size:
        block = read(at, min(TAR_UNIT, file.size - at))
        if at == 0 and not block.lstrip().startswith(b"{"):
            raise ValueError(NO_LINES)
        at += len(block)
        *lines, rest = (rest + block).split(b"\n")
        rows += sum(1 for line in lines if line.strip())
        if (end := at - len(rest)) - start >= TAR_UNIT and rows:
            units.append((rows, start, end))
            rows, start = 0, end
    rows += bool(rest.strip())
    return Found([*units, (rows, start, file.size)] if rows else units)


def _find_in_text(file: StoredFile, reader: Reader) -> Found:
    """A file is a row."""
    return Found([(1, 0, file.size)])


def _features_of_lines(file: StoredFile, reader: Reader) -> datasets.Features:
    """Those of the first line."""
    line = reader.read(file, 0, min(TAR_UNIT, file.size)).lstrip().split(b"\n")[0]
    if not line.startswith(b"{"):
        raise ValueError(NO_LINES)
    return datasets.Features.from_arrow_schema(pa.Table.from_pylist([json.loads(line)]).schema)


def _features_of_text(file: StoredFile, reader: Reader) -> datasets.Features:
    return datasets.Features({"text": datasets.Value("string")})


def _blocks(file: StoredFile, reader: Reader) -> Callable[[int, int], bytes]:
    """Reads (start, length): of a file of this machine just that; of another by large blocks, one at a time."""
    if not is_remote(file.path):
        descriptor = open(file.path, "rb", buffering=0)  # noqa: SIM115
        return lambda start, length: os.pread(descriptor.fileno(), length, start)
    begin, block = 0, b""

    def read(start: int, length: int) -> bytes:
        nonlocal begin, block
        if not begin <= start <= start + length <= begin + len(block):
            begin, block = start, reader.read(file, start, min(file.size, start + max(BLOCK, length)))
        return block[start - begin : start - begin + length]

    return read


def walk_tar(read: Callable[[int, int], bytes], size: int) -> Iterator[tuple[str | None, int, int, int]]:
    """(name, start of its headers, start and end of its content) of the members of a tar file, of `size` bytes, that
    `read(start, length)` reads; of one that is no regular file the name is None. Knows the long names of GNU and pax.

    Python's `tarfile` takes three times as long, and is silent about a file that is cut off or has a damaged header.

    Raises:
        ValueError: the file is damaged.
    """
    at, head, name, length = 0, 0, None, None
    while at < size:
        block = read(at, HEADER_BLOCK)
        if len(block) == HEADER_BLOCK and not any(block):
            return
        if len(block) < HEADER_BLOCK or _octal(block[148:156]) != sum(block[:148]) + sum(block[156:]) + 8 * 32:
            raise ValueError(f"no tar file, or damaged or cut off at byte {at}")
        kind, content = block[156:157], at + HEADER_BLOCK
        num_bytes = _octal(block[124:136]) if length is None or kind in b"xgLK" else length
        following = content + -(-num_bytes // HEADER_BLOCK) * HEADER_BLOCK
        if content + num_bytes > size:
            raise ValueError(f"cut off: the member at byte {at} ends at {content + num_bytes} of {size} bytes")
        if kind == b"L":
            name = read(content, num_bytes).rstrip(b"\0").decode(errors="surrogateescape")
        elif kind == b"x":
            fields = _pax_fields(read(content, num_bytes))
            name, length = fields.get("path", name), int(fields["size"]) if "size" in fields else length
            if any(field.startswith("GNU.sparse") for field in fields):
                raise ValueError(f"the member at byte {at} is sparse, which is not read")
        elif kind == b"S":
            raise ValueError(f"the member at byte {at} is sparse, which is not read")
        elif kind not in b"gK":
            if name is None:
                name = block[:100].rstrip(b"\0").partition(b"\0")[0].decode(errors="surrogateescape")
                prefix = block[345:500].partition(b"\0")[0].decode(errors="surrogateescape")
                name = f"{prefix}/{name}" if block[257:263] == b"ustar\0" and prefix else name
            is_file = kind in (b"0", b"\0", b"7") and not name.rpartition("/")[2].startswith((".", "__"))
            yield name if is_file else None, head, content, content + num_bytes
            head, name, length = following, None, None
        at = following


def _octal(field: bytes) -> int:
    """A number in a tar's header; large ones are binary. -1: it is none."""
    if field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    try:
        return int(field.split(b"\0")[0].strip() or b"0", 8)
    except ValueError:
        return -1


def _pax_fields(content: bytes) -> dict[str, str]:
    """Of records "LENGTH NAME=VALUE\\n"."""
    fields, at = {}, 0
    while at < len(content) and content[at : at + 1] != b"\0":
        length = int(content[at : content.index(b" ", at)])
        name, _, value = content[at : at + length - 1].partition(b" ")[2].partition(b"=")
        fields[name.decode(errors="replace")] = value.decode(errors="surrogateescape")
        at += length
    return fields


def _split_name(name: str) -> tuple[str | None, str]:
    """The key of a row and the column that a member of a tar is of, as `datasets` splits them; without an ending it is
    of none."""
    match = FIELD.fullmatch(name)
    return (match[1], match[2]) if match else (None, "")


FINDERS = {
    "parquet": _find_in_parquet,
    "arrow": _find_in_arrow,
    "webdataset": _find_in_tar,
    "json": _find_in_lines,
    "text": _find_in_text,
}
FEATURE_FINDERS = {"json": _features_of_lines, "text": _features_of_text}


# ── Reading them ─────────────────────────────────────────────────────────────────────────────────────────────
class FileRows:
    """The rows of files by their units: of each row the columns `features`, as `datasets` stores them, and `NAME`."""

    def __init__(
        self, kind: str, files: Sequence[StoredFile], units: Units, features: datasets.Features, reader: Reader
    ):
        self.kind, self.files, self.units, self.features, self.reader = kind, list(files), units, features, reader
        self._opened: dict[int, Any] = {}  # metadata of parquet, schemas of arrow

    def read(self, unit: int) -> Rows:
        """The rows of a unit; of one that is wrong the error. Raises FileError if the unit cannot be read."""
        number = self.units.file_of(unit)
        file = self.files[number]
        try:
            return READERS[self.kind](self, number, unit)
        except (OSError, ValueError, TypeError, EOFError, pa.ArrowException) as error:
            first = self._first_row(number, unit)
            raise FileError(f"{file.path}: cannot read what comes after {first} rows: {one_line(error)}") from None

    def _first_row(self, number: int, unit: int) -> int:
        return int(self.units.rows[self.units.first[number] : unit].sum())

    def _remember(self, number: int, read: Callable[[], Any]) -> Any:
        if number not in self._opened:
            if len(self._opened) >= MANY:
                self._opened = {}
            self._opened[number] = read()
        return self._opened[number]

    def __getstate__(self):  # for the workers of a data loader where they are not forked
        return vars(self) | {"_opened": {}}

    def _of_table(self, table: pa.Table, number: int, unit: int) -> Rows:
        present = datasets.Features({name: self.features[name] for name in self.features if name in table.column_names})
        rows = cast_table_to_features(table.select(list(present)), present).to_pylist()
        first, missing = self._first_row(number, unit), dict.fromkeys(self.features.keys() - present.keys())
        named = enumerate(rows, first)
        return [missing | row | {NAME: f"{self.files[number].path} row {i}"} for i, row in named]


def _read_parquet(rows: FileRows, number: int, unit: int) -> Rows:
    file, group = rows.files[number], int(rows.units.starts[unit])
    metadata = rows._remember(number, lambda: pq.read_metadata(pa.BufferReader(rows.units.footer(number))))
    of_group, spans = metadata.row_group(group), []
    for i in range(of_group.num_columns):
        column = of_group.column(i)
        path = column.path_in_schema
        if any(path == name or path.startswith(f"{name}.") for name in rows.features):
            offsets = [column.data_page_offset, column.dictionary_page_offset]
            start = min(offset for offset in offsets if offset)
            spans.append((start, start + column.total_compressed_size))
    parts = Parts(file.size)
    for start, stop in _joined(spans):
        parts.add(start, rows.reader.read(file, start, stop))
    opened = pq.ParquetFile(pa.PythonFile(parts, mode="r"), metadata=metadata)
    names = [name for name in opened.schema_arrow.names if name in rows.features]
    return rows._of_table(opened.read_row_group(group, columns=names, use_threads=False), number, unit)


def _joined(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans of bytes, in order, those with a small gap between them as one."""
    joined: list[tuple[int, int]] = []
    for start, stop in sorted(spans):
        if joined and start - joined[-1][1] <= GAP:
            joined[-1] = joined[-1][0], max(stop, joined[-1][1])
        else:
            joined.append((start, stop))
    return joined


class Parts(io.RawIOBase):
    """A file of which some parts are at hand, for who reads no others."""

    def __init__(self, size: int):
        self.size, self.at, self.parts = size, 0, {}

    def add(self, start: int, content: bytes) -> None:
        """The bytes from `start` on."""
        self.parts[start] = content

    def read(self, length: int = -1) -> bytes:
        for start, content in self.parts.items():
            if start <= self.at and self.at + length <= start + len(content):
                self.at += length
                return content[self.at - length - start : self.at - start]
        raise OSError(f"the {length} bytes at {self.at} were not expected to be read")

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.size}[whence]
        return self.at

    def tell(self) -> int:
        return self.at

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


def _read_arrow(rows: FileRows, number: int, unit: int) -> Rows:
    file, first = rows.files[number], int(rows.units.starts[rows.units.first[number]])

    def read_schema() -> pa.Schema:
        head = rows.reader.read(file, 0, first)
        return pa.ipc.read_schema(pa.BufferReader(head[8:] if head.startswith(b"ARROW1") else head))

    schema = rows._remember(number, read_schema)
    content = rows.reader.read(file, int(rows.units.starts[unit]), int(rows.units.ends[unit]))
    batch = pa.ipc.read_record_batch(pa.ipc.read_message(pa.py_buffer(content)), schema)
    batch.validate(full=True)
    return rows._of_table(pa.Table.from_batches([batch]), number, unit)


def _read_tar(rows: FileRows, number: int, unit: int) -> Rows:
    file = rows.files[number]
    content = rows.reader.read(file, int(rows.units.starts[unit]), int(rows.units.ends[unit]))
    found: Rows = []
    last = None
    for name, _, start, stop in walk_tar(lambda start, length: content[start : start + length], len(content)):
        key, column = _split_name(name) if name is not None else (None, "")
        if key is None:
            continue
        if key != last:  # a key that comes again later is another row
            found.append(dict.fromkeys(rows.features) | {NAME: f"{file.path} {key}"})
            last = key
        row = found[-1]
        if column in rows.features and isinstance(row, dict):
            try:
                row[column] = _decoded(content[start:stop], key, column, rows.features[column])
            except ValueError as error:
                found[-1] = RowError(f"{file.path} {name}: {one_line(error)}")
    return found


def _decoded(content: bytes, key: str, column: str, feature: Any) -> Any:
    """The content of a tar's member, as `datasets` decodes it by its ending; nothing is unpickled."""
    if isinstance(feature, datasets.Image | datasets.Video | datasets.Audio):
        return {"bytes": content, "path": f"{key}.{column}"}
    ending = column.rpartition(".")[2].lower()
    if ending in ("cls", "cls2", "index", "inx", "id"):
        return int(content)
    text = content.decode()
    return json.loads(text) if ending in ("json", "jsn") else text


def _read_lines(rows: FileRows, number: int, unit: int) -> Rows:
    file, first, found = rows.files[number], rows._first_row(number, unit), []
    content = rows.reader.read(file, int(rows.units.starts[unit]), int(rows.units.ends[unit]))
    for line in filter(bytes.strip, content.split(b"\n")):
        name = f"{file.path} row {first + len(found)}"
        try:
            row = json.loads(line)
        except ValueError as error:
            found.append(RowError(f"{name}: not JSON: {one_line(error)}"))
            continue
        if isinstance(row, dict):
            found.append({column: row.get(column) for column in rows.features} | {NAME: name})
        else:
            found.append(RowError(f"{name}: must be an object, {{…}}, got {row!r:.80}"))
    return found


def _read_text(rows: FileRows, number: int, unit: int) -> Rows:
    path, content = rows.files[number].path, rows.reader.read(rows.files[number], 0, rows.files[number].size)
    try:
        return [dict.fromkeys(rows.features, content.decode()) | {NAME: path}]  # of which there is `text` alone
    except UnicodeDecodeError:
        return [RowError(f"{path}: not UTF-8")]


READERS = {
    "parquet": _read_parquet,
    "arrow": _read_arrow,
    "webdataset": _read_tar,
    "json": _read_lines,
    "text": _read_text,
}


class TableRows:
    """The rows of a table in memory, such as that of an image folder, whose images are read one by one."""

    def __init__(self, rows: list[dict[str, Any]]):
        self.rows = rows
        ends = [*range(TABLE_UNIT, len(rows), TABLE_UNIT), len(rows)]
        sizes = np.diff([0, *ends]) if rows else np.zeros(0, np.int64)
        self.units = Units(np.ones(len(sizes), np.int64), sizes, *[np.zeros(0, np.int64)] * 4)

    def read(self, unit: int) -> Rows:
        """The rows of a unit."""
        return self.rows[unit * TABLE_UNIT : (unit + 1) * TABLE_UNIT]  # a list of its own
