"""A training, one epoch, one update of it, and evaluation. Nothing here knows what a label means, or an option.

Images come as uint8; what they become is done on the device (`Task.preprocess`).
"""

import functools
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from runtime.checkpoint import TrainingState
from runtime.distributed import DistInfo, all_reduce_sum, share_buffers
from runtime.errors import Stopped, UsageError
from runtime.meters import LossMeter, check_weights
from runtime.preemption import Request, handle_signals
from runtime.run_folder import RunFolder
from runtime.run_log import Progress
from runtime.saving import Saver
from tasks.base import Batch, Task
from tasks.loading import Data
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

    model: on its device, wrapped for distributed training if it is distributed. ema: an average of its weights.
    clip_grad: bound of the gradient's norm. updates: per epoch, by which the average's warm-up counts.
    train_mode: whether dropout, drop path and BatchNorm act as in training. frozen: parts of the model in which they
    never do, and nothing is trained. before_update: called before the weights change.
    """

    task: Task
    model: nn.Module
    optimizer: torch.optim.Optimizer
    precision: Precision
    info: DistInfo
    ema: ModelEmaV3 | None = None
    clip_grad: float | None = None
    accum_steps: int = 1
    seed: int = 0
    updates: int = 0
    train_mode: bool = True
    before_update: Callable[[], None] = lambda: None
    frozen: Sequence[nn.Module] = ()

    def step(self, batches: Sequence[Batch], epoch: int, update: int, meter: LossMeter) -> dict[str, Tensor]:
        """Update the weights with `accum_steps` batches. Returns the means of their losses here, on the device."""
        scaler, losses = self.precision.scaler, []
        for number, batch in enumerate(batches):
            batch = to_device(batch, self.precision.device)
            seed_everything(self.seed, epoch, update, number, self.info.rank)
            with self._gradients_stay_local(number < len(batches) - 1):
                parts = self.losses_of(batch)
                scaler.scale(parts["loss"] / len(batches)).backward()
            meter.add(parts["loss"], update)
            losses.append({name: part.detach() for name, part in parts.items()})
        if self.clip_grad is not None:
            scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_grad)
        self.before_update()
        scaler.step(self.optimizer)
        scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            count = epoch * self.updates + update + 1
            self.ema.update(unwrapped(self.model), step=count if self.ema.use_warmup else None)
        return {name: torch.stack([parts[name] for parts in losses]).mean() for name in losses[0]}

    def losses_of(self, batch: Batch) -> dict[str, Tensor]:
        """The task's losses of a batch on the device."""
        batch = self.task.preprocess(batch, train=True)
        with self.precision.autocast():
            return self.task.loss(self.task.forward(self.model, batch), batch)

    def _gradients_stay_local(self, local: bool) -> AbstractContextManager:
        distributed = isinstance(self.model, DistributedDataParallel)
        return self.model.no_sync() if local and distributed else nullcontext()

    def distribute(self, batch: Batch) -> None:
        """Wrap the model so that all processes, of which there are several, train it together.

        In its first backward pass DistributedDataParallel learns in which order gradients arrive, and then packs them
        otherwise; sums over the processes round according to the packing. One pass ahead of the training, over `batch`
        and without effect on the weights, has all updates packed alike, so that a resumed run rounds like an
        undisturbed one.
        """
        model, device = self.model, self.precision.device
        self.model = DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Grad strides do not match")  # of depthwise kernels, which are tiny
            self.losses_of(to_device(batch, device))["loss"].backward()
        self.model.zero_grad(set_to_none=True)
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, or the model itself."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def to_device(values: Any, device: torch.device) -> Any:
    """A batch with all its tensors on the device, maps (B, C, H, W) in channels-last memory."""
    if isinstance(values, Tensor):
        layout = torch.channels_last if values.ndim == 4 else torch.preserve_format
        return values.to(device, non_blocking=True, memory_format=layout)
    if isinstance(values, dict):
        return {name: to_device(value, device) for name, value in values.items()}
    return [to_device(value, device) for value in values] if isinstance(values, list) else values


def train_one_epoch(
    step: TrainStep,
    batches: Iterable[Batch],
    meter: LossMeter,
    *,
    epoch: int,
    updates: int,
    start: int = 0,
    after_update: Callable[[int, dict[str, Tensor]], bool] = lambda update, losses: False,
) -> bool:
    """Train updates `start` to `updates` - 1 of an epoch. Returns whether it got to the end.

    batches: starting with those of update `start`.
    after_update(update, losses): called after each update; training stops there if it returns true.
    """
    step.model.train(step.train_mode)
    nn.ModuleList(step.frozen).eval()
    batches = iter(batches)
    for update in range(start, updates):
        group = list(islice(batches, step.accum_steps))
        if len(group) < step.accum_steps:
            raise UsageError(
                f"the training data ended after {update} of epoch {epoch + 1}'s {updates} updates: "
                "it holds fewer images than it says; correct the count, or write its shards anew"
            )
        losses = step.step(group, epoch, update, meter)
        if after_update(update, losses):
            return False
    return True


@torch.no_grad()
def evaluate(
    task: Task,
    model: nn.Module,
    batches: Iterable[Batch],
    precision: Precision,
    split: bool = False,
    after_batch: Callable[[int], None] = lambda number: None,
) -> dict[str, float]:
    """The task's figures.

    split: each process has its own share of the images, and all of them count.
    after_batch(number): called after each batch, from 0; may raise to end the evaluation.
    """
    model.eval()
    evaluator = task.evaluator(split)
    for number, batch in enumerate(batches):
        batch = task.preprocess(to_device(batch, precision.device), train=False)
        with precision.autocast():
            outputs = task.forward(model, batch)
        evaluator.update(outputs, batch)
        after_batch(number)
    return evaluator.compute()


@dataclass
class Run:
    """A training, from the place where its state stands to its last epoch. Every process calls the same methods.

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
    epochs: int
    checkpoint_minutes: float = 0
    watcher: Any = None
    watch_every: int = 0
    how_to_go_on: str = ""
    saved_at: float = field(default_factory=time.monotonic, init=False)

    def __post_init__(self) -> None:
        self.saver = Saver(self.folder, self.step.precision.device)
        self.step.before_update = self.saver.wait_for_copy

    def train(self) -> None:
        """Train and evaluate the epochs that are left. Stopped if a signal ended that early."""
        with handle_signals() as self.requests, self.saver:
            self.requests.begin_training(self.step.info)
            if not self.state.evaluated:
                self.scheduler.step(self.state.epoch - 1)
                self.scheduler.step_update(self.state.epoch * self.data.updates - 1)
                self.finish_epoch(self.state.epoch - 1, time.monotonic())
            for epoch in range(self.state.epoch, self.epochs):
                started = time.monotonic()
                self.train_epoch(epoch)
                self.finish_epoch(epoch, started)
            self._wait_for_checkpoint()

    def train_epoch(self, epoch: int) -> None:
        """Train the rest of an epoch, and save."""
        state, data = self.state, self.data
        self.scheduler.step(epoch)
        start = data.set_position(epoch, state.position)
        self.scheduler.step_update(epoch * data.updates + start)
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

    def on_step(self, epoch: int, update: int, losses: dict[str, Tensor]) -> bool:
        """Tell the progress, and save if it is time or asked for. Returns whether to stop."""
        state, rate = self.state, self._rate()
        self.saver.check()
        if update + 1 < self.data.updates:
            self.scheduler.step_update(epoch * self.data.updates + update + 1)
        if self.progress.due(update):
            info = self.step.info
            losses = {name: all_reduce_sum(part, info) / info.world_size for name, part in losses.items()}
        self.progress.advance(update, losses["loss"], rate)
        if self.progress.due(update):
            state.meter.check(epoch)
            figures = {name: part.item() for name, part in losses.items()}
            state.history.train_point(epoch + (update + 1) / self.data.updates, {**figures, "lr": rate})
        overdue = 0 < 60 * self.checkpoint_minutes < time.monotonic() - self.saved_at
        request = self.requests.sync(save=overdue and self.step.info.is_main)
        if request != Request.NOTHING:
            state.meter.check(epoch)
            if update + 1 < self.data.updates:
                self.save(epoch, (update + 1) * self.data.total_batch)
            else:
                self.save(epoch + 1, 0, evaluated=False)
        return request == Request.STOP

    def finish_epoch(self, epoch: int, started: float) -> None:
        """Evaluate an epoch's weights and their average, keep the best, write the log, and save."""
        state, best = self.state, ""
        record = {"epoch": epoch, "train_loss": state.meter.average(), "train_lr": self._rate()}
        metric = self.step.task.metric
        for name, candidate in {"test": state.model, "test_ema": state.model_ema}.items():
            if candidate is not None:
                figures = self._figures_of(candidate)
                self._report(figures, "averaged weights: " if name == "test_ema" else "")
                record |= {f"{name}_{figure}": value for figure, value in figures.items() if figure != "images"}
                weights = name.replace("test", "model")
                if figures[metric] > state.best.get(metric, float("-inf")):
                    state.best, best = {**figures, "epoch": epoch, "weights": weights}, weights
        if self.watcher is not None and (epoch + 1) % self.watch_every == 0:
            seen = self.watcher.collect()
            state.history.attention(seen.scalars, seen.pictures, epoch)
        record["n_parameters"] = count_parameters(state.model)
        record["seconds"] = round(time.monotonic() - started, 2)
        state.history.end_epoch(record)
        self.save(epoch + 1, 0, best=best)

    def save(self, epoch: int, position: int, evaluated: bool = True, best: str = "") -> None:
        """Begin to write a checkpoint of this place (see TrainingState). NonFiniteLoss if the weights are not finite.

        best: which of the state's weights are the best so far, if any.
        """
        state = self.state
        check_weights(state.model, epoch if position else epoch - 1)
        state.meter.gather()
        state.epoch, state.position, state.evaluated = epoch, position, evaluated
        self.saved_at = time.monotonic()
        if self.step.info.is_main:
            self.saver.save(state, best)
        self.requests.barrier()  # the one before may not have been written yet

    def _figures_of(self, candidate: nn.Module) -> dict[str, float]:
        home = next(candidate.parameters()).device  # the average may live in host memory
        candidate.to(self.step.precision.device)
        share_buffers(candidate, self.step.info)
        step = self.step
        figures = evaluate(step.task, candidate, self.data.val, step.precision, self.data.dist_eval, self._after_batch)
        candidate.to(home)
        return figures

    def _report(self, figures: dict[str, float], prefix: str) -> None:
        if self.step.info.is_main:
            for line in self.step.task.report(figures):
                print(f"{prefix}{line}", flush=True)

    def _after_batch(self, number: int) -> None:
        self.saver.check()
        # The checkpoint is at least being written; evaluating is not worth the little time that a signal leaves.
        if number < self.data.val_batches and self.requests.sync() == Request.STOP:
            raise self._stopped()

    def _rate(self) -> float:
        return self.step.optimizer.param_groups[-1]["lr"]

    def _wait_for_checkpoint(self) -> None:
        """Wait until the last one is on the disk: a process that leaves takes the others with it, by the launcher."""
        self.saver.wait()
        self.requests.barrier()

    def _stopped(self) -> Stopped:
        self._wait_for_checkpoint()
        message = f"stopped; checkpoint in {self.folder.path}. {self.how_to_go_on}"
        return Stopped(message, self.requests.signals)
