"""Files and folders that are written whole or not at all, and digests of what is in them.

What is written lies beside its place under another name, `….partial`, until all its bytes are on the disk; then it is
renamed. So a kill or a full disk leaves what was there before.
"""

import contextlib
import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from difftrain_utils.errors import warn, writing

if TYPE_CHECKING:
    import torch

PARTIAL = ".partial"
DIGESTS_FILE = "SHA256SUMS"  # of a folder, as sha256sum writes and checks it


# ── Whole or not at all ──────────────────────────────────────────────────────────────────────────────────────
@contextlib.contextmanager
def new_file(path: Path, shared: bool = False) -> Iterator[Path]:
    """The path to write a file at, which becomes `path` when the block ends; its folder is made.

    A file that several runs may be writing at once is `shared`: each has a name of its own for it until then.

    Raises:
        RunError: it cannot be written.
    """
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}{PARTIAL}" if shared else path.name + PARTIAL)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            sync(partial)
            partial.replace(path)
            sync(path.parent)
        finally:
            partial.unlink(missing_ok=True)


def write_file(path: Path, content: str | bytes, shared: bool = False) -> None:
    """Write a file, text as UTF-8: see `new_file`."""
    with new_file(path, shared) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """The path of an empty folder to fill, which becomes `folder` when the block ends.

    Raises:
        RunError: it cannot be written.
    """
    partial = folder.with_name(folder.name + PARTIAL)
    with writing(folder):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            yield partial
            replace_folder(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def replace_folder(partial: Path, folder: Path) -> None:
    """Give `partial` the name `folder`, all its bytes on disk first; an older `folder` goes after that."""
    sync_all(partial)
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def sync_all(folder: Path) -> None:
    """Wait until all that is in a folder is on the disk."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def local_path(name: str | os.PathLike) -> Path:
    """A path with ~ as the home; of a user that there is not, it stays as it is, where `Path.expanduser` raises."""
    return Path(os.path.expanduser(name))


# ── Digests ──────────────────────────────────────────────────────────────────────────────────────────────────
def file_digest(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def text_digest(text: str) -> str:
    """SHA-256 of a text as UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()


def sha256sums(folder: Path, known: Mapping[str, str] = MappingProxyType({})) -> str:
    """A line for each file but SHA256SUMS itself, sorted by name, as `sha256sum` prints and checks them; those whose
    digest is `known` are not read."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != DIGESTS_FILE)
    names = [path.relative_to(folder).as_posix() for path in paths]
    with ThreadPoolExecutor(4) as pool:
        digests = list(pool.map(lambda name: known.get(name) or file_digest(folder / name), names))
    return "".join(f"{digest}  {name}\n" for digest, name in zip(digests, names, strict=True))


def find_damage(folder: Path, listed: tuple[str, ...] = ()) -> str | None:
    """How the files of a folder differ from its SHA256SUMS; None if they do not.

    Others, such as what a file system leaves of a deleted file, are warned of, unless they match one of the patterns
    `listed`: those have to be in it.
    """
    try:
        recorded, found = (folder / DIGESTS_FILE).read_bytes(), sha256sums(folder).encode()
    except OSError as error:
        return f"{Path(error.filename).name}: {error.strerror}"
    if recorded == found:
        return None
    # the name stands after 64 digits and two spaces; in a damaged list a line may be of any kind
    digests = [{line[66:]: line[:64] for line in text.splitlines() if line[66:]} for text in (recorded, found)]
    for name, digest in digests[0].items():
        if name not in digests[1]:
            return f"{name.decode(errors='replace')} is missing"
        if digests[1][name] != digest:
            return f"{name.decode(errors='replace')} has not the SHA-256 that {DIGESTS_FILE} says"
    others = sorted(name.decode(errors="replace") for name in digests[1].keys() - digests[0].keys())
    if not others or any(fnmatch(name, pattern) for name in others for pattern in listed):
        return f"{DIGESTS_FILE} does not list what is there"
    warn(f"{folder}: {', '.join(others)} {'is' if len(others) == 1 else 'are'} no part of it, and ignored")
    return None


def weights_digest(module: "torch.nn.Module") -> str:
    """SHA-256 over the names, types, shapes and bytes of a module's state dict, in the order of names."""
    return tensors_digest(module.state_dict())


def tensors_digest(tensors: "Mapping[str, torch.Tensor]") -> str:
    """The same over any named tensors."""
    return digest_of_each(tensors, tensors.__getitem__)


def part_digest(folder: Path, variant: str | None = None) -> str:
    """What `weights_digest` gives for a part of a model in float32, from the files in its folder alone, of which one
    tensor at a time is in memory."""
    import torch
    from safetensors import safe_open

    paths = list(folder.glob("*.safetensors")) or list(folder.glob("*.bin"))
    readers: dict[str, Callable[[str], torch.Tensor]] = {}
    with contextlib.ExitStack() as files:
        for path in [p for p in paths if p.name.split(".")[1:-1] == ([variant] if variant else [])] or paths:
            if path.suffix == ".bin":
                tensors = torch.load(path, "cpu", weights_only=True, mmap=True)
                readers |= dict.fromkeys(tensors, tensors.__getitem__)
            else:
                file = files.enter_context(safe_open(path, "pt"))
                readers |= dict.fromkeys(file.keys(), file.get_tensor)

        def in_float32(name: str) -> torch.Tensor:
            tensor = readers[name](name)
            return tensor.float() if tensor.is_floating_point() else tensor

        return digest_of_each(readers, in_float32)


def digest_of_each(names: Iterable[str], tensor_of: "Callable[[str], torch.Tensor]") -> str:
    """The same over any named tensors, of which one at a time is asked for."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(names):
        tensor = tensor_of(name)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
