"""Semantic segmentation as the engine sees it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from models.pyramid import dense_backbone
from runtime.errors import UsageError
from runtime.options import option
from tasks.base import Batch, Evaluator, Sample, Task

from .data import IndexImages, class_names
from .inference import augmented, sliding_window
from .metric import ConfusionMatrix
from .model import AUXILIARY_WEIGHT, pixel_cross_entropy, semantic_fpn, upernet
from .transforms import EvalTransform, TrainTransform

HEADS = {"semantic_fpn": semantic_fpn, "upernet": upernet}
MULTI_SCALE = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)


@dataclass
class SegmentationOptions:
    """Segmentation"""

    data_path: str = option("", "folder with images/ and annotations/, each with train/ and val/ (or training/, …)")
    num_classes: int | None = option(None, "classes; null: as many as the data names", at_least=1)
    reduce_zero: bool = option(False, "label 0 means ignored and classes count from 1, as in ADE20K")
    head: str = option("semantic_fpn", "what turns the backbone's maps into classes", choices=tuple(HEADS))
    head_channels: int | None = option(None, "channels of the head; null: 256 (semantic_fpn), 512 (upernet)", at_least=1)
    crop: int = option(512, "side of training crops in pixels", at_least=1)
    longest: int = option(2048, "images are resized to fit `longest` x `shortest`", at_least=1)
    shortest: int = option(512, "see `longest`", at_least=1)
    test_mode: str = option("whole", "evaluate images whole, or by windows of --crop", choices=("whole", "slide"))
    test_stride: int = option(341, "pixels from window to window", at_least=1)
    test_augment: bool = option(False, "average over six scales and mirror images")


class Counts(Evaluator):
    """mIoU, mAcc and aAcc over all processes."""

    def __init__(self, num_classes: int, reduce: Callable[[Tensor], Tensor], device: torch.device) -> None:
        self.matrix, self.reduce, self.images = ConfusionMatrix(num_classes, device), reduce, 0

    def update(self, outputs: list[Tensor], batch: Batch) -> None:
        for logits, labels in zip(outputs, batch["labels"], strict=True):
            self.matrix.update(logits.argmax(0), labels)
            self.images += 1

    def compute(self) -> dict[str, float]:
        images = self.reduce(self.matrix.counts.new_tensor([self.images]))
        self.reduce(self.matrix.counts)
        return {**self.matrix.compute(), "images": int(images)}
