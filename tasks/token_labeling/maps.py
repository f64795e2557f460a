"""Maps: what a teacher says about every place of every image of a data set, stored once.

A folder of maps holds `index.json` and shards of many images each. A shard is a safetensors file with "values", the
logarithms of the likeliest classes' probabilities, (images, k, H, W) float16; "indices", these classes' numbers, int16
or int32; "features", (images, d, H, W) int8, components by the folder's basis (`features.Basis`); "names", the images'
names, each with a line break after it, as bytes. Either of labels and features may be left out. A map is of the whole
image, whatever its proportions.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from runtime.errors import TemporaryFailure, UsageError
from runtime.storage import read_patiently

from .features import BASIS, Basis, read_basis

INDEX = "index.json"
SHARD = "shard-{:05d}.safetensors"
COMMAND = "python -m tasks.token_labeling.generate"
Map = dict[str, Tensor]
"""Of one image: "values" (k, H, W) float16, "indices" (k, H, W) int16 or int32, "features" (d, H, W) int8."""


@dataclass
class Index:
    """What a folder of maps is of. names: `hash_of` the images' names; shards: SHA-256 by file name, once complete.

    grid: rows and columns of a map; side: of the square that images were squashed to, in pixels. labels: whether they
    say classes; basis: the SHA-256 of that of their features, empty without features.
    """

    teacher: str
    names: str
    images: int
    classes: list[str]
    num_classes: int
    grid: list[int]
    side: int
    shard_size: int
    shards: dict[str, str]
    labels: bool = True
    basis: str = ""

    @property
    def job(self) -> str:
        """A hash of everything that was asked for; shards of one folder share it."""
        asked = {**asdict(self), "shards": {}}
        if self.labels and not self.basis:  # as in folders from before there were features
            del asked["labels"], asked["basis"]
        return hash_of([json.dumps(asked)])

    @property
    def parts(self) -> list[str]:
        """What the shards hold of each image."""
        return ["values", "indices"] * self.labels + ["features"] * bool(self.basis)

    def numbers(self, shard: int) -> range:
        """The numbers of the images in a shard."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.images))

    @property
    def files(self) -> list[str]:
        """The names of all shards."""
        return [SHARD.format(number) for number in range(-(-self.images // self.shard_size))]


def hash_of(names: Iterable[str]) -> str:
    """The SHA-256 of names in their order."""
    digest = hashlib.sha256()
    for name in names:
        digest.update(os.fsencode(name) + b"\n")
    return digest.hexdigest()


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that has its name only once it is complete. UsageError if that fails."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UsageError(f"cannot write {path}: {error}") from error


def write_shard(path: Path, maps: Mapping[str, Tensor], names: Sequence[str], job: str) -> None:
    """Write the maps of images with these names, each part (n, ..., H, W)."""
    text = torch.frombuffer(bytearray(b"".join(os.fsencode(name) + b"\n" for name in names)), dtype=torch.uint8)
    tensors = {name: values.contiguous() for name, values in maps.items()}
    write_atomically(path, save({**tensors, "names": text}, {"job": job}))


def is_complete(path: Path, index: Index) -> bool:
    """Whether a shard is there and whole. UsageError if it is of something else."""
    try:
        with safe_open(path, "pt") as file:
            job = (file.metadata() or {}).get("job")
    except (OSError, SafetensorError):
        return False
    if job != index.job:
        raise UsageError(f"{path} is of another teacher, size or data set; choose another --output, or remove it")
    return True


def checksum(path: Path) -> str | None:
    """A file's SHA-256; None if it is missing, or may not be read."""
    try:
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        return None
    return digest.hexdigest()


class ShardedMaps:
    """Maps that the command of this folder has written, read where they lie in memory-mapped files."""

    def __init__(self, folder: Path, index: Index) -> None:
        self.folder, self.index = folder, index
        self.opened: dict[int, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "opened": {}}

    @property
    def labels(self) -> bool:
        """Whether they say classes."""
        return self.index.labels

    @cached_property
    def basis(self) -> Basis | None:
        """That of their features; None without features. UsageError if it is missing or damaged."""
        return read_basis(self.folder)[0] if self.index.basis else None

    def read(self, number: int, name: str) -> Map:
        """Return the map of an image."""
        shard, place = divmod(number, self.index.shard_size)

        def read() -> Map:
            if shard not in self.opened:
                self.opened[shard] = safe_open(self.folder / SHARD.format(shard), "pt")
            file = self.opened[shard]
            return {part: file.get_slice(part)[place] for part in self.index.parts}

        return read_patiently(read, f"maps of {name}")

    def check(self, names: Iterable[str]) -> None:
        """Compare with the names of the images to train on, and every shard with its checksum."""
        names = list(names)
        if self.index.basis and checksum(self.folder / BASIS) != self.index.basis:
            raise UsageError(f"--tl_maps {self.folder}: {BASIS} is missing or damaged; remove the folder's maps")
        damaged = self.damaged()
        if damaged:
            raise UsageError(
                f"--tl_maps {self.folder}: {damaged[0]} is missing or damaged, the first of {len(damaged)} of "
                f"{len(self.index.files)} shards; run {COMMAND} again, which makes these anew"
            )
        if hash_of(names) == self.index.names:
            return
        stored = list(self.names())
        known = set(stored)
        missing = [name for name in names if name not in known]
        if missing:
            raise _too_few(self.folder, missing, len(names))
        other = [pair for pair in zip_longest(stored, names) if pair[0] != pair[1]]
        there, here = other[0]
        raise UsageError(
            f"--tl_maps {self.folder} is of other images, or in another order: {there} stands there in place of "
            f"{here or 'none'}, the first of {len(other)}; generate maps of this data"
        )

    def damaged(self) -> list[str]:
        """The shards that are missing, or not what was written."""
        return [name for name in self.index.files if checksum(self.folder / name) != self.index.shards.get(name)]

    def names(self) -> Iterator[str]:
        """The names of the images that there are maps of."""
        for name in self.index.files:
            with safe_open(self.folder / name, "pt") as file:
                yield from map(os.fsdecode, file.get_tensor("names").numpy().tobytes().split(b"\n")[:-1])


class PublishedMaps:
    """Maps as the paper's authors published them: CLASS/IMAGE.pt, (2, k, H, W) float16 of logits and class numbers."""

    labels, basis = True, None

    def __init__(self, folder: Path, num_classes: int) -> None:
        self.folder, self.num_classes = folder, num_classes
        self.shape: tuple[int, ...] | None = None

    def read(self, number: int, name: str) -> Map:
        """Return the map of an image. UsageError if it is not what a map of these classes is."""
        path = self.folder / _published_name(name)
        try:
            content = read_patiently(lambda: torch.load(path, map_location="cpu", weights_only=True), f"map {path}")
        except TemporaryFailure:
            raise
        except Exception as error:  # of a damaged file, torch raises almost anything
            raise UsageError(f"map {path} cannot be read ({type(error).__name__}); repair it") from error
        if not (isinstance(content, Tensor) and content.ndim == 4 and len(content) == 2):
            raise UsageError(f"map {path} is not a tensor of logits and class numbers (2, k, rows, columns)")
        self.shape = self.shape or content.shape
        if content.shape != self.shape:
            raise UsageError(f"map {path} is {tuple(content.shape)}, others are {tuple(self.shape)}")
        indices = content[1].to(torch.int32)
        if not (content.isfinite().all() and indices.min() >= 0 and indices.max() < self.num_classes):
            raise UsageError(f"map {path} is of other classes than the data's {self.num_classes}, or damaged")
        return {"values": content[0].half(), "indices": indices}

    def check(self, names: Iterable[str]) -> None:
        """See that every image to train on has a map."""
        names, found = list(names), {}
        for folder in {_published_name(name).parent for name in names}:
            here = self.folder / folder
            found[folder] = set(os.listdir(here)) if here.is_dir() else set()
        missing = [name for name in names if _published_name(name).name not in found[_published_name(name).parent]]
        if missing:
            raise _too_few(self.folder, missing, len(names))
        self.read(0, names[0])


def _published_name(name: str) -> Path:
    path = Path(name)
    return Path(path.parent.name, f"{path.name.split('.')[0]}.pt")


def _too_few(folder: Path, missing: Sequence[str], images: int) -> UsageError:
    return UsageError(
        f"--tl_maps {folder} has no map of {missing[0]}, the first of {len(missing)} of {images} images without one; "
        "generate maps of this data"
    )


def read_index(folder: Path) -> Index | None:
    """What a folder of maps is of; None if it holds no index. UsageError if that cannot be read."""
    try:
        index = Index(**json.loads((folder / INDEX).read_text()))
        if not (index.images > 0 and index.shard_size > 0 and isinstance(index.shards, dict)):
            raise ValueError("no images")
        return index
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (TypeError, ValueError) as error:
        raise UsageError(f"{folder / INDEX} is damaged ({error}); remove it and run {COMMAND} again") from error


def open_maps(path: str, names: Iterable[str], classes: Sequence[str], num_classes: int) -> ShardedMaps | PublishedMaps:
    """Open the maps of the images with these names and classes. UsageError unless there is one of each, and whole.

    classes: their names by number; empty where nothing names them.
    """
    folder = Path(path)
    index = read_index(folder)
    if index is None:
        if next(folder.glob("*/*.pt"), None) is None:
            raise UsageError(f"--tl_maps {path} holds no complete maps (no {INDEX}); {COMMAND} makes them")
        maps: ShardedMaps | PublishedMaps = PublishedMaps(folder, num_classes)
    else:
        maps = ShardedMaps(folder, index)
        _check_classes(index, path, classes, num_classes)
    maps.check(names)
    return maps


def _check_classes(index: Index, path: str, classes: Sequence[str], num_classes: int) -> None:
    if index.num_classes != num_classes:
        raise UsageError(f"--tl_maps {path} is of {index.num_classes} classes, the data has {num_classes}")
    other = [(here, there) for here, there in zip(classes, index.classes, strict=False) if here != there]
    if other:
        kind = "in another order" if set(classes) == set(index.classes) else "others"
        raise UsageError(
            f"--tl_maps {path}: its classes are {kind}: {other[0][1]} stands there for {other[0][0]}, the first of "
            f"{len(other)}; generate maps of this data"
        )
