"""One epoch of training, and evaluation. Nothing here writes files or knows of options.

Images come as uint8; normalisation, random erasing and mixing happen on the device.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice

import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from errors import NonFiniteLoss, UsageError
from models.pixels import Pixels, normalize
from utils import Processes, all_reduce_sum, seed_everything

DIVERGED = "the last good checkpoint is kept. Try a lower --lr, --clip_grad 5 or --amp bf16"


def check_weights(model: nn.Module, epoch: int) -> None:
    """NonFiniteLoss if an update of this epoch made a parameter infinite or NaN. Waits for the device."""
    if not torch.stack([parameter.detach().isfinite().all() for parameter in model.parameters()]).all():
        raise NonFiniteLoss(f"the weights are not finite after an update of epoch {epoch + 1}; {DIVERGED}")


@dataclass
class Precision:
    """Device and number format. dtype: of autocast, None for float32 throughout; the scaler is active for fp16."""

    device: torch.device
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)


class LossMeter:
    """Mean of an epoch's losses, kept on the device so that adding to it waits for nothing."""

    def __init__(self, device: torch.device, processes: Processes) -> None:
        self.processes = processes
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.sums = torch.zeros(2, dtype=dtype, device=device)  # of losses, and how many
        self.first_bad = torch.full((), -1, device=device)
        self.gathered: list[list[float]] = []

    def reset(self) -> None:
        self.sums.zero_()
        self.first_bad.fill_(-1)

    def state_dict(self) -> dict[str, list[list[float]]]:
        """What `gather` collected."""
        return {"sums": self.gathered}

    def load_state_dict(self, state: dict[str, list[list[float]]]) -> None:
        """Each process takes its own sums; among another number of processes, the main one takes all."""
        self.reset()
        rows = torch.tensor(state["sums"], dtype=self.sums.dtype)
        if len(rows) == self.processes.world_size:
            self.sums.copy_(rows[self.processes.rank])
        elif self.processes.is_main:
            self.sums.copy_(rows.sum(0))

    def add(self, loss: Tensor, update: int) -> None:
        loss = loss.detach()
        self.sums += torch.stack([loss, torch.ones_like(loss)])
        bad = ~torch.isfinite(loss) & (self.first_bad < 0)
        self.first_bad = torch.where(bad, update, self.first_bad)

    def check(self, epoch: int) -> None:
        """NonFiniteLoss if any loss so far was not finite. Waits for the device."""
        bad = int(self.first_bad.item())
        if bad >= 0:
            raise NonFiniteLoss(f"the loss is not finite at epoch {epoch + 1}, update {bad + 1}; {DIVERGED}")

    def gather(self) -> None:
        """Collect the sums of all processes, for the state dict. Waits for the device."""
        rows = self.sums.new_zeros(self.processes.world_size, 2)
        rows[self.processes.rank] = self.sums
        self.gathered = all_reduce_sum(rows, self.processes).tolist()

    def average(self) -> float:
        """Mean loss over all updates and processes."""
        total, count = all_reduce_sum(self.sums.clone(), self.processes).tolist()
        return total / count


@dataclass
class Stepper:
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
    processes: Processes
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
    stepper: Stepper,
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
    stepper.model.train(stepper.train_mode)
    batches = iter(batches)
    for update in range(start, updates):
        group = list(islice(batches, stepper.accum_steps))
        if len(group) < stepper.accum_steps:
            raise UsageError(
                f"the training data ended after {update} of epoch {epoch + 1}'s {updates} updates: "
                "it holds fewer images than it says; correct the count, or write its shards anew"
            )
        loss = stepper.step(group, epoch, update, meter)
        if after_update(update, loss):
            return False
    return True


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    precision: Precision,
    processes: Processes = Processes(),  # noqa: B008 (frozen)
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
