"""What a checkpoint holds, and how it is written so that one can always be read (which models/weights does).

A checkpoint is a dict of tensors and plain containers, readable with `torch.load(weights_only=True)`:
model, model_ema, optimizer, scaler: state dicts; epoch, position: the place in the data at which
training goes on (position counts the images of the epoch already seen by all processes together); meter: the loss of
the epoch so far; best: the best accuracy so far; history: the run's log; args: the options; data: what fixes the order
of the data; classes: their names.
"""

import contextlib
import os
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from errors import UsageError, listed
from models.weights import WeightsError, check_fit, load_checkpoint, load_weights, weights_of

LAST, PREVIOUS, BEST = "checkpoint.pth", "checkpoint.previous.pth", "best.pth"


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
        if checkpoint["classes"] and self.classes and checkpoint["classes"] != self.classes:
            raise UsageError(f"{path} was trained on other classes; choose another --output_dir, or --finetune {path}")
        if checkpoint["args"].get("opt") != self.args["opt"]:
            raise UsageError(f"{path} was trained with --opt {checkpoint['args'].get('opt')}; go on with that")
        changed = [name for name, value in self.data.items() if checkpoint["data"].get(name) != value]
        if changed and checkpoint["position"]:
            changes = ", ".join(f"{name} was {checkpoint['data'].get(name)}, is {self.data[name]}" for name in changed)
            raise UsageError(f"{path} stands midway an epoch whose order of images would change: {changes}")
        weights = weights_of(checkpoint, path)
        check_fit(self.model, weights, path)
        # The optimizer's memory is the checkpoint's; its rates and decays are this run's options'.
        groups = self.optimizer.state_dict()["param_groups"]
        saved = checkpoint["optimizer"]
        if [len(group["params"]) for group in groups] != [len(group["params"]) for group in saved["param_groups"]]:
            raise UsageError(
                f"{path}: its optimizer has other groups; use its --opt, --layer_decay, --decay_position_tables"
            )
        self.model.load_state_dict(weights)
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


def load_latest(folder: Path) -> tuple[dict[str, Any], Path] | None:
    """The newest readable checkpoint of a run folder and its path; None if it has none. Warns if it falls back."""
    candidates = [path for path in (folder / LAST, folder / PREVIOUS) if path.exists()]
    for path in candidates:
        try:
            return load_checkpoint(path), path
        except WeightsError as error:
            if path == candidates[-1]:
                raise
            print(f"warning: {error}; falling back to {PREVIOUS}", file=sys.stderr, flush=True)
    return None
