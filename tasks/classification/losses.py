"""What classification minimises."""

from typing import Any

import torch
import torch.nn.functional as F
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

from .distillation import DenseTeacher, feature_distance, resized
from .options import FEATURES, LOGITS, TOKENS, mixing


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
            said = self.teacher(images)
        return self.mixed(logits, targets, said)

    def mixed(self, logits: Tensor, targets: Tensor, said: Tensor) -> Tensor:
        """The same where the teacher has already said its logits (B, classes)."""
        if self.kind == "soft":
            student = F.log_softmax(logits / self.tau, dim=1)
            teacher = F.log_softmax(said / self.tau, dim=1)
            # Summed over classes and divided by their number and the batch, as published.
            distance = F.kl_div(student, teacher, reduction="sum", log_target=True) * self.tau**2 / logits.numel()
        else:
            distance = F.cross_entropy(logits, said.argmax(dim=1))
        return (1 - self.alpha) * self.base(logits, targets) + self.alpha * distance


class DenseLoss(nn.Module):
    """What a teacher says of the places of an image, besides the class and, where it is a lesson, its logits.

    image: the loss of the logits, with a `DenseTeacher`. weight: of the loss of tokens, and of that of features.
    """

    def __init__(self, image: DistillationLoss, weight: float, feature_loss: str) -> None:
        super().__init__()
        self.image, self.weight, self.feature_loss = image, weight, feature_loss

    def forward(self, images: Tensor, outputs: dict[str, Any], targets: Tensor) -> dict[str, Tensor]:
        """images (B, 3, S, S), outputs of a `TaughtOutputs` -> "loss", and of what it is made."""
        said, image, logits = self.image.teacher(images), self.image, outputs["logits"]
        taught = LOGITS in said
        parts = {"class": image.mixed(logits, targets, said[LOGITS]) if taught else image.base(logits, targets)}
        if FEATURES in said:
            maps, kind = said[FEATURES], self.feature_loss
            distances = [feature_distance(answer, maps[at], kind) for at, answer in outputs[FEATURES].items()]
            parts[FEATURES] = torch.stack(distances).mean()
        if TOKENS in said:
            distances = [token_distance(answer, said[TOKENS]) for answer in outputs[TOKENS].values()]
            parts[TOKENS] = torch.stack(distances).mean()
        dense = sum(parts[lesson] for lesson in (FEATURES, TOKENS) if lesson in parts)
        return {"loss": parts["class"] + self.weight * dense, **{f"loss_{name}": part for name, part in parts.items()}}


def token_distance(answers: Tensor, probabilities: Tensor) -> Tensor:
    """The mean cross-entropy of answers (B, H, W, classes) with a teacher's probabilities (B, classes, h, w)."""
    return soft_cross_entropy(answers.float(), resized(probabilities, answers.shape[1:3]).movedim(1, -1))


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean over all but the last axis, that of the classes."""
    return -(targets * logits.log_softmax(-1)).sum(-1).mean()


class PlainLoss(nn.Module):
    """A loss of (logits, targets) with the signature of `DistillationLoss`."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, images: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
        return self.base(logits, targets)


def build_loss(options: Any, teacher: nn.Module | None = None) -> nn.Module:
    """The training loss, called as loss(images, outputs, targets)."""
    if mixing(options):
        base = SoftTargetCrossEntropy()  # mixing smooths the labels itself
    elif options.smoothing > 0:
        base = LabelSmoothingCrossEntropy(options.smoothing)
    else:
        base = nn.CrossEntropyLoss()
    if teacher is None:
        return PlainLoss(base)
    kind = "hard" if options.distillation_type == "hard" else "soft"
    loss = DistillationLoss(base, teacher, kind, options.distillation_alpha, options.distillation_tau)
    if not isinstance(teacher, DenseTeacher):
        return loss
    return DenseLoss(loss, options.distill_dense_weight, options.distill_feature_loss)
