"""The teacher of a distillation."""

import contextlib
from collections.abc import Iterator
from typing import Any

import timm
import torch
from huggingface_hub import constants
from huggingface_hub.utils import get_session
from torch import nn

from models.pixels import Pixels, Teacher
from models.weights import WeightsError, checkpoint_filter_fn, load_checkpoint, load_weights, weights_of
from runtime.errors import UsageError
from runtime.model import check_model_name

from .options import DistillationOptions

HUB_TIMEOUT = 5
"""Seconds within which the Hugging Face Hub has to answer."""


@contextlib.contextmanager
def offline_if_unreachable() -> Iterator[None]:
    """Within the block, do not wait a minute for a Hugging Face Hub that does not answer: only its cache is used."""
    before = constants.HF_HUB_OFFLINE
    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_TIMEOUT)
    except Exception:  # its HTTP library differs from version to version
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def build_teacher(
    options: DistillationOptions, num_classes: int, student: Pixels, device: torch.device
) -> nn.Module | None:
    """Build the frozen teacher of --distillation_type; None without distillation.

    student: what the images are normalised with.
    """
    if options.distillation_type == "none":
        return None
    teacher = load_teacher(options.teacher_model, options.teacher_path, num_classes)
    return Teacher(teacher.to(device, memory_format=torch.channels_last), student, device)


def load_teacher(
    name: str, path: str, num_classes: int, option: str = "--teacher_model", **arguments: Any
) -> nn.Module:
    """Load a trained model, from a checkpoint or with timm's weights. UsageError if it is not of that many classes.

    path: of the checkpoint; empty: timm's weights. option: by which it was named. arguments: of the model.
    """
    check_model_name(name, option)
    if path:
        teacher = timm.create_model(name, num_classes=num_classes, **arguments)
        load_weights(teacher, checkpoint_filter_fn(weights_of(load_checkpoint(path), path), teacher), path)
        return teacher
    try:
        with offline_if_unreachable():
            teacher = timm.create_model(name, pretrained=True, **arguments)
    except WeightsError:
        raise
    except Exception as error:  # whatever the library that downloads makes of a lost connection
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UsageError(f"{option} {name} cannot be had ({reason}); pass --teacher_path") from error
    if teacher.num_classes != num_classes:
        raise UsageError(
            f"{option} {name} knows {teacher.num_classes} classes, the data has {num_classes}; "
            "pass the --teacher_path of one that was trained on them"
        )
    return teacher
