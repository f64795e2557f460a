"""A model for use, with what its checkpoint says about it."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import timm
from torch import nn

from models.labels import labels_of
from models.weights import check_outline, count_classes, load_checkpoint, load_for_inference, options_of, weights_of
from runtime.command_line import KeyValues, with_underscores
from runtime.errors import OneLineParser
from runtime.model import build_model, check_model_name
from runtime.options import check_ranges
from tasks.options import Options

UNTRAINED = "*** UNTRAINED WEIGHTS: no --checkpoint was given, what the model says is random ***"


@dataclass
class Loaded:
    """A model in evaluation mode, on the CPU.

    options: what its images need to look like. labels: its classes. trained: whether a checkpoint gave its weights.
    """

    model: nn.Module
    options: Options
    labels: list[str]
    trained: bool


def load_model(
    name: str,
    checkpoint: str = "",
    *,
    use_ema: bool = False,
    input_size: int | None = None,
    model_kwargs: dict[str, Any] | None = None,
) -> Loaded:
    """A model with a checkpoint's weights, classes and training options, or untrained with 1000 classes.

    input_size: side of the images in pixels; None: as trained. model_kwargs go to the model, on top of the
    checkpoint's. UsageError for an unknown model, WeightsError for a checkpoint that is none or of another one.
    """
    check_model_name(name, "--model")
    content = load_checkpoint(checkpoint) if checkpoint else {}
    options = Options(**{"input_size": _native_size(name), "drop_path": 0.0, **options_of(content), "model": name})
    options.model_kwargs = {**options.model_kwargs, **(model_kwargs or {})}
    if checkpoint:
        weights = weights_of(content, checkpoint, use_ema)
        num_classes = count_classes(weights, name, checkpoint)
        check_outline(lambda: build_model(options, num_classes), weights, checkpoint)
        model = load_for_inference(build_model(options, num_classes), weights, checkpoint)
    else:
        model = build_model(options, 1000).eval()
    options.input_size = options.input_size if input_size is None else input_size
    check_ranges(options, prefix="--")
    return Loaded(model, options, labels_of(content, model.num_classes), trained=bool(checkpoint))


def _native_size(name: str) -> int:
    cfg = timm.get_pretrained_cfg(name, allow_unregistered=True)
    return cfg.input_size[-1] if cfg else 224


def model_parser(program: str, description: str) -> OneLineParser:
    """A command line that says which model to load."""
    parser = OneLineParser(prog=f"python -m {program}", description=description, allow_abbrev=False)
    parser.add_argument("--model", required=True, help="a model of this project or any of timm's")
    parser.add_argument("--checkpoint", default="", help="file with its weights; its class count and options are used")
    parser.add_argument("--use_ema", action="store_true", help="take the checkpoint's averaged weights")
    parser.add_argument("--input_size", type=int, metavar="PIXELS", help="side of the images; default: as trained")
    parser.add_argument(
        "--model_kwargs", nargs="+", action=KeyValues, default={}, metavar="NAME=VALUE", help="arguments of the model"
    )
    return parser


def load_from(parser: OneLineParser, argv: Sequence[str] | None) -> tuple[argparse.Namespace, Loaded]:
    """The arguments of a command line (of this process if None) and the model that they name."""
    args = parser.parse_args([with_underscores(arg) for arg in (sys.argv[1:] if argv is None else argv)])
    loaded = load_model(
        args.model,
        args.checkpoint,
        use_ema=args.use_ema,
        input_size=args.input_size,
        model_kwargs=args.model_kwargs,
    )
    return args, loaded
