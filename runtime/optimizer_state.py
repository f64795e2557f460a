"""The optimizer's state in a checkpoint: checked, and loaded without the options of the run that wrote it."""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from runtime.errors import UsageError

GIVEN = ("lr", "initial_lr", "lr_scale", "weight_decay", "betas", "eps", "momentum")
"""What this run's options set in a group of parameters. The rest is state: LAMB, Adan and Lookahead count their steps
there."""


def load_optimizer(optimizer: torch.optim.Optimizer, saved: Any, path: str | Path) -> None:
    """Load the state that an optimizer of the same kind saved, and keep this run's rates and decays.

    UsageError if the parameters are grouped otherwise, or if the state is not one of this optimizer.
    """
    damaged = UsageError(f"{path}: its optimizer state is damaged or of another optimizer")
    if not isinstance(saved, dict) or not isinstance(saved.get("state"), dict):
        raise damaged
    theirs, ours = saved.get("param_groups"), optimizer.state_dict()["param_groups"]
    if not isinstance(theirs, list) or not all(isinstance(group, dict) for group in theirs):
        raise damaged
    if [group.get("params") for group in theirs] != [group["params"] for group in ours]:
        raise UsageError(
            f"{path}: its optimizer has other groups; use its --opt, --layer_decay, --freeze, --decay_position_tables"
        )
    expected = _after_one_step(optimizer)
    if expected["state"] and not saved["state"]:
        raise damaged
    if not saved["state"].keys() <= {number for group in ours for number in group["params"]}:
        raise damaged
    for number, memory in saved["state"].items():
        if not _is_like(memory, expected["state"].get(number)):
            raise damaged
    for group, now, example in zip(theirs, ours, expected["param_groups"], strict=True):
        for name, value in group.items():
            if name not in now and not _is_like(value, example.get(name)):
                raise damaged
    groups = [
        {**now, **{name: value for name, value in group.items() if name not in GIVEN}}
        for group, now in zip(theirs, ours, strict=True)
    ]
    optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})


def _after_one_step(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the state dict of a copy that made one step, as an example of such an optimizer's."""
    trial = copy.deepcopy(getattr(optimizer, "_base_optimizer", optimizer))  # Lookahead itself cannot be copied
    for group in trial.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    trial.step()
    return trial.state_dict()


def _is_like(found: Any, expected: Any) -> bool:
    """Whether a value has the structure of an example; what appears only after more steps may be missing."""
    if isinstance(expected, Tensor):
        return isinstance(found, Tensor) and found.shape == expected.shape and found.dtype == expected.dtype
    if isinstance(expected, dict):
        return isinstance(found, dict) and all(
            name in found and _is_like(found[name], value) for name, value in expected.items()
        )
    if isinstance(expected, list | tuple):
        return isinstance(found, list | tuple) and len(found) == len(expected) and all(map(_is_like, found, expected))
    if isinstance(expected, bool | int | float):
        return isinstance(found, bool | int | float)
    return True
