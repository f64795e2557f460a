"""Images in a tar file, read in any order without unpacking it."""

import contextlib
import hashlib
import io
import os
import tarfile
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from runtime.errors import UsageError

from .packed import PackedPaths

CACHED_FROM = 20_000
"""Images; the index of a smaller file is made anew each time, which takes a second."""

Member = tuple[str, int, int]
"""Name, offset and size in bytes."""


class TarFiles:
    """The files of a tar archive with certain suffixes, by number, sorted by folder and name.

    Those of tar archives inside it count as files of a folder of the inner archive's name. Files are read by
    position: forked processes share the descriptor, but no file offset.
    """

    def __init__(self, path: str | Path, suffixes: Collection[str], cache: Path | None = None) -> None:
        """Read the index from the folder `cache`, or make it. UsageError if the file is no tar archive, or damaged."""
        self.path = os.fspath(path)
        stat = os.stat(self.path)
        stamp = f"{os.path.abspath(self.path)} {stat.st_size} {stat.st_mtime_ns} {sorted(suffixes)}"
        kept = None if cache is None else cache / f"tar-{hashlib.sha256(os.fsencode(stamp)).hexdigest()[:24]}.npz"
        index = _load(kept)
        if index is None:
            index = _scan(self.path, suffixes)
            if kept is not None and len(index["sizes"]) >= CACHED_FROM:
                _save(index, kept)
        self.offsets, self.sizes = index["offsets"], index["sizes"]
        self.names = PackedPaths.of(index["text"], index["ends"])
        self._file: BinaryIO | None = None

    def __len__(self) -> int:
        return len(self.sizes)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_file": None}

    def read(self, number: int) -> bytes:
        """The content of a file. OSError if it cannot be read."""
        try:
            if self._file is None:
                self._file = open(self.path, "rb", buffering=0)  # noqa: SIM115 (kept open)
            content = os.pread(self._file.fileno(), int(self.sizes[number]), int(self.offsets[number]))
        except OSError:
            self._file = None  # a stale handle stays stale
            raise
        if len(content) != self.sizes[number]:
            raise OSError(f"{self.path} ends early")
        return content


def _scan(path: str, suffixes: Collection[str]) -> dict[str, np.ndarray]:
    try:
        with open(path, "rb") as file:
            members = sorted(_members(file, suffixes), key=lambda member: os.path.split(member[0]))
    except tarfile.TarError as error:
        raise UsageError(f"{path} is no uncompressed tar archive, or it is damaged ({error})") from error
    names = PackedPaths(name for name, _, _ in members)
    return {
        "text": names.text,
        "ends": names.ends,
        "offsets": np.array([offset for _, offset, _ in members], np.int64),
        "sizes": np.array([size for _, _, size in members], np.int64),
    }


def _members(file: BinaryIO, suffixes: Collection[str], inner: bool = False) -> Iterator[Member]:
    with tarfile.open(fileobj=file, mode="r:") as archive:
        while (entry := archive.next()) is not None:
            archive.members.clear()  # of a million entries, a gigabyte
            name = os.path.normpath(entry.name)
            stem, suffix = os.path.splitext(name)
            if suffix.lower() in suffixes and (entry.islnk() or entry.issparse()):
                raise tarfile.ReadError(f"{name} is a link or sparse; pack with tar --hard-dereference, without -S")
            if not entry.isreg():
                continue
            if suffix.lower() == ".tar" and not inner:
                content = archive.extractfile(entry)
                for child, offset, size in _members(content, suffixes, inner=True):
                    yield f"{stem}/{child}", entry.offset_data + offset, size
            elif suffix.lower() in suffixes:
                yield name, entry.offset_data, entry.size


def _load(path: Path | None) -> dict[str, np.ndarray] | None:
    """An index that was kept; None if there is none that can be read."""
    if path is None or not path.is_file():
        return None
    with contextlib.suppress(Exception), np.load(path, allow_pickle=False) as content:
        return {name: content[name] for name in ("text", "ends", "offsets", "sizes")}
    return None


def _save(index: dict[str, np.ndarray], path: Path) -> None:
    """Keep an index for the next time, if the folder can be written."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        np.savez(buffer, **index)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(buffer.getbuffer())
        os.replace(file.name, path)
