"""A model of this project or of timm from the options of a run, and what of it is trained."""

from typing import Any

import timm
from timm.models import group_parameters
from torch import nn

import models
from models.arguments import check_arguments
from models.weights import AUXILIARY
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


def classifiers_of(model: nn.Module) -> tuple[str, ...]:
    """Return what the names of a classifier's parameters begin with."""
    names = getattr(model, "default_cfg", {}).get("classifier") or "head"
    return tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))


def freeze(model: nn.Module, option: str) -> list[nn.Module]:
    """Leave a part of a model as it is: --freeze. Stages are counted as timm's `group_matcher` tells them apart.

    Returns:
        The modules of which nothing is trained, and which therefore belong in evaluation mode, the outermost only.

    Raises:
        UsageError: the model has fewer stages, or does not say which they are.
    """
    names = [name for name, _ in model.named_parameters()]
    if option == "backbone":
        frozen = {name for name in names if not name.startswith((*classifiers_of(model), AUXILIARY))}
    else:
        if not hasattr(model, "group_matcher"):
            raise UsageError(f"--freeze {option}: {type(model).__name__} does not say what its stages are")
        stage = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
        last = max(stage.values())  # the classifier's
        if int(option) >= last:
            raise UsageError(f"--freeze {option}: {type(model).__name__} has {last - 1} stages")
        frozen = {name for name in names if stage[name] <= int(option)}
    if len(frozen) == len(names):
        raise UsageError(f"--freeze {option} leaves nothing to train; leave it out")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    return _frozen_parts(model)


def _frozen_parts(module: nn.Module) -> list[nn.Module]:
    parameters = list(module.parameters())
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        return [module]
    return [part for child in module.children() for part in _frozen_parts(child)]
