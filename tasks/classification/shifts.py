"""Shears and translations of timm's policies, line by line.

Pillow interpolates them in two directions, though each moves pixels within their rows, or within their columns, alone.
What comes out differs by 1 of 255 at most, in a third of the time. Turns are left to Pillow.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import AugmentOp

TRANSPOSE = Image.Transpose.TRANSPOSE


class Shift:
    """Does what `function`, an operation of timm, does, where it interpolates bicubically.

    along_x: whether pixels move within rows. amounts(amount, side): by how much lines 0..side-1 move, in pixels.
    """

    def __init__(self, function: Callable, along_x: bool, amounts: Callable[[float, int], np.ndarray]) -> None:
        self.function, self.along_x, self.amounts = function, along_x, amounts

    def __call__(self, img: Image.Image, amount: float, **kwargs: Any) -> Image.Image:
        if kwargs.get("resample") != Image.Resampling.BICUBIC or img.mode != "RGB" or img.width != img.height:
            return self.function(img, amount, **kwargs)
        lines = np.asarray(img if self.along_x else img.transpose(TRANSPOSE))
        moved = Image.fromarray(shift_lines(lines, self.amounts(amount, img.width), kwargs["fillcolor"]))
        return moved if self.along_x else moved.transpose(TRANSPOSE)


def _shear(amount: float, side: int) -> np.ndarray:
    return amount * (np.arange(side) + 0.5)


def _translate(amount: float, side: int) -> np.ndarray:
    return np.full(side, amount * side)


KINDS = {
    "ShearX": (True, _shear),
    "ShearY": (False, _shear),
    "TranslateXRel": (True, _translate),
    "TranslateYRel": (False, _translate),
}


def speed_up(ops: Sequence[AugmentOp]) -> None:
    """Have operations of a policy computed line by line, those that can be."""
    for op in ops:
        if op.name in KINDS and not isinstance(op.aug_fn, Shift):
            op.aug_fn = Shift(op.aug_fn, *KINDS[op.name])


def shift_lines(lines: np.ndarray, shifts: np.ndarray, fill: Sequence[int]) -> np.ndarray:
    """Move each line by its own amount.

    Args:
        lines: (L, N, 3) uint8.
        shifts: (L,), in pixels; the output's pixel x comes from x + shift, by Pillow's bicubic of four pixels.
        fill: the colour of what comes from beyond the ends of a line.

    Returns:
        (L, N, 3) uint8.
    """
    count, length, _ = lines.shape
    whole = np.floor(shifts)
    d = torch.from_numpy((shifts - whole).astype(np.float32))[:, None]
    first = np.clip(whole.astype(np.int64) - 1, -length - 3, length)  # of the four pixels for x = 0
    before, after = max(2, -int(first.min())), max(2, int(first.max()) + 3)
    wide = np.empty((count, before + length + after, 3), np.uint8)
    wide[:, before : before + length] = lines
    wide[:, before - 2 : before], wide[:, before + length :][:, :2] = lines[:, :1], lines[:, -1:]
    windows = np.lib.stride_tricks.sliding_window_view(wide.reshape(count, -1), 3 * (length + 3), axis=1)
    pixels = torch.from_numpy(windows[np.arange(count), 3 * (before + first)]).float()
    weights = -d + 2 * d**2 - d**3, 1 - 2 * d**2 + d**3, d + d**2 - d**3, d**3 - d**2
    moved = pixels[:, : 3 * length] * weights[0]
    for number in (1, 2, 3):
        moved.addcmul_(pixels[:, 3 * number : 3 * (number + length)], weights[number])
    moved.add_(1e-3)  # Pillow cuts off fractions, and the weights' sum may fall short of 1 by a rounding
    result = moved.clamp_(0, 255).numpy().astype(np.uint8).reshape(count, length, 3)
    places = np.arange(length) + 0.5 + shifts[:, None]
    result[(places < 0) | (places >= length)] = fill
    return result
