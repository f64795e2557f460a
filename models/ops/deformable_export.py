"""Deformable attention for exported programs: matrix products and plain indexing, at sides that need not be known.

A bilinear read of a table is the sum of its rises from cell to cell, of which the last counts in part. Outside, where
the table is zero, all rises together are, so that no case is left, and a table is read by two matrix products: one sums
rises along its rows, one along its columns. At a cell autograd takes another derivative than the reference's: this
backend is for inference.

Where one token step is one table cell, all tokens of an agent read a block of the table at the same fraction of a cell:
a blend of four blocks, which are copied row by row. An ONNX program that does not know its map's sides holds both ways;
others of that kind have the products.

Letters: B batch, H x W token map, N agents, C channels, m heads, D = C/m, g offset groups, Qh x Qw the table's map.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .routed_export import channels_by_head, to_map
from .windows import known

BLOCK_SIDES = range(16, 129)
"""Widths of maps whose biases are read in blocks: the rows of smaller ones are too short to be copied one by one, and
the shifted tables, of which there is one per column, would be too large. Measured in ONNX Runtime on two CPU cores."""


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


def counts(agents: Tensor, tokens: int, cells: int) -> Tensor:
    """How much of each rise every token has behind it along one axis: (..., N) -> (..., N, tokens, 2 * cells).

    agents: coordinates in [-1, 1]; tokens, cells: the map's side, and that of the map which the table is made for.
    """
    token, cell = (torch.arange(n, device=agents.device, dtype=agents.dtype) for n in (tokens, 2 * cells))
    # Where in the table, in cells, a token reads for an agent in the middle. What an agent adds is one number for all
    # its tokens, so that runtimes add along one long axis.
    middle = (token / torch.sym_max(tokens - 1, 1) + 0.5) * (cells - 1)
    behind = (middle[:, None] + 1 - cell).flatten() - (agents * ((cells - 1) / 2))[..., None]
    return behind.clamp(0, 1).unflatten(-1, (tokens, 2 * cells))


def bias(table: Tensor, positions: Tensor, height: int, width: int) -> Tensor:
    """Biases, tokens last: (m, 2Qh-1, 2Qw-1) and positions (B, N, g, 2) -> (B, m, N, height * width)."""
    table = table.to(positions.dtype)
    cells_y, cells_x = ((side + 1) // 2 for side in table.shape[1:])
    on_cells = torch.sym_sum(((height - cells_y) ** 2, (width - cells_x) ** 2)) == 0
    if cells_x in BLOCK_SIDES and known(on_cells):
        return _in_blocks(table, positions, height, width)
    holds_both = torch.onnx.is_in_onnx_export()  # elsewhere torch.cond fails on branches of unknown sides
    if cells_x not in BLOCK_SIDES or known(torch.sym_not(on_cells)) or not holds_both:
        return _by_products(table, positions, height, width)
    ways = (lambda t, p, way=way: way(t, p, height, width) for way in (_in_blocks, _by_products))
    return torch.cond(on_cells, *ways, (table, positions))


def _by_products(table: Tensor, positions: Tensor, height: int, width: int) -> Tensor:
    b, n, g, _ = positions.shape
    m, (cells_y, cells_x) = table.shape[0], ((side + 1) // 2 for side in table.shape[1:])
    rises = F.pad(table, (1, 1, 1, 1)).diff(dim=1).diff(dim=2)  # (m, 2Qh, 2Qw)
    y, x = positions.movedim(-1, 0).transpose(-1, -2)  # (B, g, N) each
    rows = counts(y, height, cells_y).reshape(b, g, 1, n * height, 2 * cells_y)
    blended = (rows @ rises.unflatten(0, (g, -1))).reshape(b, g, m // g, n, height, -1)
    return (blended @ counts(x, width, cells_x)[:, :, None].mT).reshape(b, m, n, height * width)


def _in_blocks(table: Tensor, positions: Tensor, height: int, width: int) -> Tensor:
    """Right where height = Qh and width = Qw; its shape is right everywhere, as branches of a program must agree."""
    b, n, g, _ = positions.shape
    m, (cells_y, cells_x) = table.shape[0], ((side + 1) // 2 for side in table.shape[1:])
    # One table per column that blocks begin at, so that a row of a block is a row: (m, Qw+1, 2Qh, Qw), a constant.
    shifted = F.pad(table, (0, 1, 0, 1)).unfold(2, cells_x, 1).transpose(1, 2)
    positions = positions.transpose(1, 2)  # (B, g, N, 2)
    y, x = (1 - positions[..., 0]) * ((cells_y - 1) / 2), (1 - positions[..., 1]) * ((cells_x - 1) / 2)
    top, left = y.floor(), x.floor()
    down, right = y - top, x - left
    corner = left.long() * (2 * cells_y) + top.long()
    corners = torch.stack([corner, corner + 1, corner + 2 * cells_y, corner + 2 * cells_y + 1], dim=-1)
    head = torch.arange(m, device=table.device).view(g, -1, 1, 1, 1) * (shifted.shape[1] * 2 * cells_y)
    rows = (corners[:, :, None, ..., None] + head + torch.arange(height, device=table.device)).flatten()
    blocks = shifted.reshape(-1, cells_x).index_select(0, rows).reshape(b, g, m // g, n, 4, height * cells_x)
    shares = torch.stack([(1 - right) * (1 - down), (1 - right) * down, right * (1 - down), right * down], dim=-1)
    found = (shares[:, :, None, :, None] @ blocks).reshape(b, m, n, height, cells_x)
    return F.pad(found, (0, width - cells_x)).flatten(-2)


def forward(q: Tensor, k: Tensor, v: Tensor, table: Tensor, positions: Tensor, num_heads: int, scale: float) -> Tensor:
    """See `ops.deformable_attention`."""
    _, h, w, _ = q.shape
    q, k, v = (channels_by_head(x, num_heads) for x in (q, k, v))
    logits = (k * scale).mT @ q + bias(table, positions.flatten(1, 2), h, w).to(q.dtype)  # (B, m, N, H*W)
    # softmax along another axis than the last would be computed of a copy with the axes exchanged
    weights = (logits - logits.amax(-2, keepdim=True)).exp()
    return to_map(v @ weights / weights.sum(-2, keepdim=True), h, w)
