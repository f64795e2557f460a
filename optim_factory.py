"""Optimizer, learning rate schedule, average and loss from the options; timm builds them."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, list_optimizers, param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from runtime.errors import UsageError, did_you_mean
from runtime.options import LOWEST_RATE, Options, mixing

REFERENCE_BATCH = 512
"""The total batch size that --lr is stated for."""

EMA_WARMUP = 5
"""While it warms up, the average after n updates has the decay n / (n + 5): it covers about the last sixth of them."""


def scaled_rate(options: Options, total_batch: int) -> float:
    """The learning rate for `total_batch` images per update."""
    return options.lr * total_batch / REFERENCE_BATCH


def check_training(options: Options, total_batch: int) -> None:
    """UsageError if timm has no such optimizer or schedule, or refuses its options, or if the rates contradict."""
    trial = nn.Linear(1, 1)
    if options.opt_betas is not None:
        own = build_optimizer(trial, replace(options, opt_betas=None), total_batch).defaults.get("betas", ())
        if len(own) != len(options.opt_betas):
            raise UsageError(f"--opt_betas: {options.opt} takes {len(own) or 'no'} betas, not {len(options.opt_betas)}")
    build_scheduler(build_optimizer(trial, options, total_batch), options)
    rate = scaled_rate(options, total_batch)
    meaning = f"the rate {rate:.3g} that --lr {options.lr} means for {total_batch} images per update"
    if options.sched in LOWEST_RATE and options.min_lr > rate:
        raise UsageError(f"--min_lr {options.min_lr} is above {meaning}; lower it, or raise --lr")
    if options.warmup_epochs > 0 and options.warmup_lr > rate:
        raise UsageError(f"--warmup_lr {options.warmup_lr} is above {meaning}; lower it, or raise --lr")


def build_optimizer(model: nn.Module, options: Options, total_batch: int) -> torch.optim.Optimizer:
    """The optimizer at the rate for `total_batch` images per update.

    1-D tensors and biases do not decay, nor does what `model.no_weight_decay()` names (position tables), unless
    `options.decay_position_tables` says otherwise. UsageError if timm has no such optimizer or it refuses an option.
    """
    extra = {} if options.opt_betas is None else {"betas": tuple(options.opt_betas)}
    if options.opt_eps is not None:  # timm leaves it out where an optimizer has none
        extra["eps"] = options.opt_eps
    try:
        return create_optimizer_v2(
            model,
            opt=options.opt,
            lr=scaled_rate(options, total_batch),
            weight_decay=options.weight_decay,
            momentum=options.momentum,
            layer_decay=options.layer_decay,
            param_group_fn=_decaying_tables(options) if options.decay_position_tables else None,
            **extra,
        )
    except (AssertionError, ImportError, TypeError, ValueError) as error:
        known = list_optimizers()
        if options.opt.lower().removeprefix("lookahead_") not in known:
            remedy = did_you_mean(options.opt.lower(), known, "try adamw, sgd or lamb", "--opt ")
            raise UsageError(f"unknown --opt {options.opt!r}; {remedy}") from error
        raise UsageError(f"--opt {options.opt}: {error}") from error


def _decaying_tables(options: Options) -> Callable[[nn.Module], list[dict[str, Any]]]:
    """The parameter groups of published DeBiFormer, whose list of exceptions matches no parameter's full name."""
    if options.layer_decay is None:
        return lambda model: param_groups_weight_decay(model, options.weight_decay)
    return lambda model: param_groups_layer_decay(model, options.weight_decay, layer_decay=options.layer_decay)


def build_scheduler(optimizer: torch.optim.Optimizer, options: Options) -> Scheduler:
    """The schedule, a function of the epoch alone; call `.step(epoch)` before training epoch `epoch`.

    The published scripts step after the epoch instead, which trains the first two epochs at the warm-up rate and
    every later one at its predecessor's.
    """
    try:
        scheduler, _ = create_scheduler_v2(optimizer, **scheduler_kwargs(options))
    except (AssertionError, ValueError) as error:
        raise UsageError(f"--sched {options.sched}: {error}") from error
    return scheduler


def build_ema(model: nn.Module, options: Options) -> ModelEmaV3 | None:
    """The moving average of the model's weights; None if --no_model_ema.

    With its warm-up on, `update` wants the number of updates so far, from 1 on.
    """
    if not options.model_ema:
        return None
    return ModelEmaV3(
        model,
        options.model_ema_decay,
        use_warmup=options.model_ema_warmup,
        warmup_gamma=EMA_WARMUP,
        warmup_power=1.0,
        device=torch.device("cpu") if options.model_ema_force_cpu else None,
    )


def training_notes(options: Options, total_batch: int, updates: int) -> list[str]:
    """What the user should know of the batch, the rates and the average before training `updates` updates, a line each.

    total_batch: images per update over all processes.
    """
    notes, rate = [], scaled_rate(options, total_batch)
    if options.recipe_batch not in (None, total_batch):
        notes.append(
            f"{total_batch} images per update (batch_size x processes x accum_steps); the recipe is meant for "
            f"{options.recipe_batch}. Change --batch_size or --accum_steps to keep to it"
        )
    if options.sched in LOWEST_RATE and 0 < rate < 2 * options.min_lr:
        notes.append(
            f"the learning rate only falls from {rate:.3g} (--lr {options.lr} for {total_batch} images per update) to "
            f"--min_lr {options.min_lr}; raise --lr or lower --min_lr for a schedule that decays"
        )
    return notes + (_ema_notes(options, updates) if options.model_ema else [])


def _ema_notes(options: Options, updates: int) -> list[str]:
    decay = options.model_ema_decay
    span = 1 / (1 - decay)
    if options.model_ema_warmup:
        span = min(span, max(1.0, updates / (EMA_WARMUP + 1)))
    elif (left := decay**updates) > 0.1:
        return [
            f"--model_ema_decay {decay} is slow for the {updates} updates planned: {left:.0%} of the averaged weights "
            "will still be the initial ones; lower it, or add --model_ema_warmup or --no_model_ema"
        ]
    return [
        f"averaging the weights over about {span:.0f} of {updates} updates (--model_ema_decay {decay}); the average is "
        "evaluated, too"
    ]


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
