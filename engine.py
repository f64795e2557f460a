"""A training, one epoch, one update of it, and evaluation. Nothing here knows of options.

Images come as uint8; normalisation, random erasing and mixing happen on the device.
"""

import functools
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from datasets import Data
from models.pixels import Pixels, normalize
from runtime.checkpoint import TrainingState, build_checkpoint
from runtime.distributed import DistInfo, all_reduce_sum, share_buffers
from runtime.errors import Stopped, UsageError
from runtime.meters import LossMeter, check_weights
from runtime.preemption import Request, handle_signals
from runtime.run_folder import RunFolder
from runtime.run_log import Progress
from utils import count_parameters, seed_everything


@dataclass
class Precision:
    """Device and number format. dtype: of autocast, None for float32 throughout; the scaler is active for fp16."""

    device: torch.device
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)


@dataclass
class TrainStep:
    """One optimizer update at a time. Every random number is a function of (seed, epoch, update, process).

    model: on its device, wrapped for distributed training if it is distributed; loss_fn(images, logits, targets).
    pixels: what images are normalised with.
    ema: an average of `model`'s weights to keep up. erase: random erasing of a normalised batch. mixup: mixes a batch
    and its classes.
    clip_grad: bound of the gradient's norm. updates: per epoch, by which the average's warm-up counts.
    train_mode: whether dropout, drop path and BatchNorm act as in training.
    """

    model: nn.Module
    loss_fn: nn.Module
    optimizer: torch.optim.Optimizer
    precision: Precision
    processes: DistInfo
    pixels: Pixels = Pixels()
    ema: ModelEmaV3 | None = None
    erase: RandomErasing | None = None
    mixup: Mixup | None = None
    clip_grad: float | None = None
    accum_steps: int = 1
    seed: int = 0
    updates: int = 0
    train_mode: bool = True

    def step(self, batches: Sequence[tuple[Tensor, Tensor]], epoch: int, update: int, meter: LossMeter) -> Tensor:
        """Update the weights with `accum_steps` batches. Returns their mean loss on this process, on the device."""
        scaler, losses = self.precision.scaler, []
        for number, (images, targets) in enumerate(batches):
            images, targets = to_device(images, targets, self.precision.device, self.pixels)
            seed_everything(self.seed, epoch, update, number, self.processes.rank)
            if self.erase is not None:
                images = self.erase(images)
            if self.mixup is not None:
                images, targets = self.mixup(images, targets)
            with self._gradients_stay_local(number < len(batches) - 1):
                with self.precision.autocast():
                    loss = self.loss_fn(images, self.model(images), targets)
                scaler.scale(loss / len(batches)).backward()
            meter.add(loss, update)
            losses.append(loss.detach())
        if self.clip_grad is not None:
            scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_grad)
        scaler.step(self.optimizer)
        scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            count = epoch * self.updates + update + 1
            self.ema.update(unwrapped(self.model), step=count if self.ema.use_warmup else None)
        return torch.stack(losses).mean()

    def _gradients_stay_local(self, local: bool) -> AbstractContextManager:
        distributed = isinstance(self.model, DistributedDataParallel)
        return self.model.no_sync() if local and distributed else nullcontext()


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, or the model itself."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def to_device(images: Tensor, targets: Tensor, device: torch.device, pixels: Pixels) -> tuple[Tensor, Tensor]:
    """A batch (B, 3, S, S) uint8, (B,) on the device, the images normalised, in channels-last memory."""
    images = images.to(device, non_blocking=True, memory_format=torch.channels_last)
    return normalize(images, pixels), targets.to(device, non_blocking=True)


def train_one_epoch(
    step: TrainStep,
    batches: Iterable[tuple[Tensor, Tensor]],
    meter: LossMeter,
    *,
    epoch: int,
    updates: int,
    start: int = 0,
    after_update: Callable[[int, Tensor], bool] = lambda update, loss: False,
) -> bool:
    """Train updates `start` to `updates` - 1 of an epoch. Returns whether it got to the end.

    batches: (images (B, 3, S, S) uint8, classes (B,)), starting with those of update `start`.
    after_update(update, loss): called after each update; training stops there if it returns true.
    """
    step.model.train(step.train_mode)
    batches = iter(batches)
    for update in range(start, updates):
        group = list(islice(batches, step.accum_steps))
        if len(group) < step.accum_steps:
            raise UsageError(
                f"the training data ended after {update} of epoch {epoch + 1}'s {updates} updates: "
                "it holds fewer images than it says; correct the count, or write its shards anew"
            )
        loss = step.step(group, epoch, update, meter)
        if after_update(update, loss):
            return False
    return True


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    precision: Precision,
    processes: DistInfo = DistInfo(),  # noqa: B008 (frozen)
    split: bool = False,
    after_batch: Callable[[int], None] = lambda number: None,
    among: Sequence[int] | None = None,
    pixels: Pixels = Pixels(),  # noqa: B008 (frozen)
) -> dict[str, float]:
    """Top-1 and top-5 accuracy in percent, mean cross-entropy, and the number of images.

    batches: (images (B, 3, S, S) uint8, classes (B,)); or, of images with several right classes, their shares (B, C).
    split: each process has its own share of the images, and the sums over all of them count. Losses are summed in
    float64, so the split does not show.
    after_batch(number): called after each batch, from 0; may raise to end the evaluation.
    among: the class numbers among which the answer is sought; None: all.
    pixels: what images are normalised with.
    """
    model.eval()
    device = precision.device
    sums = torch.zeros(4, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
    chosen = None if among is None else torch.tensor(among, device=device)
    for number, (images, targets) in enumerate(batches):
        images, targets = to_device(images, targets, device, pixels)
        with precision.autocast():
            logits = model(images)
        logits = logits.float()
        if chosen is not None:
            logits = torch.full_like(logits, -torch.inf).index_copy(1, chosen, logits[:, chosen])
        losses = F.cross_entropy(logits, targets, reduction="none").to(sums.dtype)
        top = logits.topk(min(5, logits.shape[1])).indices
        ranked = top == targets[:, None] if targets.ndim == 1 else targets.gather(1, top) > 0
        sums += torch.stack([ranked[:, 0].sum(), ranked.any(1).sum(), losses.sum(), losses.new_tensor(len(targets))])
        after_batch(number)
    if split:
        all_reduce_sum(sums, processes)
    correct1, correct5, loss, images = sums.tolist()
    if not images:
        raise UsageError("there are no images to evaluate on")
    return {
        "acc1": 100 * correct1 / images,
        "acc5": 100 * correct5 / images,
        "loss": loss / images,
        "images": int(images),
    }


@dataclass
class Run:
    """A training, from the place where its state stands to its last epoch. Every process calls the same methods.

    evaluate(model, after_batch): an evaluation's figures; after_batch as the function `evaluate` takes it.
    report(figures, prefix): prints them. metric: which of them is best when it is highest.
    epochs: how many there are in all. checkpoint_minutes: also save so often; 0: only after epochs.
    watcher, watch_every: what looks at the attention after every so many epochs, on the main process.
    how_to_go_on: what the user is told when signals have ended the run.
    """

    step: TrainStep
    scheduler: Scheduler
    state: TrainingState
    data: Data
    folder: RunFolder
    progress: Progress
    evaluate: Callable[[nn.Module, Callable[[int], None]], dict[str, float]]
    report: Callable[[dict[str, float], str], None]
    epochs: int
    metric: str = "acc1"
    checkpoint_minutes: float = 0
    watcher: Any = None
    watch_every: int = 0
    how_to_go_on: str = ""
    saved_at: float = field(default_factory=time.monotonic, init=False)

    def train(self) -> None:
        """Train and evaluate the epochs that are left. Stopped if a signal ended that early."""
        with handle_signals() as self.requests:
            self.requests.begin_training(self.step.processes)
            if not self.state.evaluated:
                self.scheduler.step(self.state.epoch - 1)
                self.finish_epoch(self.state.epoch - 1, time.monotonic())
            for epoch in range(self.state.epoch, self.epochs):
                started = time.monotonic()
                self.train_epoch(epoch)
                self.finish_epoch(epoch, started)

    def train_epoch(self, epoch: int) -> None:
        """Train the rest of an epoch, and save."""
        state, data = self.state, self.data
        self.scheduler.step(epoch)
        start = data.place(epoch, state.position)
        if start == 0:
            state.meter.reset()
        self.progress.start_epoch(epoch, start)
        finished = train_one_epoch(
            self.step,
            data.train,
            state.meter,
            epoch=epoch,
            start=start,
            updates=data.updates,
            after_update=functools.partial(self.on_step, epoch),
        )
        self.progress.end_epoch()
        if not finished:
            raise self._stopped()
        state.meter.check(epoch)
        self.save(epoch + 1, 0, evaluated=False)  # so that a run killed while it evaluates loses nothing

    def on_step(self, epoch: int, update: int, loss: Tensor) -> bool:
        """Tell the progress, and save if it is time or asked for. Returns whether to stop."""
        state, rate = self.state, self._rate()
        if self.progress.due(update):
            loss = all_reduce_sum(loss, self.step.processes) / self.step.processes.world_size
        self.progress.advance(update, loss, rate)
        if self.progress.due(update):
            state.meter.check(epoch)
            state.history.train_point(epoch + (update + 1) / self.data.updates, loss.item(), rate)
        overdue = 0 < 60 * self.checkpoint_minutes < time.monotonic() - self.saved_at
        request = self.requests.sync(save=overdue and self.step.processes.is_main)
        if request != Request.NOTHING:
            state.meter.check(epoch)
            if update + 1 < self.data.updates:
                self.save(epoch, (update + 1) * self.data.total_batch)
            else:
                self.save(epoch + 1, 0, evaluated=False)
        return request == Request.STOP

    def finish_epoch(self, epoch: int, started: float) -> None:
        """Evaluate an epoch's weights and their average, keep the best, write the log, and save."""
        state = self.state
        record = {"epoch": epoch, "train_loss": state.meter.average(), "train_lr": self._rate()}
        for name, candidate in {"test": state.model, "test_ema": state.model_ema}.items():
            if candidate is not None:
                figures = self._figures_of(candidate)
                self.report(figures, "averaged weights: " if name == "test_ema" else "")
                record |= {f"{name}_{figure}": value for figure, value in figures.items() if figure != "images"}
                self._keep_best(candidate, {**figures, "epoch": epoch, "weights": name.replace("test", "model")})
        if self.watcher is not None and (epoch + 1) % self.watch_every == 0:
            seen = self.watcher.look()
            state.history.attention(seen.scalars, seen.pictures, epoch)
        record["n_parameters"] = count_parameters(state.model)
        record["seconds"] = round(time.monotonic() - started, 2)
        state.history.end_epoch(record)
        self.save(epoch + 1, 0)

    def save(self, epoch: int, position: int, evaluated: bool = True) -> None:
        """Write a checkpoint of this place in the run (see TrainingState). NonFiniteLoss if the weights are not."""
        state = self.state
        check_weights(state.model, epoch if position else epoch - 1)
        state.meter.gather()
        state.epoch, state.position, state.evaluated = epoch, position, evaluated
        self.saved_at = time.monotonic()
        if self.step.processes.is_main:
            self.folder.save(build_checkpoint(state))
        self.requests.barrier()  # a process that leaves takes the others with it: the launcher ends them

    def _figures_of(self, candidate: nn.Module) -> dict[str, float]:
        home = next(candidate.parameters()).device  # the average may live in host memory
        candidate.to(self.step.precision.device)
        share_buffers(candidate, self.step.processes)
        figures = self.evaluate(candidate, self._after_batch)
        candidate.to(home)
        return figures

    def _keep_best(self, candidate: nn.Module, figures: dict[str, Any]) -> None:
        if figures[self.metric] > self.state.best[self.metric]:
            self.state.best = figures
            if self.step.processes.is_main:
                self.folder.save_best(build_checkpoint(self.state, weights_only=candidate))

    def _after_batch(self, number: int) -> None:
        # The checkpoint is already written; evaluating is not worth the little time that a signal leaves.
        if number < self.data.val_batches and self.requests.sync() == Request.STOP:
            raise self._stopped()

    def _rate(self) -> float:
        return self.step.optimizer.param_groups[-1]["lr"]

    def _stopped(self) -> Stopped:
        message = f"stopped; checkpoint in {self.folder.path}. {self.how_to_go_on}"
        return Stopped(message, self.requests.signals)
