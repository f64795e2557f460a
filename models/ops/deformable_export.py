"""Deformable attention for exported programs: matrix products and plain indexing, at sides that need not be known.

A bilinear read of a table is the sum of its rises from cell to cell, of which the last counts in part. Outside, where
the table is zero, all rises together are, so that no case is left, and a table is read by two matrix products: one sums
rises along its rows, one along its columns. At a cell autograd takes another derivative than the reference's: this
backend is for inference.

Letters: B batch, H x W token map, N agents, C channels, m heads, D = C/m, g offset groups, Qh x Qw the table's map.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .routed_export import channels_by_head, to_map


def sample(x: Tensor, positions: Tensor) -> Tensor:
    """See `ops.sample_agents`: a blend of four tokens, each group's channels being a row of one matrix."""
    b, h, w, c = x.shape
    _, rows, columns, g, _ = positions.shape
    y, x_ = (positions[..., 0] + 1) * (h - 1) / 2, (positions[..., 1] + 1) * (w - 1) / 2
    top, left = y.floor(), x_.floor()
    down, right = (y - top)[..., None], (x_ - left)[..., None]
    top, left = top.long(), left.long()
    bottom, beside = (top + 1).clamp(max=h - 1), (left + 1).clamp(max=w - 1)
    matrix = x.reshape(b * h * w * g, c // g).to(positions.dtype)
    image = torch.arange(b, device=x.device).view(-1, 1, 1, 1)
    group = torch.arange(g, device=x.device)

    def read(row: Tensor, column: Tensor) -> Tensor:  # (B, Ha, Wa, g) twice -> (B, Ha, Wa, g, C/g)
        return matrix[((image * h + row) * w + column) * g + group]

    upper = _blend(read(top, left), read(top, beside), right)
    lower = _blend(read(bottom, left), read(bottom, beside), right)
    return _blend(upper, lower, down).reshape(b, rows, columns, c).to(x.dtype)


def _blend(a: Tensor, b: Tensor, fraction: Tensor) -> Tensor:
    return a + (b - a) * fraction


def reads(agents: Tensor, tokens: int, cells: int) -> Tensor:
    """Where in a table, in cells, each token reads along one axis: (..., N) -> (..., N, tokens).

    agents: coordinates in [-1, 1]; tokens, cells: the map's side, and that of the map which the table is made for.
    """
    token = torch.arange(tokens, device=agents.device, dtype=agents.dtype) / torch.sym_max(tokens - 1, 1) * 2 - 1
    return ((token - agents[..., None]) / 2 + 1) * (cells - 1)


def bias(table: Tensor, positions: Tensor, height: int, width: int) -> Tensor:
    """Biases, tokens last: (m, 2Qh-1, 2Qw-1) and positions (B, N, g, 2) -> (B, m, N, height * width)."""
    b, n, g, _ = positions.shape
    m, (cells_y, cells_x) = table.shape[0], ((side + 1) // 2 for side in table.shape[1:])
    rises = F.pad(table.to(positions.dtype), (1, 1, 1, 1)).diff(dim=1).diff(dim=2)  # (m, 2Qh, 2Qw)

    def cells_before(cells: int) -> Tensor:
        return torch.arange(2 * cells, device=table.device, dtype=positions.dtype) - 1

    y, x = positions.movedim(-1, 0).transpose(-1, -2)  # (B, g, N) each
    rows = (reads(y, height, cells_y)[..., None] - cells_before(cells_y)).clamp(0, 1)  # (B, g, N, H, 2Qh)
    columns = (reads(x, width, cells_x)[..., None, :] - cells_before(cells_x)[:, None]).clamp(0, 1)  # (B, g, N, 2Qw, W)
    blended = rows.reshape(b, g, 1, n * height, 2 * cells_y) @ rises.unflatten(0, (g, -1))
    return (blended.reshape(b, g, m // g, n, height, -1) @ columns[:, :, None]).reshape(b, m, n, height * width)


def forward(q: Tensor, k: Tensor, v: Tensor, table: Tensor, positions: Tensor, num_heads: int, scale: float) -> Tensor:
    """See `ops.deformable_attention`."""
    _, h, w, _ = q.shape
    q, k, v = (channels_by_head(x, num_heads) for x in (q, k, v))
    logits = (k * scale).mT @ q + bias(table, positions.flatten(1, 2), h, w).to(q.dtype)  # (B, m, N, H*W)
    # softmax along another axis than the last would be computed of a copy with the axes exchanged
    weights = (logits - logits.amax(-2, keepdim=True)).exp()
    return to_map(v @ weights / weights.sum(-2, keepdim=True), h, w)
