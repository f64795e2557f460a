"""Optimizer, learning rate schedule, and average from their options; timm builds them."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from timm.optim import create_optimizer_v2, list_optimizers, param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn

from runtime.errors import UsageError, did_you_mean
from runtime.options import ModelOptions, option


@dataclass
class OptimizerOptions:
    """Optimizer"""

    opt: str = option("adamw", "any optimizer of timm")
    opt_eps: float | None = option(1e-8, "epsilon; null: the optimizer's own", at_least=0)
    opt_betas: list[float] | None = option(None, "betas; null: the optimizer's own", at_least=0, below=1)
    clip_grad: float | None = option(None, "clip the gradient's norm; null or 0: off", at_least=0)
    momentum: float = option(0.9, "momentum of SGD", at_least=0, below=1)
    weight_decay: float = option(0.05, "weight decay; not applied to 1-D tensors and position tables", at_least=0)
    decay_position_tables: bool = option(
        False, "apply the weight decay to the position tables of DeBiFormer, too, as its published code does"
    )
    layer_decay: float | None = option(
        None, "multiply the rate by this per layer from the head down; null: off", above=0, at_most=1
    )


@dataclass
class ScheduleOptions:
    """Schedule"""

    sched: str = option(
        "cosine",
        "the schedules of timm that do not depend on the run's past",
        choices=("cosine", "tanh", "poly", "step", "multistep", "wsd", "rsqrt", "constant"),
    )
    lr: float = option(
        5e-4, "learning rate for 512 images in total; scaled linearly to the actual total batch size", at_least=0
    )
    recipe_batch: int | None = option(
        None, "images per update, over all processes, that a recipe is meant for; another number is told", at_least=1
    )
    lr_noise: list[float] | None = option(
        None,
        "noise on the rate: from, to (fractions of the epochs)",
        at_least=0,
        at_most=1,
        counts=(1, 2),
        ascending=True,
    )
    lr_noise_pct: float = option(0.67, "bound of the noise as a fraction of the rate", at_least=0.01, at_most=1)
    lr_noise_std: float = option(1.0, "standard deviation of the noise", at_least=0, at_most=100)
    warmup_lr: float = option(1e-6, "rate at the start of the warm-up (not scaled); at most the scaled lr", at_least=0)
    min_lr: float = option(1e-5, "lowest rate of cosine, tanh, poly, wsd and rsqrt (not scaled)", at_least=0)
    decay_epochs: float = option(
        30.0, "epochs between decays of the step schedule; length of the final decay of wsd and rsqrt", at_least=1
    )
    decay_milestones: list[float] = option(
        [30, 60], "epochs, counted from 1, at whose start the multistep schedule decays", above=0, ascending=True
    )
    warmup_epochs: int = option(5, "epochs of linear warm-up; fewer than `epochs`", at_least=0)
    warmup_updates: int = option(
        0, "updates of linear warm-up instead, each at its own rate; the last of them has the full one", at_least=0
    )
    decay_rate: float = option(
        0.1, "factor of the step and multistep schedules, at most 1; power of the poly schedule", above=0, at_most=10
    )


PER_UPDATE = {
    "cosine": lambda progress, power: (1 + math.cos(math.pi * progress)) / 2,
    "poly": lambda progress, power: (1 - progress) ** power,
    "constant": lambda progress, power: 1.0,
}
"""How far above `min_lr` the rate is, from 1 to 0, at a part 0..1 of the updates after the warm-up."""

LOWEST_RATE = ("cosine", "tanh", "poly", "wsd", "rsqrt")
"""The schedules that end at `min_lr`."""


def check_schedule(options: Any) -> None:
    """UsageError if the epochs of a training run contradict each other."""
    epochs = options.epochs
    if options.eval:
        return
    if options.warmup_epochs and (options.iterations or options.warmup_updates):
        raise UsageError("--iterations and --warmup_updates count updates: set --warmup_epochs 0")
    if options.iterations and options.sched not in PER_UPDATE:
        raise UsageError(f"--iterations goes with --sched {', '.join(PER_UPDATE)}, not {options.sched}")
    if options.iterations and options.warmup_updates >= options.iterations:
        raise UsageError(f"--warmup_updates {options.warmup_updates} leaves nothing of --iterations to train")
    if 0 < options.warmup_epochs >= epochs:
        raise UsageError(
            f"--warmup_epochs {options.warmup_epochs} leaves nothing of --epochs {epochs} to train at the full rate; "
            f"lower it to at most {epochs - 1}"
        )
    if options.start_epoch >= epochs:
        raise UsageError(f"--start_epoch {options.start_epoch} leaves nothing of --epochs {epochs} to train")
    if options.sched in ("step", "multistep") and options.decay_rate > 1:
        raise UsageError(f"--decay_rate must be at most 1 with --sched {options.sched}, not {options.decay_rate}")


REFERENCE_BATCH = 512
"""The total batch size that --lr is stated for."""

EMA_WARMUP = 5
"""While it warms up, the average after n updates has the decay n / (n + 5): it covers about the last sixth of them."""


def scaled_rate(options: ScheduleOptions, total_batch: int) -> float:
    """The learning rate for `total_batch` images per update."""
    return options.lr * total_batch / REFERENCE_BATCH


def check_training(options: Any, total_batch: int) -> None:
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
    if (options.warmup_epochs or options.warmup_updates) and options.warmup_lr > rate:
        raise UsageError(f"--warmup_lr {options.warmup_lr} is above {meaning}; lower it, or raise --lr")


def build_optimizer(model: nn.Module, options: Any, total_batch: int) -> torch.optim.Optimizer:
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


def _decaying_tables(options: Any) -> Callable[[nn.Module], list[dict[str, Any]]]:
    """The parameter groups of published DeBiFormer, whose list of exceptions matches no parameter's full name."""
    if options.layer_decay is None:
        return lambda model: param_groups_weight_decay(model, options.weight_decay)
    return lambda model: param_groups_layer_decay(model, options.weight_decay, layer_decay=options.layer_decay)


class UpdateSchedule:
    """A schedule that sets the rate of each update: warm-up, then an epoch's rate, or with --iterations its own curve.

    The first update has `warmup_lr`, the last of the warm-up the full rate, the very last one `min_lr`.

    scheduler: of epochs. updates: how many there are in all.
    """

    def __init__(self, scheduler: Scheduler, options: Any, updates: int) -> None:
        self.scheduler, self.opts, self.updates = scheduler, options, updates
        self.groups, self.rates = scheduler.optimizer.param_groups, []

    def step(self, epoch: int) -> None:
        """Begin an epoch."""
        self.scheduler.step(epoch)
        self.rates = [group["lr"] for group in self.groups]

    def step_update(self, number: int) -> None:
        """Set the rates of an update, from 0."""
        opts, warmup = self.opts, self.opts.warmup_updates
        for group, rate in zip(self.groups, self.rates, strict=True):
            scale = group.get("lr_scale", 1.0)
            if opts.iterations:
                progress = max(number - warmup, 0) / max(self.updates - 1 - warmup, 1)
                lowest = opts.min_lr if opts.sched in LOWEST_RATE else 0.0
                above = PER_UPDATE[opts.sched](progress, opts.decay_rate)
                rate = scale * (lowest + (group["initial_lr"] - lowest) * above)
            if number < warmup:
                first = scale * opts.warmup_lr
                rate = first + (rate - first) * number / max(warmup - 1, 1)
            group["lr"] = rate


def build_scheduler(optimizer: torch.optim.Optimizer, options: Any, updates: int = 0) -> Scheduler | UpdateSchedule:
    """The schedule; call `.step(epoch)` before training epoch `epoch` and `.step_update(number)` before each update.

    It is a function of these two alone. updates: how many there are in all.

    The published scripts step after the epoch instead, which trains the first two epochs at the warm-up rate and
    every later one at its predecessor's.
    """
    try:
        scheduler, _ = create_scheduler_v2(optimizer, **scheduler_kwargs(options))
    except (AssertionError, ValueError) as error:
        raise UsageError(f"--sched {options.sched}: {error}") from error
    return UpdateSchedule(scheduler, options, updates) if options.iterations or options.warmup_updates else scheduler


def build_ema(model: nn.Module, options: ModelOptions) -> ModelEmaV3 | None:
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


def training_notes(options: Any, total_batch: int, updates: int) -> list[str]:
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


def _ema_notes(options: Any, updates: int) -> list[str]:
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
