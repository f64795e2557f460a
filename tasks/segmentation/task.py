"""Semantic segmentation as a task of the engine."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from tasks.base import Batch, Evaluator, Sample, Task

from .data import IndexImages, class_names
from .inference import augmented, sliding_window
from .metric import ConfusionMatrix
from .model import AUXILIARY_WEIGHT, pixel_cross_entropy, semantic_fpn, upernet
from .transforms import EvalTransform, TrainTransform

HEADS = {"semantic_fpn": semantic_fpn, "upernet": upernet}
