"""From any image file to the picture that a model sees."""

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timm.data.transforms import str_to_interp_mode
from torch import Tensor
from torchvision.transforms.functional import center_crop, resize

from models.pixels import Pixels, normalize
from runtime.errors import UsageError
from runtime.images import ImageRefused, open_rgb

SMALLEST_SIDE, LARGEST_SIDE = 8, 8192
"""Pixels: scikit-learn's digits are 8 wide; a decoded image of the largest size takes 200 MB."""

LONGEST_PROPORTION = 4
"""Longer images lose their ends before they are resized, so that a long, thin one does not become huge."""

SUFFIXES = frozenset(Image.registered_extensions())


def open_image(path: str | Path) -> Image.Image:
    """The image in a file as upright 8-bit RGB, see `open_rgb`.

    UsageError if it is no image, damaged, or a side is out of 8..8192 pixels; the pixels are decoded only after that.
    """
    name = Path(path).name
    try:
        return open_rgb(path, min_side=SMALLEST_SIDE, max_side=LARGEST_SIDE)
    except ImageRefused as error:
        raise UsageError(f"{name} {error}") from error
    except IsADirectoryError as error:
        raise UsageError(f"{name} is a folder, not an image") from error
    except FileNotFoundError as error:
        raise UsageError(f"{path} does not exist") from error
    except Exception as error:
        # A broken file makes Pillow raise anything from OSError to struct.error.
        raise UsageError(f"{name} is no image that can be read ({type(error).__name__}); use PNG or JPEG") from error


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
