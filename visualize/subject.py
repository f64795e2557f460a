"""The model that is looked at: built, its weights loaded, with what it takes to show it images and name its classes."""

import math
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.functional import resize

import models
from models.labels import in_words, labels_of
from models.pixels import Pixels, pixels_of
from models.weights import check_outline, count_classes, load_checkpoint, load_for_inference, options_of, weights_of
from models.weights.releases import find_release
from runtime.errors import UsageError, did_you_mean
from runtime.model import build_model
from tasks import Prediction, Task, find_task
from tasks.classification.task import Classification
from tasks.classification.transforms import pixels_for
from tasks.options import Options
from tasks.segmentation.transforms import fitted
from tasks.trained import restore, task_name, trained_options

from .capture import Capture, capture, check_readable, time_limit
from .images import to_tensor, view_of

DEFAULT_MODEL = "debiformer_tiny"
MAX_INPUT_SIZE = 512
MAX_SHARP_SIDE = 768
MAX_DENSE_SIDE = 1024
"""Pixels of the longer side that are shown of what a detector or segmenter sees."""


@dataclass(frozen=True, eq=False)
class Subject:
    """model: in evaluation mode on the CPU. classes: names, one per logit. origin: where the weights come from.

    input_size: side of the square picture in pixels; pixels: how it is cut out of an image and normalised.
    """

    name: str
    model: nn.Module
    classes: list[str]
    origin: str
    trained: bool
    input_size: int
    pixels: Pixels
    lock: Any = field(default_factory=threading.Lock, repr=False, kw_only=True)

    @property
    def facts(self) -> str:
        """One line: the model, its weights, the picture's size, how many classes."""
        side = self.input_size
        return f"{self.name}, {self.origin}, {side} x {side} pixels, {len(self.classes)} classes"

    def view(self, image: Image.Image) -> Image.Image:
        """The picture that the model sees of an RGB image."""
        return view_of(image, self.input_size, self.pixels)

    def sharp(self, image: Image.Image) -> Image.Image:
        """The same cut of the image in the image's own resolution, but no larger than can be shown."""
        side = math.floor(min(image.size) * min(self.pixels.crop_pct, 1))
        return view_of(image, max(self.input_size, min(side, MAX_SHARP_SIDE)), self.pixels)

    def capture(self, view: Image.Image, seconds: float = math.inf) -> Capture:
        """One forward pass over a view, watched. Several threads may call it; they take turns.

        UsageError if the pass takes longer than `seconds`.
        """
        with self.lock, time_limit(self.model, seconds):
            return capture(self.model, to_tensor(view, self.pixels))


class Backbone(nn.Module):
    """The part of a model whose attention is shown, as a classifier without classes."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, image: Tensor) -> Tensor:
        self.part(image)
        return image.new_zeros(len(image), 0)


@dataclass(frozen=True, eq=False)
class DenseSubject(Subject):
    """What sees more in an image than its class. model: its `Backbone`. whole: all of it, as `task` built it."""

    task: Task
    whole: nn.Module

    @property
    def facts(self) -> str:
        return f"{self.name} as --task {self.task.opts.task}, {self.origin}, {len(self.classes)} classes"

    def view(self, image: Image.Image) -> Image.Image:
        """The image as its evaluation resizes it, but no larger than can be shown."""
        opts = self.task.opts
        size = fitted(image.size[::-1], min(opts.longest, MAX_DENSE_SIDE), opts.shortest)
        return resize(image, list(size))

    def sharp(self, image: Image.Image) -> Image.Image:
        return self.view(image)

    def seen(self, image: Image.Image) -> Prediction:
        """What the whole model says of an image."""
        return self.task.predict(self.whole, image)


def load_dense(name: str | None, content: dict[str, Any], checkpoint: str | Path) -> DenseSubject:
    """The backbone in a checkpoint of another task than classification. Errors as of `load_subject`."""
    options = trained_options(content, checkpoint)
    if name not in (None, options.model):
        raise UsageError(f"{checkpoint} is of {options.model}, not of {name}; choose that model or another checkpoint")
    task, model = restore(options, content, checkpoint)
    part = Backbone(task.attending(model)).eval()
    check_readable(part, options.model)
    pixels, classes = pixels_of(options.model), in_words(task.classes)
    return DenseSubject(
        options.model, part, classes, str(checkpoint), True, options.input_size, pixels, task=task, whole=model
    )


def load_classifier(name: str | None = None, checkpoint: str | Path | None = None) -> Subject:
    """`load_subject` for what shows square pictures and classes. UsageError for other tasks' checkpoints."""
    subject = load_subject(name, checkpoint)
    if isinstance(subject, DenseSubject):
        raise UsageError(f"{checkpoint} is no classifier's: python -m visualize IMAGE --checkpoint FILE shows it")
    return subject


def load_subject(name: str | None = None, checkpoint: str | Path | None = None, load_release: bool = False) -> Subject:
    """Build a model and load a checkpoint into it, as it was trained: input size, classes and arguments are its own.

    name: None takes the checkpoint's, or else debiformer_tiny. Without weights they are random, the same each time.
    load_release: take the weights published for the model.
    UsageError for an unknown model or one without attention to show, WeightsError for a checkpoint that does not fit.
    """
    if load_release:
        name = name or DEFAULT_MODEL
        checkpoint = find_release(name)
    content = load_checkpoint(checkpoint) if checkpoint else {}
    if not issubclass(find_task(task_name(content)), Classification):
        return load_dense(name, content, checkpoint)
    args = {} if load_release else options_of(content)  # a release has its model's published size and classes
    trained_as = args.get("model")
    name = name or trained_as or DEFAULT_MODEL
    if {trained_as, name} <= set(models.MODEL_NAMES) and trained_as != name:
        raise UsageError(f"{checkpoint} is of {trained_as}, not of {name}; choose that model or another checkpoint")
    if not timm.is_model(name):
        remedy = did_you_mean(name, models.MODEL_NAMES, f"try {DEFAULT_MODEL}")
        raise UsageError(f"unknown --model {name!r}; {remedy}")
    if name not in models.MODEL_NAMES and not timm.models.is_model_in_modules(name, ("debiformer", "biformer")):
        raise UsageError(
            f"{name} has no routing or deformable attention to show; known: {', '.join(models.MODEL_NAMES)}"
        )

    weights: dict[str, Tensor] = weights_of(content, checkpoint) if checkpoint else {}
    cfg = timm.get_pretrained_cfg(name)
    input_size = args.get("input_size", cfg.input_size[-1])
    if not 1 <= input_size <= MAX_INPUT_SIZE:
        raise UsageError(f"{checkpoint} is for images of {input_size} pixels; at most {MAX_INPUT_SIZE} are shown")
    options = Options(**{**args, "model": name, "input_size": input_size, "drop_path": 0.0})
    num_classes = count_classes(weights, name, checkpoint) if checkpoint else cfg.num_classes

    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return build_model(options, num_classes)

    if checkpoint:
        check_outline(build, weights, checkpoint)
    model = build().eval()
    check_readable(model, name)
    if checkpoint:
        load_for_inference(model, weights, checkpoint)
    return Subject(
        name,
        model,
        in_words(labels_of(content, num_classes)),
        origin=str(checkpoint) if checkpoint else "untrained weights",
        trained=bool(checkpoint),
        input_size=input_size,
        pixels=pixels_for(options),
    )
