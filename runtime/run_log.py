"""What a run tells: its progress on the terminal, and log.txt, TensorBoard and curves.png in its folder.

The files come from one history, which checkpoints carry: a run that goes on from a checkpoint writes them anew, so no
epoch and no point appears twice. Pictures lie in the run's folder, attention/EPOCH/TAG.png, instead.
"""

import contextlib
import json
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from hashlib import sha1
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
import torch
import yaml
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from runtime import curves
from runtime.checkpoint import BEST, LAST, TrainingState
from runtime.distributed import DistInfo
from runtime.errors import UsageError, note, warn
from runtime.options import RECIPES
from utils import count_parameters, format_seconds, peak_memory

POINTS_PER_EPOCH = 1000
"""TensorBoard's step for an epoch of training scalars, so that curves of different batch sizes line up."""

SECONDS_BETWEEN_DRAWINGS = 60.0


@contextlib.contextmanager
def _writing() -> Iterator[None]:
    """Turn an OSError in the block into a UsageError that names the file."""
    try:
        yield
    except OSError as error:
        place = error.filename or "the run's log"
        raise UsageError(f"cannot write {place}: {error.strerror}; choose another --output_dir or --log_dir") from error


def _silence_writing_threads() -> None:
    """Keep TensorBoard's thread from printing tracebacks of errors that it raises here, too."""
    hook = threading.excepthook

    def quietly(args: threading.ExceptHookArgs) -> None:
        if not (isinstance(args.exc_value, OSError) and type(args.thread).__module__.startswith("tensorboard.")):
            hook(args)

    threading.excepthook = quietly


class RunLog:
    """The log of a run, in `folder` (None: nowhere, on all processes but the main one).

    figures: those of an evaluation that curves.png shows, and what it calls them; title: of that diagram, in percent.
    epochs: one dict per finished epoch, as in log.txt. points: (tag, value, step) of every TensorBoard scalar.
    """

    def __init__(
        self,
        folder: Path | None,
        tensorboard_folder: Path | None,
        figures: Mapping[str, str] = MappingProxyType({}),
        title: str = "figures",
    ) -> None:
        self.folder, self.tensorboard_folder = folder, tensorboard_folder
        self.figures, self.title = figures, title
        self.epochs: list[dict[str, Any]] = []
        self.points: list[tuple[str, float, int]] = []
        self._writer = None
        self._drawn_at = -math.inf

    def state_dict(self) -> dict[str, Any]:
        return {"epochs": list(self.epochs), "points": list(self.points)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epochs, self.points = list(state["epochs"]), [tuple(point) for point in state["points"]]

    @_writing()
    def start(self) -> None:
        """Open the files and write the records so far."""
        if self.folder is None:
            return
        from torch.utils.tensorboard import SummaryWriter

        _silence_writing_threads()
        # In a --log_dir that several runs share, each replaces only its own events.
        suffix = "." + sha1(str(self.folder.resolve()).encode()).hexdigest()[:8]
        own = "" if self.tensorboard_folder.parent == self.folder else suffix
        for old in self.tensorboard_folder.glob(f"events.out.tfevents.*{own}"):
            old.unlink()
        self._writer = SummaryWriter(str(self.tensorboard_folder), filename_suffix=suffix)
        for tag, value, step in self.points:
            self._show("add_scalar", tag, value, step)
        for record in self.epochs:
            self._show_pictures(record["epoch"])
        self._write_text()

    def forget_epoch(self, epoch: int) -> None:
        """Drop the loss and learning rate of an epoch that is trained again from its start."""
        self.points = [point for point in self.points if point[2] <= epoch * POINTS_PER_EPOCH]

    def train_point(self, epoch: float, figures: dict[str, float]) -> None:
        """Loss, learning rate and whatever else there is at a (fractional) epoch."""
        self._add(figures, round(epoch * POINTS_PER_EPOCH))

    @_writing()
    def attention(self, scalars: dict[str, float], pictures: dict[str, Image.Image], epoch: int) -> None:
        """What the attention did in an epoch: values and pictures by their TensorBoard tags."""
        self._add(scalars, epoch)
        if self.folder is None:
            return
        for tag, picture in pictures.items():
            path = self._pictures(epoch) / f"{tag}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)
        self._show_pictures(epoch)

    def _pictures(self, epoch: int) -> Path:
        return self.folder / "attention" / f"{epoch:04d}"

    def _show_pictures(self, epoch: int) -> None:
        folder = self._pictures(epoch)
        for path in sorted(folder.rglob("*.png")):
            tag = path.relative_to(folder).with_suffix("").as_posix()
            self._show("add_image", tag, np.asarray(Image.open(path)), epoch, dataformats="HWC")

    @_writing()
    def end_epoch(self, record: dict[str, Any]) -> None:
        """Record a finished epoch: its number, learning rate, and train_* and test_* values."""
        self.epochs.append(record)
        perf = {f"perf/{name}": value for name, value in record.items() if name.startswith("test_")}
        self._add(perf, record["epoch"])
        self._show("flush")
        if self.folder is not None:
            self._write_text()
            if time.monotonic() - self._drawn_at > SECONDS_BETWEEN_DRAWINGS:
                self.draw_curves()

    @_writing()
    def close(self) -> None:
        self._show("close")
        self.draw_curves()

    def _add(self, values: dict[str, float], step: int) -> None:
        for tag, value in values.items():
            self.points.append((tag, value, step))
            self._show("add_scalar", tag, value, step)

    def _show(self, method: str, *values: Any, **options: Any) -> None:
        """Call a method of TensorBoard's writer. If it cannot write, warn, and go on without it."""
        if self._writer is None:
            return
        try:
            getattr(self._writer, method)(*values, **options)
        except OSError as error:
            self._writer = None
            warn(
                f"TensorBoard's files in {self.tensorboard_folder} cannot be written ({error.strerror or error}); "
                "training goes on without them. Started again, it writes them anew"
            )

    def _write_text(self) -> None:
        path = self.folder / "log.txt"
        temporary = path.with_name(f".log.txt.{os.getpid()}.tmp")
        temporary.write_text("".join(json.dumps(record) + "\n" for record in self.epochs))
        os.replace(temporary, path)

    def draw_curves(self) -> None:
        """Draw curves.png: loss, figures and learning rate over the epochs."""
        if self.folder is not None and self.epochs:
            curves.draw(self.epochs, self.figures, self.title, self.folder / "curves.png")
            self._drawn_at = time.monotonic()


class Progress:
    """Progress on a terminal as a live bar, elsewhere as a line every `every` updates. Silent unless `shown`.

    updates: per epoch; images: per update, over all processes. remarks: what to say after an epoch; all processes ask.
    """

    def __init__(
        self,
        epochs: int,
        updates: int,
        images: int,
        every: int,
        device: torch.device,
        shown: bool,
        remarks: Callable[[], list[str]] = list,
    ) -> None:
        self.epochs, self.updates, self.images, self.every = epochs, updates, images, every
        self.device, self.shown, self.remarks = device, shown, remarks
        self.live = shown and sys.stderr.isatty()
        self.bar: tqdm | None = None
        self.run_started: tuple[float, int] | None = None

    def start_epoch(self, epoch: int, update: int) -> None:
        now = time.monotonic()
        if self.run_started is None:
            self.run_started = now, epoch * self.updates + update
        self.epoch, self.epoch_started = epoch, (now, update)
        self.title = f"epoch {epoch + 1}/{self.epochs}"
        if self.live:
            self.bar = tqdm(total=self.updates, initial=update, desc=self.title, unit="update", leave=False)

    def due(self, update: int) -> bool:
        """Whether this update (0-based) gets a line; the same on all processes."""
        return (update + 1) % self.every == 0 or update + 1 == self.updates

    def advance(self, update: int, loss: Tensor, lr: float) -> None:
        """Count an update as done. Reads the loss from the device when due."""
        if self.bar is not None:
            self.bar.update()
        if not (self.shown and self.due(update)):
            return
        now, (then, first) = time.monotonic(), self.epoch_started
        speed = (update + 1 - first) * self.images / (now - then)
        line = (
            f"loss {loss.item():.4f}  lr {lr:.2e}  {speed:.0f} images/s  eta {self._eta(update, now)}  "
            f"memory {peak_memory(self.device):.0f} MB"
        )
        if self.bar is not None:
            self.bar.set_postfix_str(line)
        else:
            print(f"{self.title}  update {update + 1}/{self.updates}  {line}", flush=True)

    def end_epoch(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        for line in self.remarks():
            if self.shown:
                note(f"{self.title}: {line}")

    def _eta(self, update: int, now: float) -> str:
        then, first = self.run_started
        done = self.epoch * self.updates + update + 1
        return format_seconds((now - then) / (done - first) * (self.epochs * self.updates - done))


class _Notices(logging.Handler):
    """Prints above a live bar, not into it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def show_notices(processes: DistInfo) -> None:
    """Have the main process print what modules log for users to know: which backend the attention runs on."""
    logger = logging.getLogger("models.ops")
    logger.setLevel(logging.INFO if processes.is_main else logging.WARNING)
    if not logger.hasHandlers():  # Hydra has its own
        logger.addHandler(_Notices())


@_writing()
def write_options(options: Any, folder: Path) -> None:
    """Write options.yaml: every option of the run, as a recipe that goes on with it."""
    values = {**asdict(options), "output_dir": str(folder)}
    (folder / "options.yaml").write_text(yaml.safe_dump(values, sort_keys=False))


class Amounts(Protocol):
    """How much a run trains on: optimizer updates per epoch, images per update, and images per epoch."""

    epoch_images: int
    updates: int
    total_batch: int


def describe(
    options: Any, data: Amounts, model: nn.Module, num_classes: int, info: DistInfo, device: torch.device
) -> None:
    """Print what is about to be trained."""
    millions = count_parameters(model) / 1e6
    print(f"{options.model}, {millions:.2f} M parameters, {num_classes} classes, on {device}")
    source = getattr(options, "data_set", options.data_path)
    print(
        f"{source}: {data.epoch_images} images per epoch in {data.updates} updates of {data.total_batch}, "
        f"{info.world_size} process(es)"
    )
    if not options.recipe and (RECIPES / f"{options.model}.yaml").is_file():
        print(f"configs/recipe/{options.model}.yaml holds the published recipe: --recipe {options.model}")


def summarise(state: TrainingState, folder: Path, metric: str, title: str) -> None:
    """Print the best figure, and where everything is."""
    best = state.best
    if "epoch" not in best:
        print("Nothing was trained")
        return
    averaged = " (averaged weights)" if best["weights"] == "model_ema" else ""
    seconds = sum(record["seconds"] for record in state.history.epochs)
    print(
        f"\nBest {title} {best[metric]:.2f}% in epoch {best['epoch'] + 1}{averaged}; {format_seconds(seconds)} in all"
    )
    for name, meaning in (
        (BEST, "the best weights: --eval --resume, --finetune"),
        (LAST, "the last state: the same command with more --epochs goes on"),
        ("curves.png", "loss, accuracy and learning rate"),
        ("log.txt", "one line of JSON per epoch"),
        ("options.yaml", "the options of this run"),
        (state.history.tensorboard_folder.absolute(), "tensorboard --logdir"),
    ):
        print(f"  {folder / name}  {meaning}")
