"""What classification minimises."""

from typing import Any

import torch
import torch.nn.functional as F
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

from .options import mixing


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


def build_loss(options: Any, teacher: nn.Module | None = None) -> nn.Module:
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
