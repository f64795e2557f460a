"""A model of this project or of timm, from the options of a run."""

from typing import Any

import timm
from torch import nn

import models
from models.arguments import check_arguments
from runtime.distributed import find_processes
from runtime.errors import UsageError, did_you_mean, note
from runtime.options import ModelOptions


def check_model_name(name: str, option: str) -> None:
    """Raise UsageError, naming the closest model, if neither this project nor timm has one of this name."""
    if not timm.is_model(name):
        remedy = did_you_mean(name, timm.list_models(), f"try {models.MODEL_NAMES[0]}")
        raise UsageError(f"unknown {option} {name!r}; {remedy}")


def build_model(options: ModelOptions, num_classes: int) -> nn.Module:
    """Build the model of --model with the options' regularisation. UsageError if timm or the model refuses."""
    check_model_name(options.model, "--model")
    sized = {"img_size": options.input_size} if takes_size(options.model) else {}
    arguments = {
        "num_classes": num_classes,
        "drop_rate": options.drop,
        "drop_path_rate": options.drop_path,
        **sized,
        **options.model_kwargs,
    }
    return _create_model(options, arguments)


def is_ours(name: str) -> bool:
    """Whether a model is one of this project, whose weights fit every image size."""
    return timm.models.is_model_in_modules(name, ("debiformer", "biformer", "stl"))


def takes_size(name: str) -> bool:
    """Whether a model is built for images of one size, its argument `img_size`."""
    cfg = timm.get_pretrained_cfg(name, allow_unregistered=True)
    return is_ours(name) or bool(cfg and cfg.fixed_input_size)


def _create_model(options: ModelOptions, arguments: dict[str, Any]) -> nn.Module:
    try:
        check_arguments(options.model, options.model_kwargs)
    except ValueError as error:
        raise UsageError(f"--model_kwargs: {options.model}: {error}") from error
    try:
        return timm.create_model(options.model, **arguments)
    except TypeError as error:
        # A rate that nobody has to have asked for is no reason to refuse a model.
        if "'drop_path_rate'" not in str(error):
            raise UsageError(f"--model {options.model}: {error}") from error
        if options.drop_path not in (0, ModelOptions.drop_path):
            raise UsageError(
                f"--drop_path {options.drop_path}: {options.model} has no stochastic depth; leave the option out"
            ) from error
        if options.drop_path and find_processes().is_main:
            note(f"{options.model} has no stochastic depth: --drop_path {options.drop_path} has no effect")
        return _create_model(options, {name: arguments[name] for name in arguments if name != "drop_path_rate"})
    except (ValueError, RuntimeError) as error:
        raise UsageError(f"--model {options.model}: {error}") from error
