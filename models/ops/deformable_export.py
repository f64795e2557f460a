"""Deformable attention for exported programs: matrix products and plain indexing, at sides that need not be known.

A bilinear read of a table is a product with a hat function of the distance in cells. The hat is zero from one cell on,
so that what lies outside needs no case of its own, and a table is read by two matrix products: one blends its rows,
one its columns. A hat has no derivative at a cell, where autograd takes another one than the reference's: this backend
is for inference.

Letters: B batch, H x W token map, N agents, C channels, m heads, D = C/m, g offset groups, Qh x Qw the table's map.
"""

import torch
from torch import Tensor


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


def hats(agents: Tensor, tokens: int, cells: int) -> Tensor:
    """How much of each of a table's cells is read along one axis: (..., N) -> (..., N, tokens, 2 * cells - 1).

    agents: coordinates in [-1, 1]; tokens, cells: the map's side, and that of the map which the table is made for.
    """
    token = torch.arange(tokens, device=agents.device, dtype=agents.dtype) / torch.sym_max(tokens - 1, 1) * 2 - 1
    read = ((token - agents[..., None]) / 2 + 1) * (cells - 1)
    cell = torch.arange(2 * cells - 1, device=agents.device, dtype=agents.dtype)
    return (1 - (read[..., None] - cell).abs()).relu()


def bias(table: Tensor, positions: Tensor, height: int, width: int) -> Tensor:
    """Biases, tokens last: (m, 2Qh-1, 2Qw-1) and positions (B, N, g, 2) -> (B, m, N, height * width)."""
    b, n, g, _ = positions.shape
    m, cells_y, cells_x = table.shape
    y, x = positions.movedim(-1, 0).transpose(-1, -2)  # (B, g, N) each
    rows = hats(y, height, (cells_y + 1) // 2).reshape(b, g, 1, n * height, cells_y)
    columns = hats(x, width, (cells_x + 1) // 2)  # (B, g, N, W, 2Qw-1)
    blended = (rows @ table.to(positions.dtype).unflatten(0, (g, -1))).reshape(b, g, m // g, n, height, cells_x)
    return (blended @ columns[:, :, None].mT).reshape(b, m, n, height * width)


def forward(q: Tensor, k: Tensor, v: Tensor, table: Tensor, positions: Tensor, num_heads: int, scale: float) -> Tensor:
    """See `ops.deformable_attention`."""
    b, h, w, c = q.shape

    def heads(x: Tensor) -> Tensor:  # (B, y, x, C) -> (B, m, y*x, D)
        return x.reshape(b, -1, num_heads, c // num_heads).transpose(1, 2)

    logits = heads(k) @ (heads(q) * scale).mT + bias(table, positions.flatten(1, 2), h, w).to(q.dtype)
    return (logits.softmax(-2).mT @ heads(v)).transpose(1, 2).reshape(b, h, w, c)
