"""Routed attention for exported programs: windows and heads apart in one permutation, then whole windows gathered.

Letters: B batch, rows x columns = P windows, w tokens per window, C channels, m heads, D = C/m, k routed windows.
"""

import torch
from torch import Tensor


def to_windowed_heads(x: Tensor, n_win: tuple[int, int], num_heads: int) -> Tensor:
    """(B, H, W, C) -> (B, m, P, w, D)."""
    b, h, w, c = x.shape
    rows, columns = n_win
    x = x.reshape(b, rows, h // rows, columns, w // columns, num_heads, c // num_heads)
    return x.permute(0, 5, 1, 3, 2, 4, 6).reshape(b, num_heads, rows * columns, -1, c // num_heads)


def from_windowed_heads(x: Tensor, n_win: tuple[int, int], height: int, width: int) -> Tensor:
    """(B, m, P, w, D) -> (B, height, width, C): undoes `to_windowed_heads`."""
    b, m, _, _, d = x.shape
    rows, columns = n_win
    x = x.reshape(b, m, rows, columns, height // rows, width // columns, d)
    return x.permute(0, 2, 4, 3, 5, 1, 6).reshape(b, height, width, m * d)


def forward(
    q: Tensor, k: Tensor, v: Tensor, idx: Tensor, n_win: tuple[int, int], num_heads: int, scale: float
) -> Tensor:
    """See `ops.routed_attention`."""
    _, height, width, _ = q.shape
    q, k, v = (to_windowed_heads(x, n_win, num_heads) for x in (q, k, v))
    b, m, p, w, d = k.shape
    image, head = torch.arange(b, device=idx.device), torch.arange(m, device=idx.device)
    rows = (image[:, None] * m + head)[..., None, None] * p + idx[:, None]  # (B, m, P, k)

    def gathered(x: Tensor) -> Tensor:  # (B, m, P, w, D) -> (B, m, P, k*w, D)
        return x.reshape(b * m * p, w * d)[rows].reshape(b, m, p, -1, d)

    weights = ((q * scale) @ gathered(k).mT).softmax(-1)
    return from_windowed_heads(weights @ gathered(v), n_win, height, width)
