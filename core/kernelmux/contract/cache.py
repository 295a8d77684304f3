"""What was compiled or measured, kept on disk from one process to the next.

Enters: a key of all that an answer depends on (source hash, versions, device class). Leaves: the bytes, or None. A
folder that cannot be written, a damaged file, another process at the same time: each costs time only, none is an error.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

from kernelmux.files import renamed

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

FOLDER = "KERNELMUX_CACHE"
"""Environment variable: the folder of the cache; else `kernelmux` in $XDG_CACHE_HOME or ~/.cache."""
SOURCES = {".py", ".c", ".cc", ".cpp", ".h", ".hpp", ".cu", ".cuh", ".hip", ".cl", ".metal"}
MAGIC = b"kernelmux cache 1\n"
NO_FOLDER = (OSError, RuntimeError)
"""What a folder raises that cannot be used; RuntimeError where there is no home."""


def source_hash(thing: object) -> str:
    """16 hex digits for the source of a class, function, object or module: of its whole package, else of its file.

    What has no file, as in a notebook, is known by its name and such text as Python remembers.
    """
    module = thing.__name__ if isinstance(thing, ModuleType) else str(getattr(thing, "__module__", ""))
    parts = module.split(".")
    for end in range(1, len(parts) + 1):
        # A namespace has no file, and is shared by distributions: the package begins below it.
        file = Path(getattr(sys.modules.get(".".join(parts[:end])), "__file__", None) or "")
        if file.is_file() and (file.name == "__init__.py" or end == len(parts)):
            return _module_hash(file)
    named = thing if hasattr(thing, "__qualname__") or isinstance(thing, ModuleType) else type(thing)
    texts = [_text(part) for part in (named, *getattr(named, "__dict__", {}).values())]
    return Cache.key(module, getattr(named, "__qualname__", ""), texts)[:16]


@cache
def _module_hash(file: Path) -> str:
    if file.name != "__init__.py":
        return files_hash([file], file.parent)
    return files_hash((path for path in file.parent.rglob("*") if path.suffix in SOURCES), file.parent)


def files_hash(files: Iterable[Path], root: Path) -> str:
    """16 hex digits for the contents of files and their names below a folder, in whatever order they come."""
    digest = hashlib.sha256()
    for name, path in sorted((path.relative_to(root).as_posix(), path) for path in files if path.is_file()):
        data = path.read_bytes()
        digest.update(f"{name}\0{len(data)}\0".encode() + data)
    return digest.hexdigest()[:16]


def _text(thing: Any) -> str:
    try:
        return inspect.getsource(thing)
    except (OSError, TypeError):
        return ""


def library_versions(names: Iterable[str]) -> dict[str, str]:
    """The versions of those distributions that are installed."""
    found = {}
    for name in names:
        with suppress(PackageNotFoundError):
            found[name] = _version(name)
    return found


# Read from a distribution's metadata, whole: once a process.
_version = cache(version)


@dataclass(frozen=True)
class Cache:
    """The entries of one kind, as `cupy` or `measured`: a folder with a file for each."""

    kind: str

    @property
    def folder(self) -> Path:
        """Where they are kept, whether it exists or not."""
        own = os.environ.get(FOLDER)
        base = Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kernelmux"
        return base / self.kind

    @staticmethod
    def key(*parts: Any) -> str:
        """A key from whatever JSON can hold; the same in any process."""
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def get(self, key: str) -> bytes | None:
        """What was put last under a key (any text); None where nothing was, or the file is damaged."""
        with suppress(*NO_FOLDER):
            entry = self._path(key).read_bytes()
            data = entry[len(MAGIC) + 32 :]
            return data if entry == _entry(data) else None
        return None

    def put(self, key: str, data: bytes) -> None:
        """Keeps data under a key, if that can be done."""
        with suppress(*NO_FOLDER), replacing(self._path(key)) as file:
            file.write(_entry(data))

    def _path(self, key: str) -> Path:
        return self.folder / self.key(key)[:32]


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """An entry to write in the block, as `renamed` has it, for nobody else to read; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with renamed(path, "tmp", 0o600) as file:
        yield file


def _entry(data: bytes) -> bytes:
    """The file that holds data: a damaged one differs from what its own data would be held by."""
    return MAGIC + hashlib.sha256(data).digest() + data


def read_table(kind: str, key: str) -> dict[str, Any]:
    """The table under a key: names and values that JSON can hold; empty where there is none."""
    return dict(json.loads(Cache(kind).get(key) or "{}"))


def update_table(kind: str, key: str, entries: Mapping[str, Any]) -> None:
    """Adds entries to a table, and to the tables within it, if that can be done.

    What other processes add at the same time is kept as well.
    """
    with suppress(*NO_FOLDER), _alone(Cache(kind).folder):
        Cache(kind).put(key, json.dumps(_merged(read_table(kind, key), entries), sort_keys=True).encode())


def _merged(table: Mapping[str, Any], entries: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(table)
    for name, value in entries.items():
        within = merged.get(name)
        merged[name] = _merged(within, value) if isinstance(within, dict) and isinstance(value, Mapping) else value
    return merged


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Within the block no other process or thread is in a block of this folder.

    A system without such locks may lose an entry, which costs its measurement.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("ab") as file:
        if fcntl is not None:
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
        yield
