"""A model for use, with what its checkpoint says about it."""

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
from timm.data import ImageNetInfo
from torch import nn

from models.labels import labels_of
from models.weights import load_checkpoint, options_of, saved_options
from models.weights.errors import printable
from runtime.command_line import KeyValues, with_underscores
from runtime.errors import OneLineParser, UsageError
from runtime.model import check_model_name
from runtime.options import check_ranges
from tasks import Task, find_task
from tasks.classification.task import Classification
from tasks.options import Options
from tasks.trained import restore, trained_options

UNTRAINED = "*** UNTRAINED WEIGHTS: no --checkpoint was given, what the model says is random ***"


@dataclass
class Loaded:
    """A model in evaluation mode, on the CPU.

    options: what its images need to look like. labels: its classes. trained: whether a checkpoint gave its weights.
    figures: the best accuracies in percent that its training measured. data: what it was trained on; "" if unknown.
    """

    model: nn.Module
    options: Options
    labels: list[str]
    trained: bool
    figures: dict[str, float] = field(default_factory=dict)
    data: str = ""

    def task_on(self, device: Any) -> Task:
        """Move the model to a device; return what says what it sees there."""
        self.model.to(device)
        task = find_task(self.options.task)(self.options, device=device)
        task.classes, task.num_classes = self.labels, len(self.labels)
        return task


def load_model(
    name: str | None = None,
    checkpoint: str = "",
    *,
    use_ema: bool = False,
    input_size: int | None = None,
    model_kwargs: dict[str, Any] | None = None,
    any_task: bool = False,
) -> Loaded:
    """A model with a checkpoint's weights, classes and training options, or untrained with 1000 classes.

    name: None: the checkpoint's. input_size: side of the images in pixels; None: as trained. model_kwargs go to the
    model, on top of the checkpoint's. any_task: models that are no classifiers are welcome, too.
    UsageError for an unknown model, WeightsError for a checkpoint that is none or of another one.
    """
    content = load_checkpoint(checkpoint) if checkpoint else {}
    options, saved = trained_options(content, checkpoint), options_of(content)
    name = name or saved.get("model")
    if name is None:
        raise UsageError(f"{checkpoint} does not say its model; pass --model" if checkpoint else "--model is missing")
    check_model_name(name, "--model")
    options.model, options.input_size = name, saved.get("input_size", _native_size(name))
    options.model_kwargs = {**options.model_kwargs, **(model_kwargs or {})}
    kind = find_task(options.task)
    if not (any_task or issubclass(kind, Classification)):
        raise UsageError(f"{checkpoint} is of --task {options.task}; this tool takes classifiers alone")
    if checkpoint:
        task, model = restore(options, content, checkpoint, use_ema)
    else:
        task = kind(options)
        task.num_classes, task.classes = 1000, labels_of({}, 1000)
        model = task.build_model()
    options.input_size = options.input_size if input_size is None else input_size
    check_ranges(options, prefix="--")
    labels = list(task.classes)
    return Loaded(model.eval(), options, labels, bool(checkpoint), figures_of(content), data_of(content, labels))


def figures_of(checkpoint: Mapping[str, Any]) -> dict[str, float]:
    """The best top-1 and top-5 accuracies that a checkpoint's training measured, as acc1 and acc5; {} without any."""
    best = checkpoint.get("best")
    found = {name: best.get(name) for name in ("acc1", "acc5")} if isinstance(best, Mapping) else {}
    return {name: value for name, value in found.items() if isinstance(value, float) and math.isfinite(value)}


def data_of(checkpoint: Mapping[str, Any], labels: Sequence[str]) -> str:
    """What the data of a checkpoint's training are called; "" if nothing says."""
    if checkpoint and list(labels) == ImageNetInfo().label_names():
        return "imagenet-1k"
    saved = saved_options(checkpoint)
    name, folder = (printable(str(saved.get(option) or "")) for option in ("data_set", "data_path"))
    return Path(folder).name or ("" if name == "IMNET" else name)


def _native_size(name: str) -> int:
    cfg = timm.get_pretrained_cfg(name, allow_unregistered=True)
    return cfg.input_size[-1] if cfg else 224


def model_parser(program: str, description: str) -> OneLineParser:
    """A command line that says which model to load."""
    parser = OneLineParser(prog=f"python -m {program}", description=description, allow_abbrev=False)
    parser.add_argument("--model", help="a model of this project or any of timm's; default: the checkpoint's")
    parser.add_argument("--checkpoint", default="", help="file with its weights; its class count and options are used")
    parser.add_argument("--use_ema", action="store_true", help="take the checkpoint's averaged weights")
    parser.add_argument(
        "--input_size", type=int, metavar="PIXELS", help="side of a classifier's images; default: as trained"
    )
    parser.add_argument(
        "--model_kwargs", nargs="+", action=KeyValues, default={}, metavar="NAME=VALUE", help="arguments of the model"
    )
    return parser


def load_from(
    parser: OneLineParser, argv: Sequence[str] | None, any_task: bool = False
) -> tuple[argparse.Namespace, Loaded]:
    """The arguments of a command line (of this process if None) and the model that they name."""
    args = parser.parse_args([with_underscores(arg) for arg in (sys.argv[1:] if argv is None else argv)])
    loaded = load_model(
        args.model,
        args.checkpoint,
        use_ema=args.use_ema,
        input_size=args.input_size,
        model_kwargs=args.model_kwargs,
        any_task=any_task,
    )
    return args, loaded
