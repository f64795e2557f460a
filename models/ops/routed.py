"""Bi-level routing attention as arithmetic (BiFormer, arXiv 2303.08810, section 3.2).

Letters: B batch, Hq x Wq map of queries, H x W map of keys, C channels, P windows, w tokens per window, m heads,
k routed windows.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import routed_export, routed_torch
from .backend import WORKSPACE, choose_backend
from .operators import differentiable, operator
from .windows import from_windows, pair, to_windows, window_means

_MOST_WINDOWS = 256
"""Windows that one of the routing kernel's programs holds at most."""


def route_windows(q_win: Tensor, k_win: Tensor, topk: int, scale: float) -> tuple[Tensor, Tensor]:
    """Choose, for every query window, the `topk` key windows with the highest affinity (eqs. 3-4).

    q_win, k_win: (B, P, C) window means; of fewer windows than `topk`, all are kept. Routing takes no part in autograd.
    Returns the kept logits (B, P, topk), descending, and their window numbers, int64 of the same shape.
    """
    affinity = (q_win.detach() * scale) @ k_win.detach().transpose(-2, -1)
    return affinity.topk(min(topk, affinity.shape[-1]), dim=-1)


def route_maps(q: Tensor, k: Tensor, n_win: int | tuple[int, int], topk: int, scale: float) -> tuple[Tensor, Tensor]:
    """`route_windows` of the means of a map's windows.

    q, k: (B, H, W, C), not of the same sides; n_win: windows per side, or rows and columns; they must divide the sides.
    """
    rows, columns = pair(n_win)
    topk = min(topk, rows * columns)
    if rows * columns <= _MOST_WINDOWS and choose_backend(None, q) == "triton":
        return _route(q.detach(), k.detach().to(q.dtype), rows, columns, topk, scale)
    dense = choose_backend(None, q) == "export" and routed_export.is_dense(q, k, (rows, columns), topk)
    means = routed_export.window_means if dense else window_means
    return route_windows(means(q, (rows, columns)), means(k, (rows, columns)), topk, scale)


def full_attention(q: Tensor, k: Tensor, v: Tensor, num_heads: int, scale: float | None = None) -> Tensor:
    """Every token of one map attends to all tokens of another.

    q: (B, Hq, Wq, C); k, v: (B, H, W, C); scale: (C / num_heads)**-0.5 unless given. Returns (B, Hq, Wq, C).
    """
    if choose_backend(None, q, num_heads) == "export":
        return routed_export.full(q, k, v, num_heads, scale)
    heads = (x.flatten(1, 2).unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(*heads, scale=scale).transpose(1, 2).reshape(q.shape)


def routed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    idx: Tensor,
    n_win: int | tuple[int, int],
    num_heads: int,
    scale: float,
    backend: str | None = None,
    workspace: int = WORKSPACE,
) -> Tensor:
    """Every token of a window attends to all tokens of its routed windows (eqs. 5-6).

    Args:
        q: (B, Hq, Wq, C).
        k, v: (B, H, W, C).
        idx: (B, P, k) int64, window numbers in 0..P-1, row-major, each at most once per query window.
        n_win: windows per side, or rows and columns of windows; they must divide the sides of both maps.
        num_heads: consecutive parts of the channels that attend by themselves.
        backend: see `ops.backend`; ValueError for one that cannot run.
        workspace: bytes that "torch" may use for gathered windows and their logits at a time, at least one window's.

    Returns:
        (B, Hq, Wq, C).
    """
    name = choose_backend(backend, q, num_heads)
    rows, columns = pair(n_win)
    if not k.dtype == v.dtype == q.dtype:  # under autocast they may come from different layers
        k, v = k.to(q.dtype), v.to(q.dtype)
    if name == "reference":
        return routed_attention_reference(q, k, v, idx, (rows, columns), num_heads, scale)
    if name == "export":
        return routed_export.forward(q, k, v, idx, (rows, columns), num_heads, scale)
    return _attend(q, k, v, idx, rows, columns, num_heads, scale, name, workspace)[0]


def routed_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, idx: Tensor, n_win: tuple[int, int], num_heads: int, scale: float
) -> Tensor:
    """`routed_attention` by copying the routed windows and PyTorch's own attention."""
    (_, height, width, c), topk = q.shape, idx.shape[-1]
    q, k, v = to_windows(q, n_win), to_windows(k, n_win), to_windows(v, n_win)
    b, p, w, _ = k.shape
    first_window = p * torch.arange(b, device=idx.device)
    rows = (idx + first_window[:, None, None]).flatten()

    def gathered_heads(x: Tensor) -> Tensor:  # (B, P, w, C) -> (B*P, m, k*w, C/m)
        x = x.reshape(b * p, w * c).index_select(0, rows)
        return x.view(b * p, topk * w, num_heads, c // num_heads).transpose(1, 2)

    q = q.reshape(b * p, -1, num_heads, c // num_heads).transpose(1, 2)
    out = F.scaled_dot_product_attention(q, gathered_heads(k), gathered_heads(v), scale=scale)
    return from_windows(out.transpose(1, 2).reshape(b, p, -1, c), n_win, height, width)


# -- routing on GPUs and the fast backends of attention as operators -------------------------------------------------


def _route_forward(q: Tensor, k: Tensor, rows: int, columns: int, topk: int, scale: float) -> tuple[Tensor, Tensor]:
    from . import routing_triton

    return routing_triton.choose(q, k, (rows, columns), topk, scale)


def _routes_like(q: Tensor, k: Tensor, rows: int, columns: int, topk: int, scale: float) -> tuple[Tensor, Tensor]:
    shape = q.shape[0], rows * columns, topk
    return q.new_empty(shape), q.new_empty(shape, dtype=torch.int64)


_route = operator(
    *("route_maps", _route_forward, _routes_like),
    flops=lambda q, k, rows, columns, *_, **__: 2 * q[0] * (rows * columns) ** 2 * q[3],
)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    idx: Tensor,
    rows: int,
    columns: int,
    num_heads: int,
    scale: float,
    backend: str,
    workspace: int,
) -> tuple[Tensor, Tensor]:
    """Output, and what the backend wants to know of it in backward."""
    if backend == "torch":
        return routed_torch.forward(q, k, v, idx, (rows, columns), num_heads, scale, workspace)
    from . import routed_triton

    return routed_triton.forward(q, k, v, idx, (rows, columns), num_heads, scale)


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    idx: Tensor,
    out: Tensor,
    lse: Tensor,
    rows: int,
    columns: int,
    num_heads: int,
    scale: float,
    backend: str,
    workspace: int,
) -> tuple[Tensor, Tensor, Tensor]:
    if backend == "torch":
        return routed_torch.backward(grad, q, k, v, idx, out, lse, (rows, columns), num_heads, scale, workspace)
    from . import routed_triton

    return routed_triton.backward(grad, q, k, v, idx, out, lse, (rows, columns), num_heads, scale)


def _outputs_like(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    idx: Tensor,
    rows: int,
    columns: int,
    num_heads: int,
    scale: float,
    backend: str,
    _: int,
) -> tuple[Tensor, Tensor]:
    if backend == "torch":
        return q.new_empty(q.shape), routed_torch.lse_like(q, num_heads)
    return q.new_empty(q.shape), q.new_empty((q.shape[0], num_heads, q.shape[1] * q.shape[2]), dtype=torch.float32)


def _products(q: torch.Size, k: torch.Size, idx: torch.Size) -> int:
    """Operations of one matrix product of all queries and their keys."""
    return 2 * q.numel() * idx[2] * k[1] * k[2] // idx[1]


_attend = differentiable(
    *("routed_attention", _forward, _backward, _outputs_like),
    gradients=range(3),
    # Backward computes the logits again.
    flops=(
        lambda q, k, v, idx, *_, **__: 2 * _products(q, k, idx),
        lambda grad, q, k, v, idx, *_, **__: 5 * _products(q, k, idx),
    ),
)
