"""Routed attention for exported programs, in one of two ways.

Gathered: windows apart, then heads, then whole windows gathered.

Dense: all keys, with a mask of what is not routed. Maps have their channels first, as the convolutions beside them have
them in other runtimes, so that nothing is permuted or gathered.

Letters: B batch, H x W map, rows x columns = P windows, w tokens per window, C channels, m heads, D = C/m, k routed
windows.
"""

import torch
from torch import Tensor

from .routed_torch import window_of_tokens
from .windows import known

DENSE_TOKENS, DENSE_AGENTS = 4, 16
"""Windows for each that is read, up to which the dense way is taken: for a map that reads itself, and for agents, which
are fewer. Measured in ONNX Runtime on two CPU cores."""


def is_dense(q: Tensor, k: Tensor, n_win: tuple[int, int], topk: int) -> bool:
    """Whether maps (B, Hq, Wq, C) and (B, H, W, C) attend in the dense way."""
    most = DENSE_TOKENS if known(q.shape[1] == k.shape[1]) else DENSE_AGENTS
    return known(n_win[0] * n_win[1] <= most * topk)


def forward(
    q: Tensor, k: Tensor, v: Tensor, idx: Tensor, n_win: tuple[int, int], num_heads: int, scale: float
) -> Tensor:
    """See `ops.routed_attention`."""
    way = _dense if is_dense(q, k, n_win, idx.shape[-1]) else _gathered
    return way(q, k, v, idx, n_win, num_heads, scale)


# -- dense


def channels_by_head(x: Tensor, num_heads: int) -> Tensor:
    """(B, H, W, C) -> (B, m, D, H*W)."""
    b, _, _, c = x.shape
    return x.permute(0, 3, 1, 2).reshape(b, num_heads, c // num_heads, -1)


def to_map(x: Tensor, height: int, width: int) -> Tensor:
    """(B, m, D, H*W) -> (B, H, W, C): undoes `channels_by_head`."""
    b, m, d, _ = x.shape
    return x.reshape(b, m * d, height, width).permute(0, 2, 3, 1)


def members(x: Tensor, n_win: tuple[int, int]) -> Tensor:
    """Which tokens of a map (B, H, W, C) are in which window: (H*W, P), one or zero."""
    return (window_of_tokens(x, n_win)[:, None] == torch.arange(n_win[0] * n_win[1], device=x.device)).to(x.dtype)


def window_means(x: Tensor, n_win: tuple[int, int]) -> Tensor:
    """(B, H, W, C) -> (B, P, C), the means over the windows' tokens."""
    inside = members(x, n_win)
    return (x.permute(0, 3, 1, 2).flatten(2) @ (inside / inside.sum(0))).mT


def full(
    q: Tensor, k: Tensor, v: Tensor, num_heads: int, scale: float | None = None, mask: Tensor | None = None
) -> Tensor:
    """See `ops.full_attention`; mask: added to the logits (B, m, Hq*Wq, H*W)."""
    _, height, width, c = q.shape
    q, k, v = (channels_by_head(x, num_heads) for x in (q, k, v))
    logits = (q * ((c // num_heads) ** -0.5 if scale is None else scale)).mT @ k
    logits = logits if mask is None else logits + mask
    return to_map(v @ logits.softmax(-1).mT, height, width)


def _dense(
    q: Tensor, k: Tensor, v: Tensor, idx: Tensor, n_win: tuple[int, int], num_heads: int, scale: float
) -> Tensor:
    b, p, _ = idx.shape
    read = torch.zeros(b, p, p, dtype=q.dtype, device=q.device).scatter(2, idx, 1.0)
    read = members(q, n_win) @ read @ members(k, n_win).mT
    return full(q, k, v, num_heads, scale, (read[:, None] - 1) * (torch.finfo(q.dtype).max / 2))


# -- gathered


def to_windowed_heads(x: Tensor, n_win: tuple[int, int], num_heads: int) -> Tensor:
    """(B, H, W, C) -> (B, m, P, w, D). In two permutations, for XNNPACK knows no seven axes."""
    b, h, w, c = x.shape
    rows, columns = n_win
    x = x.reshape(b * rows, h // rows, columns, w // columns * c).transpose(1, 2)
    x = x.reshape(b, h * w, num_heads, c // num_heads).transpose(1, 2)
    return x.reshape(b, num_heads, rows * columns, -1, c // num_heads)


def from_windowed_heads(x: Tensor, n_win: tuple[int, int], height: int, width: int) -> Tensor:
    """(B, m, P, w, D) -> (B, height, width, C): undoes `to_windowed_heads`."""
    b, m, _, _, d = x.shape
    rows, columns = n_win
    x = x.reshape(b, m, height * width, d).transpose(1, 2)
    x = x.reshape(b * rows, columns, height // rows, width // columns * m * d).transpose(1, 2)
    return x.reshape(b, height, width, m * d)


def _gathered(
    q: Tensor, k: Tensor, v: Tensor, idx: Tensor, n_win: tuple[int, int], num_heads: int, scale: float
) -> Tensor:
    _, height, width, _ = q.shape
    q, k, v = (to_windowed_heads(x, n_win, num_heads) for x in (q, k, v))
    b, m, p, w, d = k.shape
    image, head = torch.arange(b, device=idx.device), torch.arange(m, device=idx.device)
    rows = (image[:, None] * m + head)[..., None, None] * p + idx[:, None]  # (B, m, P, k)

    def gathered(x: Tensor) -> Tensor:  # (B, m, P, w, D) -> (B, m, P, k*w, D)
        return x.reshape(b * m * p, w * d)[rows].reshape(b, m, p, -1, d)

    weights = ((q * scale) @ gathered(k).mT).softmax(-1)
    return from_windowed_heads(weights @ gathered(v), n_win, height, width)
