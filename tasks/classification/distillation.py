"""What a teacher sees at every place of an image, and a student's answers to it.

The teacher is shown the student's own image, mixed and erased as it is (Beyer et al., "Knowledge distillation: A good
teacher is patient and consistent", arXiv 2106.05237). The student answers from its maps at strides 16 and 32, through
one linear layer for each map and lesson, which only training has.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.pixels import Pixels, Teacher
from runtime.errors import UsageError

from .options import FEATURES, LOGITS, TOKENS

STRIDES = (16, 32)
"""Pixels between the places of the maps that a student learns with."""


class DenseTeacher(Teacher):
    """A teacher that says what it was asked for, called `lessons`. UsageError if it cannot.

    images (B, 3, S, S) -> "logits" (B, classes); "features", a map (B, C, h, w) for each of `STRIDES`, by its number;
    "tokens", the probabilities (B, classes, h, w) that its classifier gives to each place. side: of what it is shown,
    in pixels.
    """

    def __init__(self, model: nn.Module, student: Pixels, device: torch.device, side: int, lessons: set[str]) -> None:
        super().__init__(model, student, device, side)
        self.lessons, name = lessons, type(model).__name__
        if not hasattr(model, "forward_intermediates"):
            raise UsageError(f"--teacher_model: {name} does not show its maps; teach logits alone, or choose another")
        self.stages = {stride: stage_at(model, stride) for stride in STRIDES}
        self.widths = {stride: model.feature_info[stage]["num_chs"] for stride, stage in self.stages.items()}
        self(torch.zeros(1, 3, side, side, device=device))  # what it cannot say comes out before training

    @torch.no_grad()
    def forward(self, images: Tensor) -> dict[str, Any]:
        model, wanted = self.teacher.model, sorted(set(self.stages.values()))
        last, maps = model.forward_intermediates(self.shown(images), indices=wanted, norm=True)
        said: dict[str, Any] = {}
        if FEATURES in self.lessons:
            said[FEATURES] = {stride: maps[wanted.index(stage)] for stride, stage in self.stages.items()}
        if LOGITS in self.lessons:
            said[LOGITS] = model.forward_head(last)
        if TOKENS in self.lessons:
            logits = logits_of_places(model, last, "--distill tokens: --teacher_model")
            said[TOKENS] = logits.softmax(-1).movedim(-1, 1)
        return said


def stage_at(model: nn.Module, stride: int) -> int:
    """The last of a model's stages whose places are at most `stride` pixels apart; else its last one."""
    stages = [number for number, info in enumerate(model.feature_info) if info["reduction"] <= stride]
    return stages[-1] if stages else len(model.feature_info) - 1


def channel_axis(features: Tensor, width: int, option: str) -> int:
    """The axis, 1 or 3, of a map's `width` channels. UsageError, naming the option, if `features` are no map."""
    if features.ndim == 4:
        for axis in (1, 3):
            if features.shape[axis] == width:
                return axis
    raise UsageError(f"{option}: its last features are no map of places; choose a model with strided stages")


def logits_of_places(model: nn.Module, features: Tensor, option: str) -> Tensor:
    """A model's last map -> (B, H, W, classes) float32: what it makes of a whole image's mean, made of each place.

    UsageError, naming the option, if `features` are no map.
    """
    axis = channel_axis(features, model.num_features, option)
    features = features.movedim(axis, -1)
    places = features.flatten(0, 2)[:, None, None]  # each a map of one place
    return model.forward_head(places.movedim(-1, axis)).float().view(*features.shape[:3], -1)


# -- the student ---------------------------------------------------------------------------------------------------


class TaughtOutputs:
    """What a student is given so that in training it returns {"logits": (B, C), LESSON: {stride: (B, H, W, C)}}.

    The linear layers are in `model.auxiliary`, so the other weights keep their names, and saved weights leave these out
    (`models.weights.AUXILIARY`). answering: the stages whose maps they read, by their strides.
    """

    auxiliary: nn.ModuleDict
    answering: dict[int, int]

    def forward(self, x: Tensor) -> Any:
        if not self.training:
            return super().forward(x)
        last, maps = self.forward_intermediates(x, indices=list(self.answering.values()))
        if last.shape == maps[-1].shape:  # the last map, with its norm, whose statistics must count a batch once
            maps = [*maps[:-1], last]
        found = dict(zip(self.answering, maps, strict=True))
        answers = {
            lesson: {stride: layers[str(stride)](values.movedim(1, -1)) for stride, values in found.items()}
            for lesson, layers in self.auxiliary.items()
        }
        return {"logits": self.forward_head(last), **answers}


def add_answers(model: nn.Module, teacher: DenseTeacher, num_classes: int) -> nn.Module:
    """Give a student a linear layer for each of its maps at `STRIDES` and each lesson. UsageError if it has no map."""
    reductions = [info["reduction"] for info in getattr(model, "feature_info", ())]
    strides = [stride for stride in STRIDES if stride in reductions]
    if not strides or not hasattr(model, "forward_intermediates"):
        raise UsageError(f"--distill: --model {type(model).__name__} shows no map at stride 16 or 32; leave it out")
    model.answering = {stride: stage_at(model, stride) for stride in strides}
    widths = {FEATURES: teacher.widths, TOKENS: dict.fromkeys(STRIDES, num_classes)}
    model.auxiliary = nn.ModuleDict()
    for lesson in sorted(teacher.lessons - {LOGITS}):
        model.auxiliary[lesson] = nn.ModuleDict(
            {
                str(stride): nn.Linear(model.feature_info[stage]["num_chs"], widths[lesson][stride])
                for stride, stage in model.answering.items()
            }
        )
    for name, value in model.auxiliary.named_parameters():
        nn.init.zeros_(value) if name.endswith("bias") else nn.init.trunc_normal_(value, std=0.02)
    kind = type(model)
    model.__class__ = type(kind.__name__, (TaughtOutputs, kind), {})
    return model


# -- how far they are from each other ------------------------------------------------------------------------------


def resized(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Maps (B, C, H, W) for another grid, in float32: bilinear, under a wider triangle where the grid is coarser."""
    if maps.shape[2:] == tuple(size):
        return maps.float()
    rows, columns = (shares(*pair).to(maps.device) for pair in zip(maps.shape[2:], size, strict=True))
    with torch.autocast(maps.device.type, enabled=False):
        return rows @ maps.float() @ columns.T


@cache
def shares(cells: int, places: int) -> Tensor:
    """How much of each of a row's cells is in each of its places: (places, cells) float32, whose rows sum to 1."""
    scale = cells / places
    centers = (torch.arange(places, dtype=torch.float64)[:, None] + 0.5) * scale
    distances = (torch.arange(cells, dtype=torch.float64) + 0.5 - centers).abs()
    weights = (1 - distances / max(scale, 1)).clamp(min=0)
    return (weights / weights.sum(1, keepdim=True)).float()


def feature_distance(answers: Tensor, maps: Tensor, kind: str, shares: Tensor | float = 1.0) -> Tensor:
    """The mean distance of answers (B, H, W, C) from a teacher's maps (B, C, h, w) at the same places.

    kind: of --distill_feature_loss; smooth_l1 is that of feature distillation (Wei et al., arXiv 2205.14141, 3.2),
    which takes out the scale of the teacher's features. shares: what each place counts for, (B, H, W).
    """
    answers, wanted = answers.float(), resized(maps, answers.shape[1:3]).movedim(1, -1)
    if kind == "cosine":
        distances = 1 - F.cosine_similarity(answers, wanted, dim=-1)
    else:
        distances = F.smooth_l1_loss(answers, F.layer_norm(wanted, wanted.shape[-1:]), reduction="none").mean(-1)
    return (distances * shares).mean()
