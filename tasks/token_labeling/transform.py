"""A map through the augmentation of its image: crop, flip, and what RandAugment shears, shifts and turns.

Places are given in fractions of an image, (x, y) from its top left corner; a map (H, W) covers the whole image, its
cell (row, column) the part from column/W to (column+1)/W and row/H to (row+1)/H.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.data.auto_augment import AugmentOp, AutoAugment, RandAugment
from torch import Tensor
from torchvision.ops import roi_align
from torchvision.transforms import Compose, RandomHorizontalFlip

from runtime.errors import UsageError
from tasks.classification.augmentation import IDENTITY, MOVES, move, operations_of
from tasks.classification.transforms import RandomCrop


class RecordedCrop(RandomCrop):
    """A random crop which remembers its last one: `box`, left, top, right, bottom."""

    def get_params(self, img: Any, scale: Any, ratio: Any) -> tuple[int, int, int, int]:
        top, left, height, width = drawn = super().get_params(img, scale, ratio)
        self.box = (left / img.width, top / img.height, (left + width) / img.width, (top + height) / img.height)
        return drawn


class RecordedFlip(RandomHorizontalFlip):
    """torchvision's flip, which remembers whether it did."""

    def forward(self, img: Any) -> Any:
        result = super().forward(img)
        self.flipped = result is not img
        return result


class RecordedMove:
    """A geometric operation of timm, which adds to `log` where each place of its output comes from."""

    def __init__(self, name: str, function: Any, log: list) -> None:
        self.name, self.function, self.log = name, function, log

    def __call__(self, img: Any, amount: float, **kwargs: Any) -> Any:
        self.log.append(move(self.name, amount, img.size))
        return self.function(img, amount, **kwargs)


class MapTransform:
    """An image's augmentation as classification has it, drawing the same numbers, with what it did to places.

    Samples get "box": of the crop; "flip"; "moves": (n, 2, 3), what came after the flip, first to last. UsageError if
    --aa mixes several views of an image.
    """

    def __init__(self, transform: Compose, policy: str | None) -> None:
        self.transform, self.log, self.flip, self.depth = transform, [], None, 0
        for part in transform.transforms:
            if isinstance(part, RandomCrop):
                part.__class__, self.crop = RecordedCrop, part
            elif isinstance(part, RandomHorizontalFlip):
                part.__class__, self.flip = RecordedFlip, part
            elif isinstance(part, RandAugment):
                self._record(operations_of(part), part.num_layers)
            elif isinstance(part, AutoAugment):
                self._record(operations_of(part), max(map(len, part.policy)))
            elif "Aug" in type(part).__name__:
                raise UsageError(f"--aa {policy} blends several views of an image, no place of which is one place")
        if not hasattr(self, "crop"):
            raise UsageError("token labelling needs crops that are resized: --input_size above 32")

    def _record(self, ops: list[AugmentOp], depth: int) -> None:
        self.depth = depth
        for op in ops:
            if op.name in MOVES and not isinstance(op.aug_fn, RecordedMove):
                op.aug_fn = RecordedMove(op.name, op.aug_fn, self.log)

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        self.log.clear()
        image = self.transform(sample["image"])
        moves = self.log + [IDENTITY] * (self.depth - len(self.log))
        return {
            **sample,
            "image": image,
            "box": np.array(self.crop.box, np.float32),
            "flip": self.flip is not None and self.flip.flipped,
            "moved": bool(self.log),
            "moves": np.array(moves, np.float32).reshape(-1, 2, 3),
        }


# -- on the device -------------------------------------------------------------------------------------------------


def dense_map(values: Tensor, indices: Tensor, num_classes: int) -> Tensor:
    """Likeliest classes (B, k, H, W), logits or log probabilities -> all probabilities (B, C, H, W), the others 0."""
    shares = values.float().softmax(1)
    empty = shares.new_zeros(len(shares), num_classes, *shares.shape[2:])
    return empty.scatter_(1, indices.long(), shares)


def crop_maps(maps: Tensor, batch: dict[str, Any], grid: tuple[int, int]) -> Tensor:
    """What an augmented image shows at each place of a grid: means (B, C, rows, columns) of the maps (B, C, H, W).

    A place's classes sum to 1, or to the part of it that shows the image, where that was moved out of its frame.

    batch: "box" (B, 4), "flip" (B,), "moves" (B, n, 2, 3), and "moved", the numbers of the samples that have any.
    """
    size = maps.new_tensor([maps.shape[3], maps.shape[2]]).repeat(2)
    box, flip = batch["box"].to(maps.dtype), batch["flip"]
    number = torch.arange(len(maps), device=maps.device, dtype=maps.dtype)
    regions = torch.cat([number[:, None], box * size], 1)
    result = roi_align(maps, regions, grid, aligned=True)
    result = torch.where(flip[:, None, None, None], result.flip(3), result)
    if batch["moved"]:
        chosen = torch.tensor(batch["moved"], device=maps.device)
        moved = moved_maps(maps[chosen], box[chosen], flip[chosen], batch["moves"][chosen].to(maps.dtype), grid)
        result = result.index_copy(0, chosen, moved)
    return result


def moved_maps(maps: Tensor, box: Tensor, flip: Tensor, moves: Tensor, grid: tuple[int, int]) -> Tensor:
    """The same of images that were moved after crop and flip, where `roi_align`, which has upright boxes, cannot.

    Each place is the mean of as many points as a crop of the whole image has cells there; points that lie outside the
    frame before any of the moves show its filling, and count as nothing.
    """
    counts = [-(-cells // places) for cells, places in zip(maps.shape[2:], grid, strict=True)]
    y, x = (
        (torch.arange(n * k, device=maps.device, dtype=maps.dtype) + 0.5) / (n * k)
        for n, k in zip(grid, counts, strict=True)
    )
    points = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).expand(len(maps), -1, -1, -1)
    inside = points.new_ones(points.shape[:3], dtype=torch.bool)
    for number in reversed(range(moves.shape[1])):
        linear, shift = moves[:, number, None, None, :, :2], moves[:, number, None, None, :, 2]
        points = (linear @ points[..., None])[..., 0] + shift
        inside = inside & ((points >= 0) & (points < 1)).all(-1)
    x, y = points.unbind(-1)
    x = torch.where(flip[:, None, None], 1 - x, x)
    left, top, right, bottom = (side[:, None, None] for side in box.unbind(1))
    places = torch.stack([left + x * (right - left), top + y * (bottom - top)], -1) * 2 - 1
    sampled = F.grid_sample(maps, places, padding_mode="border", align_corners=False) * inside[:, None]
    return F.avg_pool2d(sampled, counts)
