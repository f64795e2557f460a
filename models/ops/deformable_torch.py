"""Deformable attention with PyTorch's own kernels, a bounded number of token rows at a time.

Logits are (agents, tokens): their tokens are then adjacent, as in the table that biases are read from. Where one token
step is one table cell, an agent's biases are one H x W block of the table between cells, the same fraction of a cell
everywhere: a blend of four views, shifted by a cell, of one block that is copied whole. Elsewhere they are sampled one
by one. Backward computes logits and biases again.

Letters: B batch, H x W token map, N agents, C channels, m heads, D = C/m, g offset groups; I images and R token rows at
a time.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

_CACHE = 16 * 2**20
"""Bytes that CPUs work on at a time at most, however large the workspace: about what their last cache keeps."""


class _Problem:
    """The inputs by heads, and the biases of any part of them; half precision is computed in float32."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, table: Tensor, positions: Tensor, num_heads: int) -> None:
        self.dtype = torch.promote_types(torch.promote_types(q.dtype, positions.dtype), torch.float32)
        self.num_heads, (_, self.height, self.width, _) = num_heads, q.shape
        self.groups = positions.shape[3]
        self.q, self.k, self.v = q, self.heads(k), self.heads(v)
        self.table = table.to(self.dtype)
        self.positions = positions.flatten(1, 2).transpose(1, 2).to(self.dtype)  # (B, g, N, 2)
        self.on_cells = tuple(table.shape[1:]) == (2 * self.height - 1, 2 * self.width - 1)
        # Blocks that begin up to one block before the table, or anywhere in it, can be cut out of this one.
        margin_y, margin_x = self.height + 1, self.width + 1
        self.padded_table = F.pad(self.table, (margin_x, margin_x, margin_y, margin_y)) if self.on_cells else None

    def heads(self, x: Tensor) -> Tensor:
        """(I, y, x, C) -> (I*m, y*x, D)."""
        x = x.flatten(1, 2).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        return x.to(self.dtype).flatten(0, 1)

    def of(self, images: slice, x: Tensor) -> Tensor:
        """The images' part of k or v: (I*m, N, D)."""
        return x.unflatten(0, (-1, self.num_heads))[images].flatten(0, 1)

    def chunks(self, copies: int, workspace: int) -> Iterator[tuple[slice, slice]]:
        """Images and token rows of which `copies` arrays like the logits fit the workspace, and on CPUs the cache."""
        workspace = min(workspace, _CACHE) if self.q.device.type == "cpu" else workspace
        row = copies * self.num_heads * self.k.shape[1] * self.width * self.dtype.itemsize
        images = max(1, workspace // (row * self.height))
        rows = self.height if images > 1 else min(self.height, max(1, workspace // row))
        for i in range(0, len(self.q), images):
            for y in range(0, self.height, rows):
                yield slice(i, i + images), slice(y, min(y + rows, self.height))

    def displacements(self, images: slice, rows: slice) -> Tensor:
        """(token - agent) / 2 as grid_sample wants it, x first: (I*g, N, R*W, 2)."""
        y = torch.arange(rows.start, rows.stop, device=self.q.device, dtype=self.dtype)
        x = torch.arange(self.width, device=self.q.device, dtype=self.dtype)
        y, x = y / max(self.height - 1, 1) * 2 - 1, x / max(self.width - 1, 1) * 2 - 1
        agents = self.positions[images].flatten(0, 1)[:, :, None, None]  # (I*g, N, 1, 1, 2)
        dy, dx = (y[:, None] - agents[..., 0]) / 2, (x - agents[..., 1]) / 2
        return torch.stack(torch.broadcast_tensors(dx, dy), dim=-1).flatten(2, 3)

    def tables(self, images: slice) -> Tensor:
        """Every image's and group's tables: a view (I*g, m/g, 2Q-1, 2Q-1) for one image, else a copy."""
        count = len(self.q[images])
        return self.table.unflatten(0, (self.groups, -1)).expand(count, -1, -1, -1, -1).flatten(0, 1)

    def bias(self, images: slice, rows: slice) -> Tensor:
        """(I*m, N, R*W)."""
        if self.on_cells:
            return self._shifted_views(images, rows)
        grid = self.displacements(images, rows)
        bias = F.grid_sample(self.tables(images), grid, mode="bilinear", align_corners=True)
        return bias.view(-1, *bias.shape[2:])

    def _shifted_views(self, images: slice, rows: slice) -> Tensor:
        agent_y, agent_x = self.positions[images].unbind(-1)  # (I, g, N)
        # Where in the table, in cells, the first token reads.
        origin = torch.stack([(1 - agent_y) * ((self.height - 1) / 2), (1 - agent_x) * ((self.width - 1) / 2)])
        cell = origin.floor()
        y, x = cell.long().repeat_interleave(self.num_heads // self.groups, dim=2)  # (I, m, N)
        fraction_y, fraction_x = (origin - cell).repeat_interleave(self.num_heads // self.groups, dim=2)[
            ..., None, None
        ]
        y = y.clamp(-self.height - 1, 2 * self.height - 1) + self.height + 1 + rows.start
        x = x.clamp(-self.width - 1, 2 * self.width - 1) + self.width + 1
        blocks = self.padded_table.unfold(1, rows.stop - rows.start + 1, 1).unfold(2, self.width + 1, 1)
        head = torch.arange(self.num_heads, device=y.device)[:, None]
        block = blocks[head, y, x]  # (I, m, N, R+1, W+1)
        block = torch.lerp(block[..., :-1, :], block[..., 1:, :], fraction_y)
        block = torch.lerp(block[..., :-1], block[..., 1:], fraction_x)
        return block.flatten(0, 1).flatten(2)

    def weights(self, q: Tensor, images: slice, rows: slice, scale: float) -> Tensor:
        """Attention weights (I*m, N, R*W) of the tokens q (I*m, R*W, D)."""
        return torch.baddbmm(self.bias(images, rows), self.of(images, self.k), q.mT, alpha=scale).softmax(1)


def forward(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, positions: Tensor, num_heads: int, scale: float, workspace: int
) -> Tensor:
    """See `ops.deformable_attention`."""
    with torch.autocast(q.device.type, enabled=False):  # which would take the products to half precision again
        return _forward(q, k, v, table, positions, num_heads, scale, workspace)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, positions: Tensor, num_heads: int, scale: float, workspace: int
) -> Tensor:
    problem = _Problem(q, k, v, table, positions, num_heads)
    out = q.new_empty(q.shape)
    for images, rows in problem.chunks(3, workspace):
        weights = problem.weights(problem.heads(q[images, rows]), images, rows, scale)
        read = weights.mT @ problem.of(images, problem.v)
        part = out[images, rows]
        part.copy_(read.unflatten(0, (-1, num_heads)).transpose(1, 2).reshape(part.shape))
    return out


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    positions: Tensor,
    num_heads: int,
    scale: float,
    workspace: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, the table and the positions. On CUDA PyTorch sums the table's with atomics."""
    with torch.autocast(q.device.type, enabled=False):
        return _backward(grad, q, k, v, table, positions, num_heads, scale, workspace)


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    positions: Tensor,
    num_heads: int,
    scale: float,
    workspace: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    problem = _Problem(q, k, v, table, positions, num_heads)
    dq = q.new_empty(q.shape)
    dk, dv = torch.zeros_like(problem.k), torch.zeros_like(problem.v)
    dtable = torch.zeros_like(problem.table)
    dpositions = torch.zeros_like(problem.positions, memory_format=torch.contiguous_format)

    for images, rows in problem.chunks(8, workspace):
        queries, dout = problem.heads(q[images, rows]), problem.heads(grad[images, rows])
        weights = problem.weights(queries, images, rows, scale)
        dweights = problem.of(images, problem.v) @ dout.mT
        dlogits = torch._softmax_backward_data(dweights, weights, 1, problem.dtype)
        part = dq[images, rows]
        dqueries = (dlogits.mT @ problem.of(images, problem.k)).mul_(scale)
        part.copy_(dqueries.unflatten(0, (-1, num_heads)).transpose(1, 2).reshape(part.shape))
        problem.of(images, dk).baddbmm_(dlogits, queries, alpha=scale)
        problem.of(images, dv).baddbmm_(weights, dout)

        grid = problem.displacements(images, rows)
        dbias = dlogits.view(len(grid), -1, *dlogits.shape[1:])
        dtables, dgrid = torch.ops.aten.grid_sampler_2d_backward(
            dbias, problem.tables(images), grid, 0, 0, True, [True, True]
        )
        dtable += dtables.unflatten(0, (-1, problem.groups)).sum(0).flatten(0, 1)
        dpositions[images] -= dgrid.sum(2).flip(-1).view_as(dpositions[images]) / 2

    def agents(x: Tensor) -> Tensor:
        return x.unflatten(0, (-1, num_heads)).transpose(1, 2).reshape(k.shape).to(k.dtype)

    # Contiguous, as the operator promises to compiled code.
    dpositions = dpositions.transpose(1, 2).reshape(positions.shape).to(positions.dtype).contiguous()
    return dq, agents(dk), agents(dv), dtable.to(table.dtype), dpositions
