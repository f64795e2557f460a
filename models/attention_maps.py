"""Exact attention maps of one image: what an attention's `attention_maps(x)` returns.

An object keeps what determines the maps (projections, routing, positions); its methods compute them when asked.

Letters: H x W token map (padded as the attention pads it), C channels, m heads, S windows per side, P = S*S windows,
k routed windows, Ha x Wa agent grid (padded likewise), g offset groups. There is no batch axis.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields, replace
from typing import TypeVar

import torch
from torch import Tensor

from . import ops
from .ops.deformable import reference_points

Maps = TypeVar("Maps", bound="AttentionMaps")


def one_image(x: Tensor) -> Tensor:
    """(1, ...) -> (...), floats in float32 at least. ValueError for another batch size."""
    if len(x) != 1:
        raise ValueError(f"attention maps are those of one image; give x[i : i + 1], not a batch of {len(x)}")
    return x[0].to(torch.promote_types(x.dtype, torch.float32)) if x.is_floating_point() else x[0]


@dataclass(frozen=True)
class AttentionMaps(ABC):
    """What one attention does with one image.

    tokens: rows and columns of the token map before padding. A token is addressed by (row, column).
    values: (H, W, C), what the attention sums. weight: (C, C), of the projection of the sums. rest: (H, W, C), what
    else the layer gives (LePE, biases). All three or none: only with them are contributions known.
    """

    tokens: tuple[int, int]
    num_heads: int
    values: Tensor | None = field(default=None, kw_only=True)
    weight: Tensor | None = field(default=None, kw_only=True)
    rest: Tensor | None = field(default=None, kw_only=True)

    @abstractmethod
    def token_attention(self, row: int, column: int) -> Tensor:
        """How much of its attention a token gives to each token: (m, H, W), every head's map summing to 1."""

    def contributions(self, row: int, column: int) -> Tensor:
        """What each head adds to the layer's output at a token from each token: (m, H, W, C).

        All of it and `rest` at the token sum to the output. For agents, it is from each agent: (m, Ha, Wa, C).
        """
        return self._added(self.token_attention(row, column))

    def _added(self, shares: Tensor) -> Tensor:
        """Shares (m, ...) of the values (..., C), projected: (m, ..., C)."""
        by_head = (self.values.unflatten(-1, (self.num_heads, -1)) * shares.movedim(0, -1)[..., None]).movedim(-2, 0)
        return torch.einsum("m...d,cmd->m...c", by_head, self.weight.unflatten(1, (self.num_heads, -1)))

    def cpu(self: Maps) -> Maps:
        """The same maps with detached tensors on the CPU."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: x.detach().cpu() for name, x in values.items() if isinstance(x, Tensor)})


@dataclass(frozen=True)
class RoutedMaps(AttentionMaps):
    """Bi-level routing attention. Plain attention is the same with one window (n_win = 1) that reads itself.

    q, k: (H, W, C). n_win: windows per side. idx: (P, k) int64, the windows that each window of queries reads, best
    first. scale: factor on the logits.
    """

    q: Tensor
    k: Tensor
    n_win: int
    idx: Tensor
    scale: float

    @property
    def sides(self) -> tuple[int, int]:
        """Rows and columns of the padded token map."""
        return self.k.shape[0], self.k.shape[1]

    def window_of(self, row: int, column: int) -> int:
        """The number of the window that holds a token, row-major."""
        height, width = self.sides
        return row // (height // self.n_win) * self.n_win + column // (width // self.n_win)

    def windows_read(self) -> Tensor:
        """By how many windows (of queries) each window is read: (S, S) int64, summing to P*k."""
        return torch.bincount(self.idx.flatten(), minlength=self.n_win**2).view(self.n_win, self.n_win)

    def token_attention(self, row: int, column: int) -> Tensor:
        """A token's attention to the tokens of its window's routed windows (arXiv 2303.08810, eqs. 5-6): (m, H, W)."""
        routed = self.idx[self.window_of(row, column)]
        return self._attend(self.q[row, column][None], routed[None])[:, 0]

    def _attend(self, queries: Tensor, routed: Tensor) -> Tensor:
        """Attention of queries (n, C) to the tokens of windows (n, k): (m, n, H, W), zero in others."""
        n, m = len(queries), self.num_heads
        keys = ops.to_windows(self.k[None], self.n_win)[0]  # (P, w, C)
        p, w, _ = keys.shape
        gathered = keys[routed].flatten(1, 2).unflatten(-1, (m, -1)).transpose(1, 2)  # (n, m, k*w, C/m)
        by_head = queries.unflatten(-1, (m, -1))[:, :, None]  # (n, m, 1, C/m)
        weights = (self.scale * by_head @ gathered.mT)[:, :, 0].softmax(-1)
        canvas = weights.new_zeros(n, m, p, w)
        canvas.scatter_add_(2, routed[:, None, :, None].expand(-1, m, -1, w), weights.unflatten(-1, (-1, w)))
        return ops.from_windows(canvas.permute(0, 2, 3, 1), self.n_win, *self.sides).permute(3, 0, 1, 2)


def plain_maps(q: Tensor, k: Tensor, num_heads: int, **parts: Tensor) -> RoutedMaps:
    """Maps of attention over all tokens with the scale (C/m)**-0.5, from q and k (1, H, W, C).

    parts: values, weight and rest of one image, if contributions are to be known.
    """
    tokens, idx = (q.shape[1], q.shape[2]), torch.zeros(1, 1, dtype=torch.int64, device=q.device)
    scale = (q.shape[-1] // num_heads) ** -0.5
    return RoutedMaps(tokens, num_heads, one_image(q), one_image(k), n_win=1, idx=idx, scale=scale, **parts)


@dataclass(frozen=True)
class AgentMaps(RoutedMaps):
    """Deformable agent attention. Here idx says what the windows of agents read.

    positions: (Ha, Wa, g, 2) in [-1, 1], y first. agents: rows and columns of the agent grid before padding.
    agent_q, agent_k: (Ha, Wa, C), what agents ask the tokens with, and what tokens find them by. The values are theirs.
    rpe_table: (m, 2Q-1, 2Q-1).
    """

    positions: Tensor
    agents: tuple[int, int]
    agent_q: Tensor
    agent_k: Tensor
    rpe_table: Tensor

    @property
    def groups(self) -> int:
        """Offset groups."""
        return self.positions.shape[2]

    def agent_windows(self) -> Tensor:
        """The windows that the agents lie in by their place in the grid (not their position): (Ha, Wa) int64."""
        ha, wa = self.agent_q.shape[:2]
        rows = torch.arange(ha, device=self.idx.device) // (ha // self.n_win)
        columns = torch.arange(wa, device=self.idx.device) // (wa // self.n_win)
        return rows[:, None] * self.n_win + columns

    def agent_reads(self) -> Tensor:
        """Every agent's attention to the tokens of its routed windows: (m, Ha, Wa, H, W)."""
        maps = self._attend(self.agent_q.flatten(0, 1), self.idx[self.agent_windows().flatten()])
        return maps.unflatten(1, self.agent_q.shape[:2])

    def token_to_agents(self) -> Tensor:
        """Every token's attention to the agents, position bias included: (m, H, W, Ha, Wa)."""
        bias = ops.relative_position_bias(self.rpe_table, self.positions.flatten(0, 1)[None], *self.sides)[0]
        queries, keys = (x.flatten(0, 1).unflatten(-1, (self.num_heads, -1)) for x in (self.q, self.agent_k))
        logits = self.scale * queries.transpose(0, 1) @ keys.permute(1, 2, 0) + bias.to(self.q.dtype)
        return logits.softmax(-1).unflatten(-1, self.agent_k.shape[:2]).unflatten(1, self.sides)

    def agent_shares(self) -> Tensor:
        """Mean attention that each agent gets from the tokens that are not padding: (m, Ha, Wa), summing to 1."""
        height, width = self.tokens
        return self.token_to_agents()[:, :height, :width].mean(dim=(1, 2))

    def token_attention(self, row: int, column: int) -> Tensor:
        """A token's attention to the agents times theirs to the tokens: (m, H, W), each summing to 1.

        The heads are those by which the token attends to agents. The agents' reading is the mean over heads, because a
        linear layer mixes these before the token sees the agents.
        What agents bring from the places they were sampled at is not part of the map.
        """
        return compose(self.token_to_agents()[:, row, column], self.agent_reads().mean(0))

    def contributions(self, row: int, column: int) -> Tensor:
        return self._added(self.token_to_agents()[:, row, column])

    def reference_grid(self) -> Tensor:
        """Where the agents (padding left out) start from, shaped as their positions: (ha, wa, g, 2)."""
        reference = reference_points(*self.agents, self.positions.device, self.positions.dtype)
        return reference[:, :, None].expand(-1, -1, self.groups, -1)


def compose(to_agents: Tensor, reads: Tensor) -> Tensor:
    """(..., Ha, Wa), (Ha, Wa, H, W) -> (..., H, W): what is read through the agents."""
    return torch.tensordot(to_agents, reads, dims=2)


@dataclass(frozen=True)
class PartitionMaps(AttentionMaps):
    """MaxViT's attention in windows of s x s neighbouring tokens, or over an s x s grid of distant ones.

    q, k: (H, W, C). bias: (m, s*s, s*s) of queries and keys, on the logits.
    """

    q: Tensor
    k: Tensor
    bias: Tensor
    scale: float
    grid: bool

    def token_attention(self, row: int, column: int) -> Tensor:
        """A token's attention to the tokens of its window or grid: (m, H, W)."""
        m, size = self.num_heads, int(self.bias.shape[-1] ** 0.5)
        (own_row, rows), (own_column, columns) = (
            self._partition(place, side, size) for place, side in zip((row, column), self.k.shape[:2], strict=True)
        )
        keys = self.k[rows][:, columns].flatten(0, 1).unflatten(-1, (m, -1))  # (s*s, m, C/m)
        logits = self.scale * torch.einsum("mc,nmc->mn", self.q[row, column].unflatten(-1, (m, -1)), keys)
        weights = (logits + self.bias[:, own_row * size + own_column]).softmax(-1)
        maps = weights.new_zeros(m, *self.k.shape[:2])
        maps[:, rows[:, None], columns] = weights.unflatten(-1, (size, size))
        return maps

    def _partition(self, place: int, side: int, size: int) -> tuple[int, Tensor]:
        """Along one axis: a token's number in its partition, and where the partition's tokens are."""
        steps = torch.arange(size, device=self.k.device)
        if self.grid:
            return place // (side // size), place % (side // size) + steps * (side // size)
        return place % size, place // size * size + steps
