"""The teacher of a distillation."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
from huggingface_hub import constants
from huggingface_hub.utils import get_session
from timm.data import ImageNetInfo
from torch import nn

from models.labels import class_names
from models.pixels import Pixels, Teacher
from models.weights import (
    WeightsError,
    checkpoint_filter_fn,
    count_classes,
    load_checkpoint,
    load_weights,
    options_of,
    weights_of,
)
from runtime.errors import UsageError
from runtime.model import check_model_name, is_ours, takes_size

from .distillation import DenseTeacher
from .options import LOGITS, TOKENS, DistillationOptions, lessons_of

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


@dataclass
class Candidate:
    """A trained model that is to teach, before it is built. UsageError if neither this project nor timm has it.

    path: of its checkpoint; empty: timm's weights. option: by which it was named.
    """

    name: str
    path: str = ""
    option: str = "--teacher_model"

    def __post_init__(self) -> None:
        check_model_name(self.name, self.option)
        try:
            cfg = timm.get_pretrained_cfg(self.name, allow_unregistered=True)
        except RuntimeError as error:  # of a tag that timm does not know
            raise UsageError(f"{self.option} {self.name} cannot be had ({error})") from error
        self.content = load_checkpoint(self.path) if self.path else {}
        trained = options_of(self.content)
        self.arguments: dict[str, Any] = trained.get("model_kwargs", {})
        self.side: int = trained.get("input_size") or (cfg.input_size[-1] if cfg else 224)

    @property
    def reduction(self) -> int:
        """Pixels between places of its last map."""
        with torch.device("meta"):
            return timm.create_model(self.name, **self.arguments).feature_info[-1]["reduction"]

    def side_of(self, given: int | None, whole_places: bool) -> int:
        """The side in pixels of what it is shown: the one that is given, or else its own.

        whole_places: its own is made a multiple of what lies between its places. UsageError if the given one is none.
        """
        if not whole_places:
            return given or self.side
        step = self.reduction
        if given and given % step:
            raise UsageError(
                f"--teacher_input_size {given} is no multiple of the {step} pixels of {self.name}'s places"
            )
        return given or -(-self.side // step) * step

    def check_classes(self, classes: Sequence[str]) -> None:
        """Raise UsageError if it is known to tell other classes apart than these, which may be [] for unknown."""
        imagenet = ImageNetInfo().label_names()
        known = class_names(self.content) or (imagenet if len(classes) == len(imagenet) else [])
        if known and list(classes) and known != list(classes):
            raise UsageError(
                f"{self.option} {self.name} was trained on other classes than the data's, or in another order"
            )

    def build(self, num_classes: int | None, side: int) -> nn.Module:
        """Build it, with its weights, for images of a side in pixels.

        num_classes: UsageError if it does not know that many; None: however many it knows, none among them.
        """
        ours = is_ours(self.name)
        sized = {"img_size": side if ours else self.side} if takes_size(self.name) else {}
        arguments = {**self.arguments, **sized}
        model = self._from_path(num_classes, arguments) if self.path else self._from_timm(num_classes, arguments)
        if side != self.side and sized and not ours:
            if not hasattr(model, "set_input_size"):
                raise UsageError(f"{self.option} {self.name} takes images of {self.side} pixels alone, not of {side}")
            model.set_input_size(img_size=side)
        return model

    def _from_path(self, num_classes: int | None, arguments: dict[str, Any]) -> nn.Module:
        weights = weights_of(self.content, self.path)
        if num_classes is None:
            try:
                num_classes = count_classes(weights, self.name, self.path)
            except WeightsError:
                num_classes = 0
        model = timm.create_model(self.name, num_classes=num_classes, **arguments)
        load_weights(model, checkpoint_filter_fn(weights, model), self.path)
        return model

    def _from_timm(self, num_classes: int | None, arguments: dict[str, Any]) -> nn.Module:
        try:
            with offline_if_unreachable():
                model = timm.create_model(self.name, pretrained=True, **arguments)
        except WeightsError:
            raise
        except Exception as error:  # whatever the library that downloads makes of a lost connection
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise UsageError(f"{self.option} {self.name} cannot be had ({reason}); pass --teacher_path") from error
        if num_classes not in (None, model.num_classes):
            raise UsageError(
                f"{self.option} {self.name} knows {model.num_classes} classes, the data has {num_classes}; "
                "pass the --teacher_path of one that was trained on them"
            )
        return model


def build_teacher(
    options: DistillationOptions,
    num_classes: int,
    student: Pixels,
    device: torch.device,
    classes: Sequence[str] = (),
) -> Teacher | None:
    """Build the frozen teacher of --distillation_type and --distill; None without distillation.

    student: what the images are normalised with. classes: names of the data's classes, where they have any.
    """
    lessons = lessons_of(options)
    if not lessons:
        return None
    candidate = Candidate(options.teacher_model, options.teacher_path)
    says_classes = bool(lessons & {LOGITS, TOKENS})
    if says_classes and class_names(candidate.content):
        candidate.check_classes(classes)
    side = candidate.side_of(options.teacher_input_size, whole_places=lessons != {LOGITS})
    try:
        model = candidate.build(num_classes if says_classes else None, side).requires_grad_(False)
        model = model.to(device, memory_format=torch.channels_last)
        if lessons == {LOGITS}:
            return Teacher(model, student, device, side)
        return DenseTeacher(model, student, device, side, lessons)
    except (UsageError, WeightsError):
        raise
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:  # of a size that it cannot take
        reason = str(error).partition("\n")[0]
        raise UsageError(f"--teacher_model {options.teacher_model} at {side} pixels: {reason}") from error
