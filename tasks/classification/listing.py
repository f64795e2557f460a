"""Which images are in class folders: listed once, kept in a file, and read from there by all processes.

A list of a million strings takes hundreds of megabytes in every process, and in every worker, which copies it when
references are counted. The file is mapped into memory instead: whoever reads it on a machine shares its pages.
"""

import contextlib
import functools
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torchvision.datasets.folder import is_image_file

from models.weights.cache import cache_folder
from runtime.agreement import decide, gather
from runtime.distributed import DistInfo
from runtime.errors import note
from runtime.packed import PackedPaths

KEPT_FROM = 20_000
"""Images; fewer are listed anew each time, which takes a moment."""

SETTLED_NS = 2_000_000_000
"""Nanoseconds after which a folder's times show a change that came after it was listed, on any file system."""

UNUSED_DAYS = 30
"""After which an earlier list is removed; before, another run may still have it mapped."""

Stamps = dict[str, list[int]]
"""When folders changed, by their paths below the root: st_mtime_ns and st_ctime_ns; [] where a change may hide."""

T = TypeVar("T", bound=Sequence[Any])


class Listing(PackedPaths):
    """The paths of the images in class folders, by class, folder and name.

    Pickled, it is the name of its file where it has one; `found` says whether that was there when it was unpickled.

    Args:
        root: the folder of the class folders.
        counts: how many images each has, by its name, in order.
        stamps: of each class folder, and of the folders in it.
        text, ends: of the paths below the root, as in `PackedPaths`.
    """

    def __init__(
        self, root: str, counts: dict[str, int], stamps: dict[str, Stamps], text: np.ndarray, ends: np.ndarray
    ) -> None:
        self.root, self.counts, self.stamps, self.text, self.ends = root, counts, stamps, text, ends
        self.file: Path | None = None
        self.found = True

    def __getitem__(self, index: int) -> str:
        return os.path.join(self.root, super().__getitem__(index))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ if self.file is None else {"root": self.root, "file": self.file}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.file is not None:
            kept = _read(self.root, self.file)
            self.found = kept is not None
            self.__dict__.update(kept.__dict__ if kept else {})

    def parts(self) -> Iterator[tuple[str, "Part"]]:
        """Return the name of each class folder, and what was found in it."""
        first = 0
        for name, count in self.counts.items():
            ends = self.ends[first : first + count + 1]
            yield name, (bytes(self.text[ends[0] : ends[-1]]), np.diff(ends), self.stamps[name])
            first += count


Part = tuple[bytes, np.ndarray, Stamps]
"""What is in a class folder: the images' paths in one piece, the length of each, and when the folders changed."""


def list_images(folder: Path, numbers: Mapping[str, int]) -> tuple[Listing, np.ndarray]:
    """List the images in some class folders of a folder, from the cache where nothing in them has changed.

    Args:
        numbers: the class number of each folder, by its name.

    Returns:
        The paths, and (N,) int64, their class numbers.

    Raises:
        OSError: a folder cannot be read.
    """
    listing = _list(os.fspath(folder), sorted(numbers))
    return listing, np.repeat([numbers[name] for name in listing.counts], list(listing.counts.values()))


def _list(root: str, names: list[str]) -> Listing:
    kept = _newest(root)
    same = {name for name in names if kept is not None and _is_unchanged(root, kept.stamps.get(name, {}))}
    if kept is not None and len(same) == len(names) == len(kept.stamps):
        return kept
    parts = {name: part for name, part in kept.parts() if name in same} if kept is not None else {}
    parts = {name: parts[name] if name in same else _scan(root, name) for name in names}
    lengths = np.concatenate([[0], *(lengths for _, lengths, _ in parts.values())])
    listing = Listing(
        root,
        {name: len(lengths) for name, (_, lengths, _) in parts.items()},
        {name: stamps for name, (_, _, stamps) in parts.items()},
        np.frombuffer(bytearray().join(text for text, _, _ in parts.values()), np.uint8),
        np.cumsum(lengths, dtype=np.int64),
    )
    return _keep(listing) if len(listing) >= KEPT_FROM else listing


def decide_listed(choose: Callable[[], T], processes: DistInfo) -> T:
    """Decide on sources as `decide` does; their listings are sent to processes that do not see the main one's cache."""
    sources = decide(choose, processes)
    listings = [listing for source in sources for listing in _listings_of(source)]
    if not all(gather(all(listing.found for listing in listings), processes)):
        for listing in listings:
            listing.file = None
        sources = decide(lambda: sources, processes)
    return sources


def _listings_of(source: Any) -> Iterator[Listing]:
    """The listing that a source, or what it is a part of, reads from."""
    while source is not None:
        if isinstance(getattr(source, "paths", None), Listing):
            yield source.paths
        source = getattr(source, "source", None)


def _scan(root: str, name: str) -> Part:
    """What is in a class folder, also below it."""

    def fail(error: OSError) -> NoReturn:
        raise error

    settled, stamps, paths = time.time_ns() - SETTLED_NS, {}, []
    for inner, _, files in sorted(os.walk(os.path.join(root, name), onerror=fail, followlinks=True)):
        place, times = os.path.relpath(inner, root), _times(inner)
        stamps[place] = times if max(times) < settled else []
        paths += [os.fsencode(os.path.join(place, file)) for file in sorted(files) if is_image_file(file)]
    return b"".join(paths), np.array([len(path) for path in paths], np.int64), stamps


def _times(folder: str) -> list[int]:
    stat = os.stat(folder)
    return [stat.st_mtime_ns, stat.st_ctime_ns]


def _is_unchanged(root: str, stamps: Stamps) -> bool:
    """Whether folders are as they were when they were listed."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return bool(stamps) and all(times == _times(os.path.join(root, place)) for place, times in stamps.items())
    return False


# -- the cache


def _name(root: str, version: str) -> str:
    return f"files-{hashlib.sha256(os.fsencode(os.path.abspath(root))).hexdigest()[:24]}-{version}.safetensors"


def _versions(root: str) -> list[Path]:
    """Files of lists of a folder, the last used one first."""
    found = [(path.stat().st_mtime, path) for path in cache_folder().glob(_name(root, "*"))]
    return [path for _, path in sorted(found, reverse=True)]


def _newest(root: str) -> Listing | None:
    """The list of a folder that was kept last; None if there is none, or it is damaged."""
    with contextlib.suppress(OSError):
        for path in _versions(root)[:1]:
            listing = _read(root, path)
            if listing is not None and path == _file_of(listing):
                with contextlib.suppress(PermissionError):
                    os.utime(path)
                return listing
    return None


def _read(root: str, path: Path) -> Listing | None:
    """The list in a file, its arrays mapped; None if it is not there, or torn."""
    with contextlib.suppress(Exception), safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["about"])
        text, ends = (file.get_tensor(name).numpy() for name in ("text", "ends"))
        listing = Listing(root, about["counts"], about["stamps"], text, ends)
        listing.file = path
        return listing
    return None


def _about(listing: Listing) -> str:
    return json.dumps({"counts": listing.counts, "stamps": listing.stamps})


def _file_of(listing: Listing) -> Path:
    """The file that holds this list and no other: where one is mapped, it is never overwritten."""
    content = hashlib.sha256(_about(listing).encode())
    content.update(listing.ends.data)
    content.update(listing.text.data)
    return cache_folder() / _name(listing.root, content.hexdigest()[:24])


def _keep(listing: Listing) -> Listing:
    """The same list, mapped from a file that is kept for the next time; itself if none can be written."""
    path = _file_of(listing)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            whole = Path(folder, path.name)
            tensors = {"text": torch.from_numpy(listing.text), "ends": torch.from_numpy(listing.ends)}
            whole.write_bytes(save(tensors, {"about": _about(listing)}))
            os.replace(whole, path)
        for old in _versions(listing.root)[1:]:
            if time.time() - old.stat().st_mtime > 86_400 * UNUSED_DAYS:
                old.unlink(missing_ok=True)
    except OSError as error:
        _note_once(
            f"the list of images cannot be kept in {path.parent} ({error.strerror}), and is made anew at every start; "
            "DEBIFORMER_HOME names another folder"
        )
    return _read(listing.root, path) or listing


_note_once = functools.cache(note)
