"""What a checkpoint holds, and how it is written so that one can always be read.

A checkpoint is a dict of tensors and plain containers, readable with `torch.load(weights_only=True)`:
model, model_ema, optimizer, scaler: state dicts; epoch, position: the place in the data at which
training goes on (position counts the images of the epoch already seen by all processes together); meter: the loss of
the epoch so far; best: the best accuracy so far; history: the run's log; args: the options; data: what fixes the order
of the data; classes: their names.
"""

import argparse
import contextlib
import os
import pathlib
import warnings
import zipfile
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from errors import UsageError, listed
from models.backbone import Backbone, checkpoint_filter_fn

LAST, PREVIOUS, BEST = "checkpoint.pth", "checkpoint.previous.pth", "best.pth"
SAFE_CLASSES = (
    argparse.Namespace,
    pathlib.PosixPath,
    pathlib.PurePosixPath,
    pathlib.WindowsPath,
    pathlib.PureWindowsPath,
)


@dataclass
class TrainingState:
    """Everything that changes while a run trains, and what says which run it is.

    Fields with a state_dict are saved by it, the others as they are, all under their own names.
    epoch, position: the place in the data (see above). data: the numbers that fix the order of the images.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    meter: Any
    history: Any
    args: dict[str, Any]
    classes: list[str]
    data: dict[str, Any]
    model_ema: nn.Module | None = None
    epoch: int = 0
    position: int = 0
    best: dict[str, Any] = field(default_factory=lambda: {"acc1": -1.0})

    def restore(self, checkpoint: dict[str, Any], path: Path) -> None:
        """Go on where a checkpoint stands. UsageError if it is of another model, or of other data midway an epoch."""
        missing = {f.name for f in fields(self)} - {"model_ema"} - checkpoint.keys()
        if missing:
            raise UsageError(f"{path} holds no state of a training run (no {listed(missing)}); use --finetune {path}")
        theirs = checkpoint["args"].get("model")
        if theirs != self.args["model"]:
            raise UsageError(f"{path} is of {theirs}, not of {self.args['model']}; choose another --output_dir")
        changed = [name for name, value in self.data.items() if checkpoint["data"].get(name) != value]
        if changed and checkpoint["position"]:
            changes = ", ".join(f"{name} was {checkpoint['data'].get(name)}, is {self.data[name]}" for name in changed)
            raise UsageError(f"{path} stands midway an epoch whose order of images would change: {changes}")
        # The optimizer's memory is the checkpoint's; its rates and decays are this run's options'.
        groups = self.optimizer.state_dict()["param_groups"]
        saved = checkpoint["optimizer"]
        if [len(group["params"]) for group in groups] != [len(group["params"]) for group in saved["param_groups"]]:
            raise UsageError(f"{path}: its optimizer groups the parameters otherwise; use its --opt and --layer_decay")
        load_weights(self.model, weights_of(checkpoint, path), path)
        if self.model_ema is not None:
            load_weights(self.model_ema, weights_of(checkpoint, path, ema="model_ema" in checkpoint), path)
        self.optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})
        for name in ("scaler", "meter", "history"):
            getattr(self, name).load_state_dict(checkpoint[name])
        self.epoch, self.position, self.best = checkpoint["epoch"], checkpoint["position"], checkpoint["best"]


def build_checkpoint(state: TrainingState, weights_only: nn.Module | None = None) -> dict[str, Any]:
    """The one place that says what a checkpoint holds.

    weights_only: leave out what only going on with the training needs, and take the weights from this module.
    """
    names = ("args", "classes", "best") if weights_only is not None else [f.name for f in fields(state)]
    content = {} if weights_only is None else {"model": weights_only.state_dict()}
    for name in names:
        value = getattr(state, name)
        if value is not None:
            content[name] = value.state_dict() if hasattr(value, "state_dict") else value
    return content


def save_checkpoint(checkpoint: dict[str, Any], path: Path) -> None:
    """Write atomically: readers see the old file or the new one, never a torn one. UsageError if the disk is full.

    The file that stood at LAST before stays beside it as PREVIOUS.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        if path.name == LAST and path.exists():
            os.replace(path, path.with_name(PREVIOUS))
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise UsageError(f"cannot write {path}: {error}; earlier checkpoints are intact") from error


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; nothing in it is executed. UsageError if it is not one, torn, or holds code."""
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"checkpoint {path} does not exist")
    try:
        with torch.serialization.safe_globals(list(SAFE_CLASSES)), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if zipfile.is_zipfile(path):
                code = torch.serialization.get_unsafe_globals_in_checkpoint(path)
                if code:
                    raise UsageError(
                        f"checkpoint {path} holds {code[0]}, which is code, not weights; it was not loaded"
                    )
                _verify_checksums(path)  # torch.load does not
            content = torch.load(path, map_location="cpu", weights_only=True)
    except UsageError:
        raise
    except Exception as error:
        # A damaged file makes the zip reader and the unpickler raise almost anything.
        raise UsageError(f"{path} is not a checkpoint, or it is damaged ({type(error).__name__})") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} holds a {type(content).__name__}, not a checkpoint")
    return content


def _verify_checksums(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise UsageError(f"checkpoint {path} is damaged: the checksum of {damaged} is wrong")


def load_latest(folder: Path) -> tuple[dict[str, Any], Path] | None:
    """The newest readable checkpoint of a run folder and its path; None if it has none. Warns if it falls back."""
    candidates = [path for path in (folder / LAST, folder / PREVIOUS) if path.exists()]
    for path in candidates:
        try:
            return load_checkpoint(path), path
        except UsageError as error:
            if path == candidates[-1]:
                raise
            warnings.warn(f"{error}; falling back to {PREVIOUS}", stacklevel=2)
    return None


def weights_of(checkpoint: dict[str, Any], path: str | Path, ema: bool = False) -> dict[str, Any]:
    """The model's (or the averaged) state dict in a checkpoint of ours, of DeiT's kind, or a bare state dict."""
    if ema:
        if not isinstance(checkpoint.get("model_ema"), dict):
            raise UsageError(f"{path} holds no averaged weights; leave out --use_ema")
        return _without_prefix(checkpoint["model_ema"])
    for key in ("model", "state_dict"):
        if isinstance(checkpoint.get(key), dict):
            return _without_prefix(checkpoint[key])
    if checkpoint and all(isinstance(value, torch.Tensor) for value in checkpoint.values()):
        return _without_prefix(checkpoint)
    raise UsageError(f"{path} holds no weights: expected a key 'model' or 'state_dict', found {listed(checkpoint)}")


def _without_prefix(weights: dict[str, Any]) -> dict[str, Any]:
    """Names without the prefix that DistributedDataParallel and timm's EMA put in front."""
    return {name.removeprefix("module."): value for name, value in weights.items()}


def load_weights(model: nn.Module, weights: dict[str, Any], path: str | Path) -> None:
    """Load strictly. UsageError naming the first differences if `path` is of another model."""
    wanted = model.state_dict()
    missing, unknown = wanted.keys() - weights.keys(), weights.keys() - wanted.keys()
    shapes = [name for name in wanted.keys() & weights.keys() if wanted[name].shape != weights[name].shape]
    problems = []
    if missing:
        problems.append(f"lacks {listed(missing)}")
    if unknown:
        problems.append(f"has {listed(unknown)} besides")
    if shapes:
        name = min(shapes)
        problems.append(f"has {name} {list(weights[name].shape)} where the model has {list(wanted[name].shape)}")
    if problems:
        raise UsageError(f"{path} is of another model: it {'; '.join(problems)}")
    model.load_state_dict(weights)


def load_to_finetune(model: nn.Module, weights: dict[str, Any], path: str | Path) -> list[str]:
    """Load into a model of another input size or class count. Returns the names of the tensors left as they were.

    Position tables are resampled by the model family's own filter; a classifier of another class count stays at its
    initial value. UsageError if anything else does not fit.
    """
    if isinstance(model, Backbone):
        weights = checkpoint_filter_fn(weights, model)
    wanted = model.state_dict()
    classifier = (getattr(model, "default_cfg", None) or {}).get("classifier", "head")
    fresh = [
        name
        for name in wanted
        if name.startswith(f"{classifier}.") and (name not in weights or weights[name].shape != wanted[name].shape)
    ]
    kept = {name: value for name, value in weights.items() if not name.startswith(f"{classifier}.") or name in wanted}
    load_weights(model, kept | {name: wanted[name] for name in fresh}, path)
    return fresh
