"""Checkpoints that others wrote: read as data, never as code, in bounded time and memory."""

import argparse
import contextlib
import io
import json
import math
import os
import stat
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from timm.models import clean_state_dict, get_pretrained_cfg
from torch import Tensor

from .errors import WeightsError, listed, printable
from .pickles import MAX_BYTES, SAFE_CLASSES, check_pickle

NESTS = ("model", "state_dict")
"""Where in a checkpoint the weights are."""

MAX_SIDE = 4096


def _three(values: list[Any], low: float, high: float) -> bool:
    return len(values) == 3 and all(isinstance(value, float) and low <= value <= high for value in values)


MODEL_OPTIONS: dict[str, tuple[type, Callable[[Any], bool]]] = {
    "model": (str, lambda name: len(name) <= 100),
    "model_kwargs": (dict, lambda arguments: True),  # models.arguments checks them where they are used
    "input_size": (int, lambda side: 1 <= side <= MAX_SIDE),
    "crop_pct": (float, lambda part: math.isfinite(part) and 0 < part <= 1),
    "data_set": (str, lambda name: len(name) <= 1000),
    "interpolation": (str, lambda name: len(name) <= 100),
    "mean": (list, lambda values: _three(values, 0, 1)),
    "std": (list, lambda values: _three(values, 1e-3, 10)),
}
"""Options of a training that say what its model is and what its images look like: types, and what is sensible."""

MAX_EXPANSION = 4
"""torch.save does not compress: an archive that claims to hold more than this many times its own size is a trap."""
FOLDER_MARK = 0x10
"""The bit of an archive entry's attributes that makes it a folder."""
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
"""The value of the first of the five pickles with which torch's format before 1.6 begins."""
NUMBERS = {torch.bool, *(getattr(torch, f"float{bits}") for bits in (16, 32, 64)), torch.bfloat16, torch.uint8}
NUMBERS |= {getattr(torch, f"int{bits}") for bits in (8, 16, 32, 64)}
"""Kinds of number that a model's tensors are of."""

# -- reading ------------------------------------------------------------------------------------------------------


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint, a file or an http(s) address, onto the CPU; nothing in it is executed.

    Formats: torch.save's zip archive and the plain pickle before it, and .safetensors.
    WeightsError if it is not one, torn, holds code, or would take too much time or memory.
    """
    if str(path).startswith(("http://", "https://")):
        from .sources import fetch_url  # what downloads takes long to import

        path = fetch_url(str(path))
    path = Path(path)
    try:
        size = _check_file(path)
        content = _read(path, size)
    except WeightsError as error:
        raise WeightsError(f"checkpoint {path} {error}") from error
    except PermissionError as error:
        raise WeightsError(f"checkpoint {path} may not be read: {error.strerror}") from error
    except Exception as error:
        # A damaged file makes the zip reader and the unpickler raise almost anything.
        raise WeightsError(f"{path} is not a checkpoint, or it is damaged ({type(error).__name__})") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path} holds a {type(content).__name__}, not a checkpoint")
    return content


def _check_file(path: Path) -> int:
    """Return a file's size in bytes. WeightsError if it is something else; pipes and devices are not opened."""
    try:
        found = os.stat(path)
    except PermissionError:
        raise
    except (OSError, ValueError) as error:
        raise WeightsError("does not exist") from error
    if stat.S_ISDIR(found.st_mode):
        raise WeightsError("is a folder; name a file in it")
    if not stat.S_ISREG(found.st_mode):
        raise WeightsError("is no regular file but a pipe or device; name a file")
    if not found.st_size:  # so are the endless files of /proc
        raise WeightsError(f"is empty: {path.name} is not a checkpoint")
    return found.st_size


def _read(path: Path, size: int) -> Any:
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    with open(path, "rb") as file:
        start = file.read(512)
        if start.startswith(b"PK\x03\x04"):
            _check_archive(file, size)
        elif start.startswith(b"\x80") and start[257:262] != b"ustar":
            file.seek(0)
            _check_legacy(io.BytesIO(file.read(min(size, MAX_BYTES))), size)
        elif start[257:262] == b"ustar":
            raise WeightsError("is a tar archive; torch's tar format of 2016 is not read: no version reads it safely")
        else:
            raise WeightsError(f"has another content than torch.save writes: {path.name} is not a checkpoint")
    with torch.serialization.safe_globals(SAFE_CLASSES), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.load(path, map_location="cpu", weights_only=True)


def _read_safetensors(path: Path) -> dict[str, Any]:
    """Read the weights, and the options and class names that tools/export.py writes into the metadata."""
    weights = safetensors.torch.load_file(path)
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    described = {}
    for name in (*MODEL_OPTIONS, "classes"):
        with contextlib.suppress(KeyError, ValueError):  # of other programs, not JSON
            described[name] = json.loads(metadata[name])
    return {"model": weights, "classes": described.pop("classes", None), "args": described} if described else weights


def _check_archive(file: io.BufferedReader, size: int) -> None:
    """Check the pickles of an archive, and for damage that torch would not notice."""
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        claimed = sum(entry.file_size for entry in entries)
        if claimed > MAX_EXPANSION * size:
            raise WeightsError(f"of {size:,} bytes claims to hold {claimed:,}; it was not unpacked")
        # Of an entry marked as a folder, torch reads nothing and leaves memory as it is.
        if any(entry.external_attr & FOLDER_MARK for entry in entries):
            raise WeightsError("is damaged: its directory lists folders")
        if len({entry.filename for entry in entries}) < len(entries):
            raise WeightsError("is damaged: its directory lists a record twice")
        pickles = [entry for entry in entries if entry.filename.endswith(".pkl")]
        if sum(entry.file_size for entry in pickles) > MAX_BYTES:
            raise WeightsError(f"holds over {MAX_BYTES >> 20} MB besides tensors; it was not loaded")
        for entry in pickles:
            check_pickle(io.BytesIO(archive.read(entry)), size)
        damaged = archive.testzip()
    if damaged is not None:
        raise WeightsError(f"is damaged: the checksum of {damaged} is wrong")


def _check_legacy(start: io.BytesIO, size: int) -> None:
    """Check the five pickles (magic number, version, system, content, storages) before the storages."""
    for number in range(5):
        value = check_pickle(start, size)
        if number == 0 and value != LEGACY_MAGIC:
            raise WeightsError("is a pickle that torch.save did not write; it is not a checkpoint")


AUXILIARY = "auxiliary."
"""What the names of weights begin with that only training needs: the published model has none of them."""


def weights_of(
    checkpoint: Mapping[str, Any], path: str | Path, ema: bool = False, auxiliary: bool = False
) -> dict[str, Tensor]:
    """Return the model's (or the averaged) state dict in a checkpoint of ours, of DeiT's kind, or a bare state dict.

    The prefixes that DistributedDataParallel and torch.compile put in front of names are removed.
    auxiliary: keep what only training needs.
    """
    if ema:
        weights = checkpoint.get("model_ema")
        if not isinstance(weights, dict):
            raise WeightsError(f"{path} holds no averaged weights, only the last ones")
    else:
        weights = next((checkpoint[key] for key in NESTS if isinstance(checkpoint.get(key), dict)), checkpoint)
    if not weights or not all(isinstance(name, str) and is_plain(value) for name, value in weights.items()):
        expected = f"expected tensors by name, in {' or '.join(map(repr, NESTS))} or by themselves"
        raise WeightsError(f"{path} holds no weights: {expected}; its keys: {listed(checkpoint) or 'none'}")
    weights = clean_state_dict(weights)
    return weights if auxiliary else {name: w for name, w in weights.items() if not name.startswith(AUXILIARY)}


def is_plain(value: Any) -> bool:
    """Whether a value is a dense tensor in host memory, each of whose elements has a place of its own there."""
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not (value.is_quantized or value.is_nested)
        and value.numel() * value.element_size() <= value.untyped_storage().nbytes()
    )


def saved_options(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return whatever a checkpoint says of its training's options, unchecked.

    Authors save them as a Namespace, this project as a dictionary, some not at all.
    """
    saved = checkpoint.get("args")
    saved = vars(saved) if isinstance(saved, argparse.Namespace) else saved
    return saved if isinstance(saved, dict) else {}


def options_of(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return the MODEL_OPTIONS that a checkpoint was trained with, without any of another type.

    WeightsError for a value that no training could have had.
    """
    saved, found = saved_options(checkpoint), {}
    for name, (kind, sensible) in MODEL_OPTIONS.items():
        value = saved.get(name)
        if isinstance(value, kind) and not isinstance(value, bool):
            if not sensible(value):
                raise WeightsError(f"the checkpoint says that it was trained with {name}={printable(value)}")
            found[name] = value
    return found


def count_classes(weights: Mapping[str, Tensor], model: str, path: str | Path) -> int:
    """Count the classes of the classifier in a state dict. WeightsError if it holds none of the model's name."""
    cfg = get_pretrained_cfg(model, allow_unregistered=True)
    classifier = cfg.classifier if cfg and isinstance(cfg.classifier, str) else "head"
    weight = weights.get(f"{classifier}.weight")
    if weight is None or weight.ndim == 0 or not weight.numel():
        raise WeightsError(f"{path} holds no classifier of {model} ({classifier}.weight); is it of another model?")
    return len(weight)
