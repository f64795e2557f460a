"""Downloaded weights on disk: each whole or not at all, under its sha256."""

import contextlib
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from filelock import FileLock

from .errors import WeightsError


def cache_folder() -> Path:
    """Return $DEBIFORMER_HOME, else a folder in torch hub's. Its files are MODEL-SHA256.pth (or .safetensors)."""
    return Path(os.environ.get("DEBIFORMER_HOME") or Path(torch.hub.get_dir()) / "debiformer")


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def cached_file(model: str) -> Path | None:
    """Return the cached weights of a model; None if there are none. WeightsError if they have changed since."""
    folder = cache_folder()
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    entries = [match for name in names if (match := re.fullmatch(rf"{model}-([0-9a-f]{{64}})\.\w+", name))]
    if not entries:
        return None
    newest = max(entries, key=lambda entry: (folder / entry[0]).stat().st_mtime)
    path, recorded = folder / newest[0], newest[1]
    if sha256_of(path) != recorded:
        raise WeightsError(f"{path} changed since it was cached: its sha256 is another; delete it to fetch it again")
    return path


@contextlib.contextmanager
def receiving(model: str) -> Iterator[Path]:
    """Give one process at a time an empty folder to download into; what a killed one left there is removed."""
    home = cache_folder()
    folder = home / f".{model}.part"
    try:
        home.mkdir(parents=True, exist_ok=True)
        with FileLock(home / f".{model}.lock"):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        words = error.strerror or error
        raise WeightsError(f"cannot write to {home}: {words}; choose another folder with DEBIFORMER_HOME") from error


def keep_in_cache(path: Path, model: str) -> Path:
    """Move a received file into the cache under its sha256, at once; it takes the place of earlier ones."""
    suffix = ".safetensors" if path.suffix == ".safetensors" else ".pth"
    target = cache_folder() / f"{model}-{sha256_of(path)}{suffix}"
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    os.replace(path, target)
    for other in cache_folder().glob(f"{model}-*"):
        if other != target:
            other.unlink()
    return target
