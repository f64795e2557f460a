"""Image, boxes and masks, resized and flipped together. Random numbers: torch's."""

from typing import Any

import torch
import torch.nn.functional as F
from torchvision.transforms.v2 import functional

from tasks.segmentation.transforms import fitted


class Transform:
    """Resize to fit `longest` x `shortest` in the image's own proportions; in training, mirror every other one."""

    def __init__(self, longest: int = 1333, shortest: int = 800, flip: float = 0.0) -> None:
        self.bounds, self.flip = (longest, shortest), flip

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        image = sample["image"]
        old_width, old_height = image.size
        height, width = fitted((old_height, old_width), *self.bounds)
        image = functional.pil_to_tensor(functional.resize(image, [height, width]))
        boxes = sample["boxes"] * torch.tensor([width / old_width, height / old_height] * 2)
        masks = sample.get("masks")
        if masks is not None:
            masks = (
                F.interpolate(masks[:, None], size=(height, width))[:, 0]
                if len(masks)
                else masks.new_zeros(0, height, width)
            )
        if torch.rand(()) < self.flip:
            image = image.flip(-1)
            boxes = torch.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], dim=1)
            masks = None if masks is None else masks.flip(-1)
        return {**sample, "image": image, "boxes": boxes, **({} if masks is None else {"masks": masks})}
