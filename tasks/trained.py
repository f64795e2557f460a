"""A task as a checkpoint of its run left it, for tools that use trained models."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from models.weights import WeightsError, check_outline, load_for_inference, options_of, saved_options, weights_of

from . import DEFAULT_TASK, Task, find_task
from .options import Options, options_of_task


def task_name(checkpoint: Mapping[str, Any]) -> str:
    """Return the name of the task that a checkpoint was trained for; the default where nothing says."""
    name = saved_options(checkpoint).get("task")
    return name if isinstance(name, str) else DEFAULT_TASK


def trained_options(checkpoint: Mapping[str, Any], path: str | Path) -> Options:
    """Return the options of a checkpoint's run that its model and predictions depend on, over the defaults.

    Raises:
        UsageError: its task is unknown.
        WeightsError: no training could have had these options.
    """
    name, saved = task_name(checkpoint), saved_options(checkpoint)
    lasting = [spec.name for group in find_task(name).lasting for spec in fields(group)]
    own = {option: saved[option] for option in lasting if option in saved}
    try:
        options = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(options_of_task(name)), own))
    except OmegaConfBaseException as error:
        raise WeightsError(f"{path} is damaged: {str(error).splitlines()[0]}") from error
    options.task, options.eval, options.drop_path = name, True, 0.0
    for option, value in options_of(checkpoint).items():
        setattr(options, option, value)
    return options


def restore(
    options: Options, checkpoint: Mapping[str, Any], path: str | Path, use_ema: bool = False
) -> tuple[Task, nn.Module]:
    """Return the task, and its model with a checkpoint's weights, in evaluation mode on the CPU.

    Raises:
        UsageError, WeightsError: the checkpoint lacks something, or is of another model.
    """
    task, weights = find_task(options.task)(options), weights_of(checkpoint, path, use_ema)
    task.recall(checkpoint, weights, path)
    check_outline(task.build_model, weights, path)
    return task, load_for_inference(task.build_model(), weights, path)
