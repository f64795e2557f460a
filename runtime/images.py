"""The one way from an image file to RGB pixels: for training, evaluation, tools and pictures."""

import contextlib
import io
import os
import stat
import warnings
from collections.abc import Callable
from typing import BinaryIO

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

try:
    import simplejpeg
except ImportError:  # Pillow decodes everything
    simplejpeg = None

MAX_PIXELS = 100_000_000
"""Larger images are refused before they are decoded, unless the caller allows more."""

MAX_PROPORTION = 256
"""Longer images are refused: resizing their shorter side to a model's size would take gigabytes."""

BACKGROUND = "white"

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # our own bound refuses instead


class ImageRefused(ValueError):
    """An image that is not decoded. The message lacks its subject: "has 1x70000 pixels, …"."""


def open_rgb(
    source: str | os.PathLike | BinaryIO,
    max_pixels: int = MAX_PIXELS,
    *,
    min_side: int = 1,
    max_side: int | None = None,
) -> Image.Image:
    """Read an image as upright 8-bit RGB, whatever its mode, see `to_rgb`.

    Args:
        source: path of a regular file, or an open binary file.
        max_pixels, min_side, max_side: bounds on its size, in pixels; checked before it is decoded.

    Raises:
        ImageRefused: no regular file, or out of bounds.
        OSError: with an errno, if the storage fails.
        Exception: anything that Pillow makes of a damaged file.
    """
    if isinstance(source, str | os.PathLike):
        mode = os.stat(source).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # opening a folder fails by itself, a FIFO hangs
            raise ImageRefused("is no regular file")
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels  # Pillow refuses by itself what has twice as many
    try:
        opened = Image.open(source)
    except Image.DecompressionBombError as error:
        raise ImageRefused(f"has more than {max_pixels:,} pixels; shrink it") from error
    with opened as image:
        _check_size(*image.size, max_pixels, min_side, max_side)
        return to_rgb(image)


def read_pixels(
    source: str | os.PathLike | BinaryIO, max_pixels: int = MAX_PIXELS, refused: Callable[[], None] = lambda: None
) -> Image.Image | Tensor:
    """Read an image as `open_rgb` does; a JPEG becomes (3, H, W) uint8 in a fifth less time, with the same values.

    Pillow gets what the stricter library does not decode: other files, CMYK, sideways and damaged ones.

    Args:
        refused: called when that is a JPEG.
    """
    content = _content_of_jpeg(source) if simplejpeg is not None else b""
    if content:
        try:
            return _decode_strictly(content, max_pixels)
        except _NotStrict:
            refused()
    return open_rgb(source, max_pixels)


class _NotStrict(Exception):
    pass


def _content_of_jpeg(source: str | os.PathLike | BinaryIO) -> bytes:
    """Everything in a file that begins as a JPEG; nothing of others, and of what is no regular file."""
    if isinstance(source, str | os.PathLike):
        if not stat.S_ISREG(os.stat(source).st_mode):
            return b""
        with open(source, "rb") as file:
            return _content_of_jpeg(file)
    start = source.tell()
    head = source.read(2)
    content = head + source.read() if head == b"\xff\xd8" else b""
    source.seek(start)
    return content


def _decode_strictly(content: bytes, max_pixels: int) -> Tensor:
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(content)
    except ValueError as error:
        raise _NotStrict from error
    _check_size(width, height, max_pixels, 1, None)
    if colours not in ("YCbCr", "Gray", "GRAY") or _is_turned(content):
        raise _NotStrict
    try:
        return torch.from_numpy(simplejpeg.decode_jpeg(content)).permute(2, 0, 1)
    except ValueError as error:
        raise _NotStrict from error


def _is_turned(content: bytes) -> bool:
    """Whether a JPEG says that it lies on its side, or is mirrored."""
    if all(content.find(mark, 0, 1 << 18) < 0 for mark in (b"Exif\0\0", b"tiff:Orientation")):
        return False
    with contextlib.suppress(Exception), Image.open(io.BytesIO(content)) as image:
        return image.getexif().get(ExifTags.Base.Orientation, 1) != 1
    return False


def _check_size(width: int, height: int, max_pixels: int, min_side: int, max_side: int | None) -> None:
    size = f"has {width}x{height} pixels"
    if min(width, height) < min_side:
        raise ImageRefused(f"{size}; at least {min_side} a side are needed")
    if max_side is not None and max(width, height) > max_side:
        raise ImageRefused(f"{size}; at most {max_side} a side are read, shrink it")
    if width * height > max_pixels:
        raise ImageRefused(f"{size}, more than {max_pixels:,} in all; shrink it")
    if max(width, height) > MAX_PROPORTION * min(width, height):
        raise ImageRefused(f"{size}, over {MAX_PROPORTION} times as long as wide; crop it")


def to_rgb(image: Image.Image) -> Image.Image:
    """Turn an image upright as its EXIF says, and into 8-bit RGB.

    Transparent parts become white. Grey of 16 or 32 bits, or floats: 0..65535 (or 0..1) becomes 0..255, other ranges
    are stretched.
    """
    image.load()  # a second attempt at a torn file would succeed, with the missing part grey
    with contextlib.suppress(Exception):  # a damaged EXIF block says nothing about the pixels
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith(("I", "F")):
        return _eight_bits(image).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, BACKGROUND), image)
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    values = np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=0, neginf=0)
    low, high = values.min(), values.max()
    limit = 1.0 if image.mode == "F" and high <= 1 else 65535.0
    if low >= 0 and high <= limit:
        low, high = 0.0, limit
    return Image.fromarray(((values - low) / max(high - low, 1e-300) * 255).round().astype(np.uint8))
