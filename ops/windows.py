"""Cutting feature maps into windows and putting them together again.

Letters: B batch, H x W map, C channels, S windows per side, P = S*S windows, w tokens per window.
"""

import torch.nn.functional as F
from torch import Tensor


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Zero-pad a map right and bottom until both sides are multiples of `multiple`.

    x: (B, H, W, ...), any dtype; returned unchanged when nothing is missing.
    """
    missing_h, missing_w = -x.shape[1] % multiple, -x.shape[2] % multiple
    if missing_h == 0 and missing_w == 0:
        return x
    return F.pad(x, (0, 0) * (x.ndim - 3) + (0, missing_w, 0, missing_h))


def to_windows(x: Tensor, n_win: int) -> Tensor:
    """(B, H, W, C) -> (B, P, w, C): windows row-major, tokens row-major inside each.

    H and W must be multiples of `n_win`.
    """
    b, h, w, c = x.shape
    x = x.reshape(b, n_win, h // n_win, n_win, w // n_win, c)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(b, n_win * n_win, -1, c)


def from_windows(x: Tensor, n_win: int, height: int, width: int) -> Tensor:
    """(B, P, w, C) -> (B, height, width, C): undoes `to_windows`."""
    b, c = x.shape[0], x.shape[-1]
    x = x.reshape(b, n_win, n_win, height // n_win, width // n_win, c)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(b, height, width, c)
