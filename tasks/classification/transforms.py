"""From an image to the pixels that a classifier sees."""

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import AutoAugment, RandAugment
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import get_image_size, pil_to_tensor, to_pil_image
from torchvision.transforms.v2 import functional

from models.pixels import Pixels, pixels_of
from runtime.errors import UsageError

from .shifts import speed_up


class RandomCrop(RandomResizedCropAndInterpolation):
    """timm's random crop, resized by torch, which takes a fourth of Pillow's time, and of one pixel at least.

    Of an image of 1 to 3 pixels timm may draw a crop that has none.
    """

    def get_params(self, img: Any, scale: Any, ratio: Any) -> tuple[int, int, int, int]:
        top, left, height, width = RandomResizedCropAndInterpolation.get_params(img, scale, ratio)
        across, down = get_image_size(img)
        return min(top, down - 1), min(left, across - 1), max(height, 1), max(width, 1)

    def __call__(self, img: Image.Image | Tensor) -> Image.Image:
        return as_image(self.cropped(img))

    def cropped(self, img: Image.Image | Tensor) -> Image.Image | Tensor:
        """Crop and resize; what torch has resized stays a tensor (3, S, S)."""
        top, left, height, width = self.get_params(img, self.scale, self.ratio)
        drawn = isinstance(self.interpolation, list | tuple)
        interpolation = random.choice(self.interpolation) if drawn else self.interpolation
        return resized(functional.crop(img, top, left, height, width), self.size, interpolation)


class Resize(transforms.Resize):
    """torchvision's, of an image by torch: its shorter side gets `size` pixels."""

    def forward(self, img: Image.Image | Tensor) -> Image.Image:
        return as_image(resized(img, [self.size], self.interpolation))


def as_image(image: Image.Image | Tensor) -> Image.Image:
    """Return a tensor (3, H, W) uint8 as an image, and an image as it is."""
    return to_pil_image(image) if isinstance(image, Tensor) else image


def resized(image: Image.Image | Tensor, size: Sequence[int], interpolation: InterpolationMode) -> Image.Image | Tensor:
    """Resize an RGB image to (height, width), or (shorter side,), as Pillow does but for the rounding.

    torch takes a fourth of Pillow's time. Nearest pixels and Lanczos' filter are left to Pillow.
    """
    pillow = interpolation.value not in ("bilinear", "bicubic")
    if pillow:
        return functional.resize(as_image(image), list(size), interpolation, antialias=True)
    pixels = image if isinstance(image, Tensor) else pil_to_tensor(image)
    rows = pixels[None].contiguous(memory_format=torch.channels_last)  # as decoded, and resized faster
    return functional.resize(rows, list(size), interpolation, antialias=True)[0]


def train_transform(options: Any) -> transforms.Compose:
    """Random crop, flip and RandAugment: PIL image -> (3, S, S) uint8. `Classification.preprocess` does the rest.

    UsageError if timm does not know the policy of --aa.
    """
    try:
        transform = create_transform(
            input_size=options.input_size,
            is_training=True,
            scale=tuple(options.scale),
            hflip=options.hflip,
            color_jitter=options.color_jitter,
            auto_augment=None if options.aa in (None, "", "none", "null") else options.aa,
            interpolation=options.train_interpolation,
            normalize=False,
        )
    except (AssertionError, LookupError, ValueError) as error:  # all else has been checked
        known = "rand-m9-mstd0.5-inc1, augmix-m3, original, v0, 3a or none"
        raise UsageError(f"--aa {options.aa} is not a policy of timm; try {known}") from error
    if _at_cifar_size(options.data_set, options.input_size):  # as published: shifted, not rescaled
        transform.transforms[0] = transforms.RandomCrop(options.input_size, padding=4)
    elif isinstance(transform.transforms[0], RandomResizedCropAndInterpolation):
        transform.transforms[0].__class__ = RandomCrop
    for part in transform.transforms:
        if isinstance(part, RandAugment):
            speed_up(part.ops)
        elif isinstance(part, AutoAugment):
            speed_up([op for ops in part.policy for op in ops])
    return transform


def eval_transform(options: Any) -> transforms.Compose:
    """Resize so that the centre crop is `crop_pct` of the side: PIL image -> (3, S, S) uint8."""
    pixels = pixels_for(options)
    transform = create_transform(
        input_size=options.input_size,
        is_training=False,
        interpolation=pixels.interpolation,
        normalize=False,
        crop_pct=pixels.crop_pct,
        crop_mode=pixels.crop_mode,
    )
    first = transform.transforms[0]
    if options.eval_resize == "torch" and isinstance(first, transforms.Resize) and isinstance(first.size, int):
        first.__class__ = Resize
    return transform


def pixels_for(options: Any) -> Pixels:
    """What images are normalised with, and how evaluation resizes and crops them: as the model wants unless given."""
    crop_pct = options.crop_pct or (1.0 if _at_cifar_size(options.data_set, options.input_size) else None)
    given = {"mean": options.mean, "std": options.std, "interpolation": options.interpolation}
    return pixels_of(options.model, crop_pct=crop_pct, **given)


def _at_cifar_size(data_set: str, input_size: int) -> bool:
    return data_set == "CIFAR" and input_size <= 32


class ImageTransform:
    """Transforms a sample's image, and leaves its other keys as they are.

    takes_pixels: whether the image may be a tensor (3, H, W), too.
    """

    def __init__(self, transform: Callable[[Any], Any]) -> None:
        self.transform = transform
        self.takes_pixels = isinstance(getattr(transform, "transforms", [None])[0], RandomCrop | Resize)

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        return {**sample, "image": self.transform(sample["image"])}
