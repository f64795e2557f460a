"""What a model wants its images to be. Its `pretrained_cfg` says so, timm reads it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, resolve_data_config
from timm.models import get_pretrained_cfg
from timm.task import DistillationTeacher
from torch import Tensor, nn


@dataclass(frozen=True)
class Pixels:
    """Mean and deviation per channel, in 0..1; how images are resized; what evaluation crops of the resized side."""

    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD
    interpolation: str = "bicubic"
    crop_pct: float = 224 / 256
    crop_mode: str = "center"


def pixels_of(
    name: str,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    interpolation: str | None = None,
    crop_pct: float | None = None,
) -> Pixels:
    """What the model called `name` wants, but for what is given."""
    given = {"mean": mean, "std": std, "interpolation": interpolation, "crop_pct": crop_pct}
    cfg = get_pretrained_cfg(name, allow_unregistered=True)
    found = resolve_data_config(given, pretrained_cfg=cfg.to_dict() if cfg else {})
    return Pixels(
        tuple(found["mean"]), tuple(found["std"]), found["interpolation"], found["crop_pct"], found["crop_mode"]
    )


def normalize(images: Tensor, pixels: Pixels) -> Tensor:
    """Images (B, 3, H, W) with mean 0 and deviation 1, from uint8; floats are taken for normalised."""
    if images.dtype != torch.uint8:
        return images
    mean, std = _statistics(pixels, images.device)
    return images.float().div_(255).sub_(mean).div_(std)


def denormalize(images: Tensor, pixels: Pixels) -> Tensor:
    """Undo `normalize`: (B, 3, H, W) float32 in 0..1."""
    mean, std = _statistics(pixels, images.device)
    return (images.float() * std + mean).clamp_(0, 1)


@cache
def _statistics(pixels: Pixels, device: torch.device) -> tuple[Tensor, Tensor]:
    values = torch.tensor([pixels.mean, pixels.std], device=device)[..., None, None]
    return values[0], values[1]


class Teacher(nn.Module):
    """A model in evaluation mode that is given images meant for another one, and makes of them what it is used to.

    student: what the images are normalised with. side: of the square that they are resized to; None: as they are.
    """

    def __init__(self, model: nn.Module, student: Pixels, device: torch.device, side: int | None = None) -> None:
        super().__init__()
        self.teacher, self.side = DistillationTeacher(model, device=device), side
        self.student = [torch.tensor(values, device=device).view(1, -1, 1, 1) for values in (student.mean, student.std)]

    def shown(self, images: Tensor) -> Tensor:
        """What the teacher sees of images (B, 3, H, W)."""
        if self.side is not None and images.shape[2:] != (self.side, self.side):
            images = F.interpolate(images, (self.side, self.side), mode="bicubic", antialias=True)
        return self.teacher.normalize_input(images, *self.student)

    def forward(self, images: Tensor) -> Tensor:
        return self.teacher(self.shown(images))
