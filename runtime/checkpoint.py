"""What a checkpoint holds, and how it is written so that one can always be read (which models/weights/ does).

A checkpoint is a dict of tensors and plain containers, readable with `torch.load(weights_only=True)`:
model, model_ema, optimizer, scaler: state dicts; epoch, position: the place in the data at which
training goes on (position counts the images of the epoch already seen by all processes together); evaluated: whether
the epoch before has been; meter: the loss of the epoch so far; best: the best figures so far; history: the run's log;
args: the options; data: what fixes the order of the data; classes: their names; held_out: the names of images that
were kept from training to evaluate on.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from models.weights import AUXILIARY, WeightsError, check_fit, load_checkpoint, load_weights, weights_of
from runtime.errors import UsageError, listed, note, warn
from runtime.optimizer_state import load_optimizer

LAST, PREVIOUS, BEST = "checkpoint.pth", "checkpoint.previous.pth", "best.pth"
KEPT = "checkpoint.{:04d}.pth"
"""After how many epochs it was written stands in the name of a checkpoint that --save_every keeps."""


@dataclass
class TrainingState:
    """Everything that changes while a run trains, and which run it is.

    Fields with a state_dict are saved by it, the others as they are, all under their own names.
    epoch, position, evaluated: the place in the run (see above). data: the numbers that fix the order of the images.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    meter: Any
    history: Any
    args: dict[str, Any]
    classes: list[str]
    data: dict[str, Any]
    held_out: list[str] = field(default_factory=list)
    model_ema: nn.Module | None = None
    epoch: int = 0
    position: int = 0
    evaluated: bool = True
    best: dict[str, Any] = field(default_factory=dict)

    def restore(self, checkpoint: dict[str, Any], path: str | Path) -> None:
        """Load a checkpoint. UsageError if it is of another model, or of other data midway an epoch."""
        missing = {f.name for f in fields(self)} - {"model_ema", "evaluated", "held_out"} - checkpoint.keys()
        if missing:
            raise UsageError(f"{path} holds no state of a training run (no {listed(missing)}); use --finetune {path}")
        damaged = [name for name, is_sound in SOUND.items() if name in checkpoint and not is_sound(checkpoint[name])]
        if damaged:
            raise UsageError(f"{path} is damaged: its {listed(damaged)} cannot be of a training run")
        theirs = checkpoint["args"].get("model")
        if theirs != self.args["model"]:
            raise UsageError(f"{path} is of {theirs}, not of {self.args['model']}; choose another --output_dir")
        if checkpoint["classes"] and self.classes and checkpoint["classes"] != self.classes:
            raise UsageError(f"{path} was trained on other classes; choose another --output_dir, or --finetune {path}")
        if checkpoint["args"].get("opt") != self.args["opt"]:
            raise UsageError(f"{path} was trained with --opt {checkpoint['args'].get('opt')}; go on with that")
        epoch, position, evaluated = position_of(checkpoint)
        self._check_data(checkpoint["data"], epoch, position, path)
        weights = weights_of(checkpoint, path, auxiliary=True)
        check_fit(self.model, weights, path)
        load_optimizer(self.optimizer, checkpoint["optimizer"], path)
        self.model.load_state_dict(weights)
        if self.model_ema is not None:
            average = weights_of(checkpoint, path, ema="model_ema" in checkpoint, auxiliary=True)
            load_weights(self.model_ema, average, path)
        if checkpoint["scaler"]:  # empty where the run had no need of one
            self.scaler.load_state_dict(checkpoint["scaler"])
        self.meter.load_state_dict(checkpoint["meter"])
        self.history.load_state_dict(checkpoint["history"])
        self.epoch, self.position, self.evaluated, self.best = epoch, position, evaluated, checkpoint["best"]

    def _check_data(self, theirs: dict[str, Any], epoch: int, position: int, path: str | Path) -> None:
        """Raise UsageError if the rest of an epoch would show other images; print a note if later epochs will."""
        theirs = {"groups": "none", **theirs}  # as earlier versions had it
        changed = {name: value for name, value in self.data.items() if name in theirs and theirs[name] != value}
        if position and changed:
            changes = ", ".join(f"{name} was {theirs[name]}, is {value}" for name, value in changed.items())
            raise UsageError(
                f"{path} stands midway an epoch whose order of images would change: {changes}; "
                "undo that, or delete it to go back to the checkpoint before"
            )
        if position and (position > self.data["images per epoch"] or position % self.data["total batch"]):
            raise UsageError(f"{path} is damaged: no update of epoch {epoch + 1} ends at image {position}")
        if "images" in changed:
            then, now = theirs["images"], self.data["images"]
            note(f"the data had {then} training images when {path} was written, now {now}")


def held_out_of(checkpoint: Mapping[str, Any]) -> list[str]:
    """Return the names of the images that a checkpoint's training left for evaluation; [] if it says none."""
    names = checkpoint.get("held_out")
    return names if _names(names) else []


def position_of(checkpoint: dict[str, Any]) -> tuple[int, int, bool]:
    """Return where training goes on: epoch, image in it, and whether the epoch before has been evaluated."""
    epoch, position, evaluated = checkpoint["epoch"], checkpoint["position"], checkpoint.get("evaluated", True)
    if 0 < position == checkpoint["data"].get("images per epoch"):  # as earlier versions wrote the end of an epoch
        return epoch + 1, 0, False
    return epoch, position, evaluated


def build_checkpoint(state: TrainingState) -> dict[str, Any]:
    """Build the dictionary that is saved, of the state's own tensors; nothing else says what a checkpoint holds."""
    values = {each.name: getattr(state, each.name) for each in fields(state)}
    return {
        name: value.state_dict() if hasattr(value, "state_dict") else value
        for name, value in values.items()
        if value is not None
    }


def weights_only(content: dict[str, Any], name: str) -> dict[str, Any]:
    """Return what using a model needs of a checkpoint: the weights of this name, without auxiliary ones."""
    weights = {key: value for key, value in content[name].items() if not key.startswith(AUXILIARY)}
    return {"model": weights, **{key: content[key] for key in ("args", "classes", "held_out", "best")}}


TEMPORARY = ".tmp"


def temporary_beside(path: Path) -> Path:
    """Say where this process writes a file before it gets its name."""
    return path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")


def save_checkpoint(checkpoint: dict[str, Any], path: Path, previous: Path | None = None) -> None:
    """Write atomically: readers see the old file or the new one, never a torn one. UsageError if that fails.

    previous: where the file that stood at `path` goes; None: it is replaced.
    """
    temporary = temporary_beside(path)
    try:
        with open(temporary, "wb") as file, _not_in_children(file.fileno()):
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            name_also(path, previous, os.replace)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise UsageError(f"cannot write {path}: {error}; {_what_is_left(path.parent)}") from error


def name_also(path: Path, target: Path, without_links: Callable[[Path, Path], object]) -> None:
    """Give a file a second name, which another file may have had; there is no moment without either.

    without_links: is called with both instead where the file system has no hard links.
    """
    temporary = temporary_beside(target)
    try:
        os.link(path, temporary)
    except OSError:
        without_links(path, target)
    else:
        os.replace(temporary, target)


_being_written: set[int] = set()


@contextlib.contextmanager
def _not_in_children(descriptor: int) -> Iterator[None]:
    """Keep a file from processes forked during the block: loaders of data live long, and would keep it on the disk."""
    _being_written.add(descriptor)
    try:
        yield
    finally:
        _being_written.discard(descriptor)


def _let_go_in_child() -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY) if _being_written else -1
    for descriptor in _being_written:
        os.dup2(nowhere, descriptor)
    _being_written.clear()


os.register_at_fork(after_in_child=_let_go_in_child)


def _what_is_left(folder: Path) -> str:
    if not folder.is_dir():
        return f"the folder {folder} and the checkpoints in it have been removed while the run wrote there"
    left = [path.name for path in checkpoints_in(folder)]
    return f"earlier checkpoints are intact: {', '.join(left)}" if left else f"no earlier checkpoint is in {folder}"


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def kept_in(folder: Path) -> list[Path]:
    """List the checkpoints that --save_every kept in a run's folder, newest first."""
    return sorted(folder.glob(KEPT.replace("{:04d}", "[0-9]*")), key=lambda path: int(path.name.split(".")[1]))[::-1]


def checkpoints_in(folder: Path) -> list[Path]:
    """List all checkpoints to go on from in a run's folder, newest first."""
    return [path for path in (folder / LAST, folder / PREVIOUS) if path.exists()] + kept_in(folder)


def load_latest(folder: Path) -> tuple[dict[str, Any], Path] | None:
    """Load the newest readable checkpoint of a run folder, and say its path; None without one. Warns on fallback."""
    candidates = checkpoints_in(folder)
    for path, older in zip(candidates, [*candidates[1:], None], strict=False):
        try:
            return load_checkpoint(path), path
        except WeightsError as error:
            if older is None:
                raise
            warn(f"{error}; falling back to {older.name}")
    return None


# -- what a sound checkpoint looks like ---------------------------------------------------------------------------


def _count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _number(value: Any) -> bool:
    return type(value) in (int, float)


def _named(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(name, str) for name in value)


def _all(is_sound: Callable[[Any], bool], values: Any) -> bool:
    return isinstance(values, list) and all(map(is_sound, values))


def _best(value: Any) -> bool:
    return _named(value) and (
        "epoch" not in value or (_count(value["epoch"]) and isinstance(value.get("weights"), str))
    )


def _names(value: Any) -> bool:
    return _all(lambda name: isinstance(name, str), value)


def _row(value: Any) -> bool:
    return _all(_number, value) and len(value) == 2


def _record(value: Any) -> bool:
    return _named(value) and _count(value.get("epoch")) and all(map(_number, value.values())) and "seconds" in value


def _point(value: Any) -> bool:
    if not isinstance(value, list | tuple) or len(value) != 3:
        return False
    return isinstance(value[0], str) and _number(value[1]) and _count(value[2])


def _history(value: Any) -> bool:
    return isinstance(value, dict) and _all(_record, value.get("epochs")) and _all(_point, value.get("points"))


def _scaler(value: Any) -> bool:
    return _named(value) and all(map(_number, value.values())) and (not value or value.keys() >= SCALER)


SCALER = {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"}
SOUND = {
    "args": _named,
    "best": _best,
    "classes": lambda value: isinstance(value, list),
    "data": _named,
    "epoch": _count,
    "evaluated": lambda value: isinstance(value, bool),
    "held_out": _names,
    "history": _history,
    "meter": lambda value: isinstance(value, dict) and _all(_row, value.get("sums")),
    "model": _named,
    "model_ema": _named,
    "position": _count,
    "scaler": _scaler,
}
"""For each part of a checkpoint but the optimizer's, whether a value is one that a run can have written."""
