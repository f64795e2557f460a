"""From an image to the pixels that a classifier sees."""

from collections.abc import Callable
from typing import Any

from timm.data import create_transform
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision import transforms

from models.pixels import Pixels, pixels_of
from runtime.errors import UsageError


class RandomCrop(RandomResizedCropAndInterpolation):
    """timm's random crop, of one pixel at least: of an image of 1 to 3 pixels timm may draw a crop that has none."""

    def get_params(self, img: Any, scale: Any, ratio: Any) -> tuple[int, int, int, int]:
        top, left, height, width = RandomResizedCropAndInterpolation.get_params(img, scale, ratio)
        return min(top, img.height - 1), min(left, img.width - 1), max(height, 1), max(width, 1)


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
    return transform


def eval_transform(options: Any) -> transforms.Compose:
    """Resize so that the centre crop is `crop_pct` of the side: PIL image -> (3, S, S) uint8."""
    pixels = pixels_for(options)
    return create_transform(
        input_size=options.input_size,
        is_training=False,
        interpolation=pixels.interpolation,
        normalize=False,
        crop_pct=pixels.crop_pct,
        crop_mode=pixels.crop_mode,
    )


def pixels_for(options: Any) -> Pixels:
    """What images are normalised with, and how evaluation resizes and crops them: as the model wants unless given."""
    crop_pct = options.crop_pct or (1.0 if _at_cifar_size(options.data_set, options.input_size) else None)
    given = {"mean": options.mean, "std": options.std, "interpolation": options.interpolation}
    return pixels_of(options.model, crop_pct=crop_pct, **given)


def _at_cifar_size(data_set: str, input_size: int) -> bool:
    return data_set == "CIFAR" and input_size <= 32


class ImageTransform:
    """Transforms a sample's image, and leaves its other keys as they are."""

    def __init__(self, transform: Callable[[Any], Any]) -> None:
        self.transform = transform

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        return {**sample, "image": self.transform(sample["image"])}
