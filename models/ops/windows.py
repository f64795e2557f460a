"""Cutting feature maps into windows and putting them together again.

Letters: B batch, H x W map, C channels, P windows, w tokens per window.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import choose_backend


def pad_to_multiple(x: Tensor, multiple: int | tuple[int, int]) -> Tensor:
    """Zero-pad a map right and bottom until both sides are multiples of `multiple` (or of one each: height, width).

    x: (B, H, W, ...), any dtype; returned unchanged when nothing is missing.
    """
    sides = [(side + part - 1) // part * part for side, part in zip(x.shape[1:3], pair(multiple), strict=True)]
    return pad_to_sides(x, sides)


def pad_to_sides(x: Tensor, sides: Sequence[int]) -> Tensor:
    """Zero-pad a map (B, H, W, ...) right and bottom to these sides; returned unchanged when nothing is missing."""
    missing_h, missing_w = (side - there for side, there in zip(sides, x.shape[1:3], strict=True))
    if known(missing_h == 0) and known(missing_w == 0):
        return x
    return F.pad(x, (0, 0) * (x.ndim - 3) + (0, missing_w, 0, missing_h))


def to_windows(x: Tensor, n_win: int | tuple[int, int]) -> Tensor:
    """(B, H, W, C) -> (B, P, w, C): windows row-major, tokens row-major inside each.

    n_win: windows per side, or rows and columns of windows; they must divide H and W.
    """
    b, h, w, c = x.shape
    rows, columns = pair(n_win)
    x = x.reshape(b, rows, h // rows, columns, w // columns, c)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(b, rows * columns, -1, c)


def from_windows(x: Tensor, n_win: int | tuple[int, int], height: int, width: int) -> Tensor:
    """(B, P, w, C) -> (B, height, width, C): undoes `to_windows`."""
    b, c = x.shape[0], x.shape[-1]
    rows, columns = pair(n_win)
    x = x.reshape(b, rows, columns, height // rows, width // columns, c)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(b, height, width, c)


def window_means(x: Tensor, n_win: int | tuple[int, int]) -> Tensor:
    """(B, H, W, C) -> (B, P, C), the means over the tokens of `to_windows`' windows."""
    return to_windows(x, n_win).mean(2)  # CPUs sum over two axes that lie apart ten times slower than they copy


def pool_windows(x: Tensor, window: tuple[int, int]) -> Tensor:
    """Means over windows of so many rows and columns of tokens: (B, H, W, C) -> (B, P, C), row-major.

    The last row and column of windows may reach over the map's edge; what lies outside is not counted.
    """
    if choose_backend(None, x) == "export":  # other runtimes pool windows of a fixed size alone
        x, ones = pad_to_multiple(x, window), pad_to_multiple(torch.ones_like(x[:1, :, :, :1]), window)
        n_win = (x.shape[1] // window[0], x.shape[2] // window[1])
        return to_windows(x, n_win).sum(2) / to_windows(ones, n_win).sum(2)
    x = F.avg_pool2d(x.permute(0, 3, 1, 2), window, ceil_mode=True, count_include_pad=False)
    return x.flatten(2).transpose(1, 2)


def split_side(side: int, n_win: int) -> tuple[int, int]:
    """Tokens per window and number of windows along a side that is cut in windows of side // n_win tokens.

    There are at least `n_win` windows, more where that does not divide, and fewer only where there are fewer tokens.
    """
    window = torch.sym_max(side // n_win, 1)
    return window, (side + window - 1) // window  # exported negative numbers are rounded towards zero


def known(condition: bool) -> bool:
    """Whether sides are so; in a program exported for many sizes, whether all of them are."""
    if torch.compiler.is_exporting():
        from torch.fx.experimental.symbolic_shapes import statically_known_true

        return statically_known_true(condition)
    return condition


def pair(value: int | tuple[int, int]) -> tuple[int, int]:
    """A number for both axes, or one of each."""
    return value if isinstance(value, tuple) else (value, value)
