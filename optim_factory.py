"""Optimizer, learning rate schedule and loss from the options; timm builds them."""

import torch
import torch.nn.functional as F
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn

from errors import UsageError
from options import Options, mixing

REFERENCE_BATCH = 512
"""The total batch size that --lr is stated for."""


def build_optimizer(model: nn.Module, options: Options, total_batch: int) -> torch.optim.Optimizer:
    """The optimizer at the rate for `total_batch` images per update.

    1-D tensors, biases and what `model.no_weight_decay()` names (position tables) do not decay.
    """
    extra = {} if options.opt_betas is None else {"betas": tuple(options.opt_betas)}
    if options.opt_eps is not None:  # timm leaves it out where an optimizer has none
        extra["eps"] = options.opt_eps
    try:
        return create_optimizer_v2(
            model,
            opt=options.opt,
            lr=options.lr * total_batch / REFERENCE_BATCH,
            weight_decay=options.weight_decay,
            momentum=options.momentum,
            layer_decay=options.layer_decay,
            **extra,
        )
    except (AssertionError, ImportError, TypeError, ValueError) as error:
        raise UsageError(f"--opt {options.opt}: {error}") from error


def build_scheduler(optimizer: torch.optim.Optimizer, options: Options) -> Scheduler:
    """The schedule, a function of the epoch alone; call `.step(epoch)` before training epoch `epoch`.

    The published scripts step after the epoch instead, which trains the first two epochs at the warm-up rate and
    every later one at its predecessor's.
    """
    if options.sched == "plateau":
        raise UsageError("--sched plateau is not offered: its rate depends on the run's past; use cosine or step")
    try:
        scheduler, _ = create_scheduler_v2(optimizer, **scheduler_kwargs(options))
    except (AssertionError, ValueError) as error:
        raise UsageError(f"--sched {options.sched}: {error}") from error
    if scheduler is None:
        raise UsageError(f"--sched {options.sched!r} is not a schedule of timm; try cosine, step or constant")
    return scheduler


class DistillationLoss(nn.Module):
    """A loss mixed with what a teacher says (DeiT, arXiv 2012.12877, section 4).

    base: loss of (logits, targets). kind: 'soft' compares distributions at temperature `tau`, 'hard' takes the
    teacher's most likely class as the label. alpha: the teacher's share, 0..1.
    """

    def __init__(self, base: nn.Module, teacher: nn.Module, kind: str, alpha: float, tau: float) -> None:
        super().__init__()
        self.base, self.kind, self.alpha, self.tau = base, kind, alpha, tau
        self.teacher = teacher.eval().requires_grad_(False)

    def forward(self, images: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
        """images (B, 3, S, S), logits (B, classes), targets as the base loss takes them -> a scalar."""
        with torch.no_grad():
            teacher_logits = self.teacher(images)
        if self.kind == "soft":
            student = F.log_softmax(logits / self.tau, dim=1)
            teacher = F.log_softmax(teacher_logits / self.tau, dim=1)
            # Summed over classes and divided by their number and the batch, as published.
            distance = F.kl_div(student, teacher, reduction="sum", log_target=True) * self.tau**2 / logits.numel()
        else:
            distance = F.cross_entropy(logits, teacher_logits.argmax(dim=1))
        return (1 - self.alpha) * self.base(logits, targets) + self.alpha * distance


class PlainLoss(nn.Module):
    """A loss of (logits, targets) with the signature of `DistillationLoss`."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, images: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
        return self.base(logits, targets)


def build_loss(options: Options, teacher: nn.Module | None = None) -> nn.Module:
    """The training loss, called as loss(images, logits, targets)."""
    if mixing(options):
        base = SoftTargetCrossEntropy()  # mixing smooths the labels itself
    elif options.smoothing > 0:
        base = LabelSmoothingCrossEntropy(options.smoothing)
    else:
        base = nn.CrossEntropyLoss()
    if teacher is None:
        return PlainLoss(base)
    return DistillationLoss(
        base, teacher, options.distillation_type, options.distillation_alpha, options.distillation_tau
    )
