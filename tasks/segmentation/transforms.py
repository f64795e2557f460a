"""Image and label map, resized, cropped and flipped together. Random numbers: torch's."""

from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional

from .data import IGNORED

PADDING = (124, 116, 104)
"""ImageNet's mean colour, which is zero once normalised."""

TRIES = 10


def fitted(size: tuple[int, int], longest: int, shortest: int) -> tuple[int, int]:
    """The largest (height, width) in the proportions of `size` within `longest` x `shortest`, either way round."""
    scale = min(longest / max(size), shortest / min(size))
    return tuple(max(int(side * scale + 0.5), 1) for side in size)


class EvalTransform:
    """Resize the image, not the labels, to fit `longest` x `shortest`."""

    def __init__(self, longest: int = 2048, shortest: int = 512) -> None:
        self.bounds = longest, shortest

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        image: Image.Image = sample["image"]
        image = functional.resize(image, list(fitted(image.size[::-1], *self.bounds)))
        labels = torch.from_numpy(np.array(sample["labels"], dtype=np.int64))
        return {**sample, "image": functional.pil_to_tensor(image), "labels": labels}


class TrainTransform:
    """Resize by a random factor, crop, flip, distort colours, pad to the crop.

    crop: side in pixels; ratio: bounds of the factor; most: a crop of which one class takes more than this share is
    drawn again, up to ten times.
    """

    def __init__(
        self,
        crop: int = 512,
        bounds: tuple[int, int] = (2048, 512),
        ratio: tuple[float, float] = (0.5, 2.0),
        most: float = 0.75,
    ) -> None:
        self.crop, self.bounds, self.ratio, self.most = crop, bounds, ratio, most
        self.distort = v2.RandomPhotometricDistort(
            brightness=(1 - 32 / 255, 1 + 32 / 255), contrast=(0.5, 1.5), saturation=(0.5, 1.5), hue=(-0.1, 0.1), p=0.5
        )

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        factor = torch.empty(()).uniform_(*self.ratio).item()
        image, labels = sample["image"], sample["labels"]
        size = list(fitted(image.size[::-1], *(int(bound * factor) for bound in self.bounds)))
        image = functional.pil_to_tensor(functional.resize(image, size))
        labels = functional.pil_to_tensor(functional.resize(labels, size, InterpolationMode.NEAREST))[0]
        top, left = self._place(labels)
        image, labels = (x[..., top : top + self.crop, left : left + self.crop] for x in (image, labels))
        if torch.rand(()) < 0.5:
            image, labels = image.flip(-1), labels.flip(-1)
        image = self.distort(image)
        height, width = labels.shape
        padded = torch.tensor(PADDING, dtype=torch.uint8)[:, None, None].repeat(1, self.crop, self.crop)
        padded[:, :height, :width] = image
        target = torch.full((self.crop, self.crop), IGNORED, dtype=torch.int64)
        target[:height, :width] = labels
        return {**sample, "image": padded, "labels": target}

    def _place(self, labels: torch.Tensor) -> tuple[int, int]:
        for attempt in range(TRIES + 1):
            top, left = (int(torch.randint(max(side - self.crop, 0) + 1, ())) for side in labels.shape)
            part = labels[top : top + self.crop, left : left + self.crop]
            counts = torch.bincount(part[part != IGNORED].flatten().int())
            if attempt == TRIES or ((counts > 0).sum() > 1 and counts.max() < self.most * counts.sum()):
                break
        return top, left
