"""From any image file to the picture that a model sees."""

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data.transforms import str_to_interp_mode
from torch import Tensor
from torchvision.transforms.functional import center_crop, resize

from errors import UsageError
from models.pixels import Pixels, normalize

SMALLEST_SIDE, LARGEST_SIDE = 8, 8192
"""Pixels: scikit-learn's digits are 8 wide; a decoded image of the largest size takes 200 MB."""

LONGEST_PROPORTION = 4
"""Longer images lose their ends before they are resized, so that a long, thin one does not become huge."""

BACKGROUND = "white"
SUFFIXES = frozenset(Image.registered_extensions())


def open_image(path: str | Path) -> Image.Image:
    """The image in a file as upright 8-bit RGB, whatever its mode: transparent parts on white, 16 bits scaled to 8.

    UsageError if it is no image, damaged, or a side is out of 8..8192 pixels; the pixels are decoded only after that.
    """
    name = Path(path).name
    try:
        with Image.open(path) as image:
            check_sides(name, *image.size)
            return _rgb(ImageOps.exif_transpose(image))
    except UsageError:
        raise
    except Image.DecompressionBombError as error:
        raise UsageError(f"{name} has too many pixels; at most {LARGEST_SIDE} a side are read, shrink it") from error
    except IsADirectoryError as error:
        raise UsageError(f"{name} is a folder, not an image") from error
    except FileNotFoundError as error:
        raise UsageError(f"{path} does not exist") from error
    except Exception as error:
        # A broken file makes Pillow raise anything from OSError to struct.error.
        raise UsageError(f"{name} is no image that can be read ({type(error).__name__}); use PNG or JPEG") from error


def check_sides(name: str, width: int, height: int) -> None:
    """UsageError if an image called `name` is too small or too large."""
    if min(width, height) < SMALLEST_SIDE:
        raise UsageError(f"{name} has {width}x{height} pixels; at least {SMALLEST_SIDE} a side are needed")
    if max(width, height) > LARGEST_SIDE:
        raise UsageError(f"{name} has {width}x{height} pixels; at most {LARGEST_SIDE} a side are read, shrink it")


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        return _eight_bits(image).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, BACKGROUND), image)
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 or 32 bits, or floats: 0..65535 (or 0..1) becomes 0..255, other ranges are stretched."""
    values = np.asarray(image, dtype=np.float64)
    values = np.nan_to_num(values, posinf=0, neginf=0)
    low, high = values.min(), values.max()
    limit = 1.0 if image.mode == "F" and high <= 1 else 65535.0
    if low >= 0 and high <= limit:
        low, high = 0.0, limit
    return Image.fromarray(((values - low) / (high - low) * 255).round().astype(np.uint8))


def view_of(image: Image.Image, side: int, pixels: Pixels) -> Image.Image:
    """The square of `side` pixels that evaluation crops out of an RGB image: `crop_pct` of its shorter side."""
    shorter = min(image.size)
    longest = LONGEST_PROPORTION * shorter
    if max(image.size) > longest:
        image = center_crop(image, [min(edge, longest) for edge in reversed(image.size)])
    resized = resize(image, math.floor(side / pixels.crop_pct), str_to_interp_mode(pixels.interpolation))
    return center_crop(resized, side)


def to_tensor(view: Image.Image, pixels: Pixels) -> Tensor:
    """(1, 3, height, width) float32, normalised as in training."""
    return normalize(torch.from_numpy(np.array(view)).permute(2, 0, 1)[None], pixels)


def image_files(path: str | Path) -> list[Path]:
    """The file itself, or the image files of a folder by name. UsageError if there are none."""
    path = Path(path)
    if not path.is_dir():
        return [path]
    files = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())
    if not files:
        raise UsageError(f"folder {path} holds no image files")
    return files
