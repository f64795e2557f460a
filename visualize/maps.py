"""Attention maps of captured layers: exact, computed from what `visualize.capture` kept.

Letters as there. Maps over tokens are (..., H, W) with the padded sides; attention of one query sums to 1 over a map.
A token is addressed by (row, column).
"""

import torch
from einops import rearrange
from torch import Tensor

from models import ops
from models.ops.deformable import reference_points
from runtime.errors import UsageError

from .capture import AgentLayer, Capture, Layer, RoutedLayer


def token_at(layer: Layer, size: tuple[int, int], x: int, y: int) -> tuple[int, int]:
    """Row and column of the token whose cell holds the pixel (x, y). UsageError outside of size (height, width)."""
    check_inside(size, x, y)
    return y // layer.stride, x // layer.stride


def check_inside(size: tuple[int, int], x: int, y: int) -> None:
    """UsageError if the pixel (x, y) lies outside of a picture of size (height, width)."""
    height, width = size
    if not (0 <= x < width and 0 <= y < height):
        raise UsageError(
            f"the query {x},{y} lies outside of the {width}x{height} picture; "
            f"x goes from 0 to {width - 1}, y from 0 to {height - 1}"
        )


def check_head(layers: list[Layer], head: int | None) -> None:
    """UsageError if one of the layers has no such head; None stands for the mean over all."""
    fewest = min(layer.num_heads for layer in layers)
    if head is not None and not 0 <= head < fewest:
        raise UsageError(f"stage {layers[0].stage} has no head {head}; use 0..{fewest - 1}, or none for their mean")


def over_heads(maps: Tensor, head: int | None) -> Tensor:
    """(m, ...) -> (...): one head's map, or the mean of all."""
    return maps.mean(0) if head is None else maps[head]


def window_of(row: int, column: int, sides: tuple[int, int], n_win: int) -> int:
    """The number of the window that holds a place of a map (or agent grid) with these padded sides, row-major."""
    height, width = sides
    return row // (height // n_win) * n_win + column // (width // n_win)


def window_box(layer: Layer, window: int) -> tuple[int, int, int, int]:
    """Left, top, right and bottom edge of a window in pixels, which may lie in the padding."""
    height, width = (side // layer.n_win * layer.stride for side in layer.q.shape[:2])
    row, column = divmod(window, layer.n_win)
    return column * width, row * height, (column + 1) * width, (row + 1) * height


def _attend_routed(layer: Layer, queries: Tensor, windows: Tensor) -> Tensor:
    """Attention of queries (n, C), which lie in windows (n,), to the tokens: (m, n, H, W), zero where not routed to."""
    n, m = len(queries), layer.num_heads
    keys = ops.to_windows(layer.k[None], layer.n_win)[0]  # (P, w, C)
    p, w, _ = keys.shape
    routed = layer.idx[windows]  # (n, k)
    gathered = rearrange(keys[routed], "n k w (m c) -> n m (k w) c", m=m)
    by_head = rearrange(queries, "n (m c) -> n m 1 c", m=m)
    weights = (layer.scale * by_head @ gathered.mT)[:, :, 0].softmax(-1)
    canvas = weights.new_zeros(n, m, p, w)
    canvas.scatter_add_(2, routed[:, None, :, None].expand(-1, m, -1, w), weights.unflatten(-1, (-1, w)))
    height, width = layer.k.shape[:2]
    return ops.from_windows(canvas.permute(0, 2, 3, 1), layer.n_win, height, width).permute(3, 0, 1, 2)


def token_attention(layer: RoutedLayer, row: int, column: int) -> Tensor:
    """A token's attention to the tokens of its window's routed windows (arXiv 2303.08810, eqs. 5-6): (m, H, W)."""
    window = window_of(row, column, layer.q.shape[:2], layer.n_win)
    return _attend_routed(layer, layer.q[row, column][None], torch.tensor([window]))[:, 0]


def agent_windows(layer: AgentLayer) -> Tensor:
    """The windows that the agents lie in by their place in the grid (not their position): (Ha, Wa) int64."""
    ha, wa = layer.agent_q.shape[:2]
    rows = torch.arange(ha) // (ha // layer.n_win)
    columns = torch.arange(wa) // (wa // layer.n_win)
    return rows[:, None] * layer.n_win + columns


def agent_reads(layer: AgentLayer) -> Tensor:
    """Every agent's attention to the tokens of its routed windows: (m, Ha, Wa, H, W)."""
    ha, wa = layer.agent_q.shape[:2]
    maps = _attend_routed(layer, layer.agent_q.flatten(0, 1), agent_windows(layer).flatten())
    return maps.unflatten(1, (ha, wa))


def token_to_agents(layer: AgentLayer) -> Tensor:
    """Every token's attention to the agents, position bias included: (m, H, W, Ha, Wa)."""
    height, width = layer.q.shape[:2]
    wa = layer.agent_k.shape[1]

    def heads(x: Tensor) -> Tensor:
        return rearrange(x, "y x (m c) -> m (y x) c", m=layer.num_heads)

    bias = ops.relative_position_bias(layer.rpe_table, layer.positions.flatten(0, 1)[None], height, width)[0]
    logits = layer.scale * heads(layer.q) @ heads(layer.agent_k).mT + bias.to(layer.q.dtype)
    return rearrange(logits.softmax(-1), "m (y x) (ya xa) -> m y x ya xa", x=width, xa=wa)


def agent_shares(layer: AgentLayer) -> Tensor:
    """How much attention each agent gets, as a mean over the tokens that are not padding: (m, Ha, Wa), summing to 1."""
    height, width = layer.tokens
    return token_to_agents(layer)[:, :height, :width].mean(dim=(1, 2))


def composed_attention(layer: AgentLayer, row: int, column: int, head: int | None = None) -> Tensor:
    """A token's attention to the agents times theirs to the tokens: (H, W), summing to 1.

    `head` chooses among the heads by which the token attends to agents. The agents' reading is the mean over heads,
    because a linear layer mixes these before the token sees the agents.
    What agents bring from the places they were sampled at is not part of the map.
    """
    return compose(over_heads(token_to_agents(layer)[:, row, column], head), agent_reads(layer).mean(0))


def compose(to_agents: Tensor, reads: Tensor) -> Tensor:
    """(Ha, Wa), (Ha, Wa, H, W) -> (H, W): what is read through the agents."""
    return torch.tensordot(to_agents, reads, dims=2)


def pixel_positions(layer: AgentLayer, positions: Tensor) -> Tensor:
    """Positions (..., 2) in [-1, 1], y first, as pixels (..., 2), x first: -1 and 1 are outer tokens' centres."""
    sides = positions.new_tensor(layer.q.shape[:2])
    token = (positions + 1) / 2 * (sides - 1)
    return ((token + 0.5) * layer.stride - 0.5).flip(-1)


def agent_pixels(layer: AgentLayer) -> tuple[Tensor, Tensor]:
    """Where the agents (padding left out) start from and where they are, in pixels, x first: (ha, wa, g, 2) each."""
    ha, wa = layer.agents
    positions = layer.positions[:ha, :wa]
    reference = reference_points(ha, wa, positions.device, positions.dtype)[:, :, None].expand_as(positions)
    return pixel_positions(layer, reference), pixel_positions(layer, positions)


def to_pixels(layer: Layer, token_map: Tensor, size: tuple[int, int]) -> Tensor:
    """Spread each token's value of (H, W) evenly over its pixels: (height, width). What lies in padding is cut off."""
    s = layer.stride
    return (token_map / s**2).repeat_interleave(s, 0).repeat_interleave(s, 1)[: size[0], : size[1]]


def windows_read(layer: Layer) -> Tensor:
    """By how many windows (of queries) each window is read: (S, S) int64, summing to P*k."""
    return torch.bincount(layer.idx.flatten(), minlength=layer.n_win**2).view(layer.n_win, layer.n_win)


def predictions(capture: Capture, classes: list[str], most: int = 5) -> list[tuple[str, float]]:
    """The most probable classes and their probabilities, best first."""
    values, numbers = capture.logits.softmax(-1).topk(min(most, len(classes)))
    return [(classes[number], value) for number, value in zip(numbers.tolist(), values.tolist(), strict=True)]
