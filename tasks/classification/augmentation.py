"""Augmentation that workers draw and the device does, in batches (`--augment_on device`).

A worker crops an image and draws all that is random about it, the same numbers as if it went on to do it; what it would
do is noted down in steps. The device does the steps of a batch, images of the same operation together. The operations
are Pillow's, of which timm's policies consist, up to a rounding; sampling between pixels, torch's bicubic kernel is a
little softer than Pillow's.
"""

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from timm.data.auto_augment import AugmentOp, AutoAugment, RandAugment
from torch import Tensor
from torchvision.transforms import ColorJitter, Compose, RandomHorizontalFlip
from torchvision.transforms.functional import pil_to_tensor
from torchvision.transforms.v2 import functional

from runtime.errors import UsageError

from .transforms import RandomCrop

Step = tuple[str, tuple[float, ...]]
"""An operation of `OPERATIONS`, and the numbers that it takes for one image."""

IDENTITY = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0))
MOVES = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY", "TranslateXRel", "TranslateYRel")


def move(name: str, amount: float, size: tuple[int, int]) -> tuple[tuple[float, ...], ...]:
    """The affine map ((a, b, c), (d, e, f)) from a place in a square operation's output to that in its input.

    Places are (x, y) from the top left corner, in fractions of the image.

    amount: degrees against the clock, a shear, or how far the content moves to the left or up, in pixels or (Rel) as a
    part of the image.
    """
    if name == "Rotate":
        cos, sin = math.cos(math.radians(amount)), math.sin(math.radians(amount))
        return (cos, -sin, 0.5 - 0.5 * (cos - sin)), (sin, cos, 0.5 - 0.5 * (sin + cos))
    along = 0 if "X" in name else 1
    rows = [list(row) for row in IDENTITY]
    if name.startswith("Shear"):
        rows[along][1 - along] = amount
    else:
        rows[along][2] = amount if name.endswith("Rel") else amount / size[along]
    return tuple(rows[0]), tuple(rows[1])


def operations_of(part: RandAugment | AutoAugment) -> list[AugmentOp]:
    """All operations that a policy may draw."""
    return part.ops if isinstance(part, RandAugment) else [op for ops in part.policy for op in ops]


# -- in a worker ---------------------------------------------------------------------------------------------------


class Noted:
    """Stands in for an operation of timm's policies: adds to the steps what it would do.

    Args:
        name: what timm calls it.
        side: of the images, in pixels.
    """

    def __init__(self, name: str, side: int) -> None:
        self.name, self.side = name.removesuffix("Increasing").removesuffix("Original"), side

    def __call__(self, steps: list[Step], amount: float = 0.0, **kwargs: Any) -> list[Step]:
        if self.name in MOVES:
            kernel = kwargs["resample"]
            kernel = random.choice(kernel) if isinstance(kernel, list | tuple) else kernel
            across, down = move(self.name, amount, (self.side, self.side))
            return [*steps, (f"move {kernel.name.lower()}", (*across, *down, *kwargs["fillcolor"]))]
        if self.name == "Desaturate":
            return [*steps, ("Color", (min(1.0, max(0.0, 1.0 - amount)),))]
        return [*steps, (self.name, (float(amount),))]


class NotedJitter(ColorJitter):
    """torchvision's, without hue, which notes down what it would do."""

    def forward(self, steps: list[Step]) -> list[Step]:
        order, *amounts, _ = self.get_params(self.brightness, self.contrast, self.saturation, None)
        drawn = list(zip(("Brightness", "Contrast", "Color"), amounts, strict=True))
        chosen = [drawn[number] for number in order.tolist() if number < len(drawn)]
        return [*steps, *((name, (amount,)) for name, amount in chosen if amount is not None)]


class DrawnTransform:
    """An image's crop as (3, S, S) uint8, with "flip", whether it is to be mirrored, and "steps", what follows.

    Args:
        transform: what does the same in the worker.
        policy: --aa, for messages.
        side: S.

    Raises:
        UsageError: the device cannot do what the policy does.
    """

    def __init__(self, transform: Compose, policy: str | None, side: int) -> None:
        self.crop, *parts = transform.transforms
        self.takes_pixels, self.flip, self.drawing = isinstance(self.crop, RandomCrop), 0.0, []
        for part in parts:
            if isinstance(part, RandomHorizontalFlip):
                self.flip = part.p
            elif isinstance(part, RandAugment | AutoAugment):
                self._note(operations_of(part), policy, side)
                self.drawing.append(part)
            elif isinstance(part, ColorJitter):
                part.__class__ = NotedJitter
                self.drawing.append(part)
            elif "Aug" in type(part).__name__:
                raise UsageError(f"--aa {policy} blends several views of an image; choose --augment_on worker")

    @staticmethod
    def _note(ops: Sequence[AugmentOp], policy: str | None, side: int) -> None:
        for op in ops:
            noted = Noted(op.name, side)
            if noted.name not in (*OPERATIONS, *MOVES, "Desaturate"):
                raise UsageError(f"--aa {policy} has {op.name}, which no device does; choose --augment_on worker")
            op.aug_fn = noted

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        image, steps = sample["image"], []
        pixels = self.crop.cropped(image) if self.takes_pixels else self.crop(image)
        flip = self.flip > 0 and bool(torch.rand(1) < self.flip)
        for part in self.drawing:
            steps = part(steps)
        pixels = pil_to_tensor(pixels) if isinstance(pixels, Image.Image) else pixels
        return {**sample, "image": pixels, "flip": flip, "steps": steps}


def grouped(flips: Sequence[bool], steps: Sequence[Sequence[Step]]) -> dict[str, Any]:
    """Put together what is to be done to the images of a batch.

    Returns:
        "flip": (n,) int64, the numbers of the images to mirror; "steps": per step, by operation, "images", (n,) int64,
        and "values", (n, numbers of the operation) float32.
    """
    flipped = torch.tensor([number for number, flip in enumerate(flips) if flip], dtype=torch.int64)
    layers = []
    for layer in range(max(map(len, steps), default=0)):
        groups: dict[str, list[tuple[int, tuple[float, ...]]]] = {}
        for number, of_image in enumerate(steps):
            if layer < len(of_image):
                name, values = of_image[layer]
                groups.setdefault(name, []).append((number, values))
        layers.append(
            {
                name: {"images": torch.tensor([n for n, _ in group]), "values": torch.tensor([v for _, v in group])}
                for name, group in sorted(groups.items())
            }
        )
    return {"flip": flipped, "steps": layers}


# -- on the device -------------------------------------------------------------------------------------------------


def augment(images: Tensor, drawn: dict[str, Any]) -> Tensor:
    """Do what workers have drawn.

    Args:
        images: (B, 3, S, S) uint8.
        drawn: as `grouped` returns it, on the same device.

    Returns:
        (B, 3, S, S) uint8; `images` stays as it is.
    """
    images = images.index_copy(0, drawn["flip"], images[drawn["flip"]].flip(3))
    for layer in drawn["steps"]:
        for name, group in layer.items():
            values = group["values"][..., None, None, None]
            changed = OPERATIONS[name](images[group["images"]], values)
            images.index_copy_(0, group["images"], changed.to(torch.uint8))
    return images


def _blend(degenerate: Tensor, images: Tensor, amount: Tensor) -> Tensor:
    """Pillow's enhancement: 0 gives the degenerate images (float), 1 the images, more exaggerates them."""
    return (degenerate + amount * (images - degenerate)).clamp_(0, 255)


def _grey(images: Tensor) -> Tensor:
    """(n, 3, S, S) uint8 -> (n, 1, S, S) float32 of whole numbers, as Pillow converts to L."""
    red, green, blue = images.int().split(1, 1)
    return ((19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16).float()


def _contrast(images: Tensor, values: Tensor) -> Tensor:
    mean = (_grey(images).mean((1, 2, 3), keepdim=True) + 0.5).floor()
    return _blend(mean, images, values[:, 0])


def _sharpness(images: Tensor, values: Tensor) -> Tensor:
    whole = images.float()
    smooth, inner = whole.clone(), whole[..., 1:-1, 1:-1]
    smooth[..., 1:-1, 1:-1] = ((F.avg_pool2d(whole, 3, 1, divisor_override=1) + 4 * inner) / 13 + 0.5).floor()
    return _blend(smooth, whole, values[:, 0])


def _posterize(images: Tensor, values: Tensor) -> Tensor:
    return images & (256 - 2 ** (8 - values[:, 0].int().clamp(max=8))).to(torch.uint8)


def _solarize(images: Tensor, values: Tensor) -> Tensor:
    return torch.where(images < values[:, 0], images, 255 - images)


def _solarize_add(images: Tensor, values: Tensor) -> Tensor:
    return torch.where(images < 128, (images + values[:, 0]).clamp_(max=255), images)


def _moved(images: Tensor, values: Tensor, kernel: str) -> Tensor:
    matrix = values[:, :6, 0, 0, 0].unflatten(1, (2, 3))
    linear, shift = matrix[..., :2], matrix[..., 2:]
    grid = F.affine_grid(torch.cat([linear, linear.sum(2, True) + 2 * shift - 1], 2), images.shape, align_corners=False)
    moved = F.grid_sample(images.float(), grid, kernel, "border", align_corners=False).clamp_(0, 255)
    inside = ((grid >= -1) & (grid < 1)).all(3)[:, None]
    return torch.where(inside, moved + 1e-3, values[:, 6:, 0])  # Pillow cuts off fractions, too


OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "AutoContrast": lambda images, values: functional.autocontrast(images),
    "Equalize": lambda images, values: functional.equalize(images),
    "Invert": lambda images, values: 255 - images,
    "Posterize": _posterize,
    "Solarize": _solarize,
    "SolarizeAdd": _solarize_add,
    "Brightness": lambda images, values: _blend(images.new_zeros(()), images, values[:, 0]),
    "Color": lambda images, values: _blend(_grey(images), images, values[:, 0]),
    "Contrast": _contrast,
    "Sharpness": _sharpness,
    "move bilinear": lambda images, values: _moved(images, values, "bilinear"),
    "move bicubic": lambda images, values: _moved(images, values, "bicubic"),
}
"""Images (n, 3, S, S) uint8 and each one's numbers (n, k, 1, 1, 1) -> (n, 3, S, S) in 0..255, with fractions.

The numbers: of a move, its affine map and the colour of what comes from outside; of all others, one amount.
"""
