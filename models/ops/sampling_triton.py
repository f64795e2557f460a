"""Agents sampled from a map in Triton: the map is read where it lies, in its own type.

Letters: B batch, H x W map, N agents, g groups of C/g channels. Maps (B, H, W, C), agents (B, N, C), positions
(B, N, g, 2).

_forward             One program: BLOCK_M agents of one image and group, BLOCK_N of its channels.
_backward_positions  One program: BLOCK_M agents of one image and group, all of its channels.
_backward_map        One program: BLOCK_M pixels of one image, BLOCK_N channels of one group. The shares of all agents
                     in the pixels are a matrix, most of it zeros, and the gradient a matrix product: no atomics.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch_triton import Block, Kernel, as_tokens, cdiv, padded, precision
from .tiles_triton import dot, rounded


@triton.jit
def _places(positions_ptr, image, agent, is_agent, group, agents, groups, height, width):
    """Where the agents are, in pixels."""
    at = positions_ptr + ((image * agents + agent) * groups + group) * 2
    y = tl.load(at, mask=is_agent, other=0.0).to(tl.float32)
    x = tl.load(at + 1, mask=is_agent, other=0.0).to(tl.float32)
    return (y + 1.0) * 0.5 * (height - 1), (x + 1.0) * 0.5 * (width - 1)


@triton.jit
def _pixel(map_ptr, row, column, height, width, token, channel, exists):
    inside = exists & ((row >= 0) & (row < height) & (column >= 0) & (column < width))[:, None]
    at = map_ptr + (row * width + column)[:, None] * token + channel[None, :]
    return tl.load(at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _forward(
    map_ptr, positions_ptr, out_ptr,
    map_image, map_token, height, width, agents, groups, channels,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    parts, blocks = tl.cdiv(channels, BLOCK_N), tl.cdiv(agents, BLOCK_M)
    channel = tl.program_id(0) % parts * BLOCK_N + tl.arange(0, BLOCK_N)
    group = tl.program_id(0) // parts % groups
    agent = tl.program_id(0) // parts // groups % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    image = (tl.program_id(0) // parts // groups // blocks).to(tl.int64)
    exists = (agent < agents)[:, None] & (channel < channels)[None, :]
    y, x = _places(positions_ptr, image, agent, agent < agents, group, agents, groups, height, width)
    row, column = tl.floor(y).to(tl.int32), tl.floor(x).to(tl.int32)
    y, x = (y - row)[:, None], (x - column)[:, None]
    map_ptr += image * map_image + group * channels
    a = _pixel(map_ptr, row, column, height, width, map_token, channel, exists)
    b = _pixel(map_ptr, row, column + 1, height, width, map_token, channel, exists)
    c = _pixel(map_ptr, row + 1, column, height, width, map_token, channel, exists)
    d = _pixel(map_ptr, row + 1, column + 1, height, width, map_token, channel, exists)
    upper, lower = a + x * (b - a), c + x * (d - c)
    out = rounded(upper + y * (lower - upper), out_ptr.dtype.element_ty)
    rows = (image * agents + agent) * (groups * channels) + group * channels
    tl.store(out_ptr + rows[:, None] + channel[None, :], out, mask=exists)


@triton.jit
def _backward_positions(
    grad_ptr, map_ptr, positions_ptr, dpositions_ptr,
    map_image, map_token, height, width, agents, groups, channels,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(agents, BLOCK_M)
    group = tl.program_id(0) % groups
    agent = tl.program_id(0) // groups % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    image = (tl.program_id(0) // groups // blocks).to(tl.int64)
    y, x = _places(positions_ptr, image, agent, agent < agents, group, agents, groups, height, width)
    row, column = tl.floor(y).to(tl.int32), tl.floor(x).to(tl.int32)
    y, x = (y - row)[:, None], (x - column)[:, None]
    map_ptr += image * map_image + group * channels
    rows = (image * agents + agent) * (groups * channels) + group * channels
    dy = tl.zeros([BLOCK_M], tl.float32)
    dx = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, channels, BLOCK_N):
        channel = start + tl.arange(0, BLOCK_N)
        exists = (agent < agents)[:, None] & (channel < channels)[None, :]
        grad = tl.load(grad_ptr + rows[:, None] + channel[None, :], mask=exists, other=0.0).to(tl.float32)
        a = _pixel(map_ptr, row, column, height, width, map_token, channel, exists)
        b = _pixel(map_ptr, row, column + 1, height, width, map_token, channel, exists)
        c = _pixel(map_ptr, row + 1, column, height, width, map_token, channel, exists)
        d = _pixel(map_ptr, row + 1, column + 1, height, width, map_token, channel, exists)
        dy += tl.sum(grad * ((c + x * (d - c)) - (a + x * (b - a))), 1)
        dx += tl.sum(grad * ((b + y * (d - b)) - (a + y * (c - a))), 1)
    at = dpositions_ptr + ((image * agents + agent) * groups + group) * 2
    tl.store(at, dy * 0.5 * (height - 1), mask=agent < agents)
    tl.store(at + 1, dx * 0.5 * (width - 1), mask=agent < agents)


@triton.jit
def _backward_map(
    grad_ptr, positions_ptr, dmap_ptr, height, width, agents, groups, channels, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    parts, blocks = tl.cdiv(channels, BLOCK_N), tl.cdiv(height * width, BLOCK_M)
    channel = tl.program_id(0) % parts * BLOCK_N + tl.arange(0, BLOCK_N)
    group = tl.program_id(0) // parts % groups
    pixel = tl.program_id(0) // parts // groups % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    image = (tl.program_id(0) // parts // groups // blocks).to(tl.int64)
    row, column = (pixel // width).to(tl.float32)[:, None], (pixel % width).to(tl.float32)[:, None]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, agents, 64):
        agent = start + tl.arange(0, 64)
        is_agent = agent < agents
        y, x = _places(positions_ptr, image, agent, is_agent, group, agents, groups, height, width)
        share_y = tl.maximum(1.0 - tl.abs(row - y[None, :]), 0.0)
        shares = share_y * tl.maximum(1.0 - tl.abs(column - x[None, :]), 0.0)
        rows = (image * agents + agent) * (groups * channels) + group * channels
        exists = is_agent[:, None] & (channel < channels)[None, :]
        grad = tl.load(grad_ptr + rows[:, None] + channel[None, :], mask=exists, other=0.0)
        total += dot(rounded(shares, grad.dtype), grad, PRECISION)
    rows = (image * (height * width) + pixel) * (groups * channels) + group * channels
    exists = (pixel < height * width)[:, None] & (channel < channels)[None, :]
    tl.store(dmap_ptr + rows[:, None] + channel[None, :], rounded(total, dmap_ptr.dtype.element_ty), mask=exists)


def _channels(arguments: dict[str, Any], block: Block) -> float:
    return cdiv(arguments["channels"], block.n)


_run_forward = Kernel(_forward, [(16, 64, 4, 1), (16, 32, 4, 1), (16, 16, 1, 1)], lambda *_: 1)
_run_backward_positions = Kernel(_backward_positions, [(16, 64, 4, 1), (16, 32, 4, 1), (16, 16, 1, 1)], _channels)
_run_backward_map = Kernel(
    _backward_map,
    [(64, 64, 4, 1), (64, 32, 4, 1), (32, 32, 4, 1), (16, 16, 1, 1)],
    lambda arguments, _: cdiv(arguments["agents"], 64),
)


def _sizes(x: Tensor, positions: Tensor) -> dict[str, int]:
    groups = positions.shape[3]
    sizes = {"height": x.shape[1], "width": x.shape[2], "agents": positions.shape[1] * positions.shape[2]}
    return sizes | {"groups": groups, "channels": x.shape[3] // groups}


def forward(x: Tensor, positions: Tensor) -> Tensor:
    """See `ops.sample_agents`."""
    x, sizes = as_tokens(x), _sizes(x, positions)
    out = x.new_empty((*positions.shape[:3], x.shape[3]))
    _run_forward(
        lambda block: x.shape[0] * sizes["groups"] * cdiv(sizes["agents"], block.m)
        * cdiv(sizes["channels"], block.n),
        (padded(sizes["agents"]), padded(sizes["channels"])),
        map_ptr=x, positions_ptr=positions.contiguous(), out_ptr=out,
        map_image=x.stride(0), map_token=x.stride(2), **sizes,
    )  # fmt: skip
    return out


def backward(grad: Tensor, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the map and the positions."""
    x, sizes, grad = as_tokens(x), _sizes(x, positions), grad.contiguous()
    dmap = x.new_empty(x.shape)
    dpositions = torch.empty_like(positions, memory_format=torch.contiguous_format)
    positions = positions.contiguous()
    programs, size = x.shape[0] * sizes["groups"], (padded(sizes["agents"]), padded(sizes["channels"]))
    _run_backward_positions(
        lambda block: programs * cdiv(sizes["agents"], block.m), size,
        grad_ptr=grad, map_ptr=x, positions_ptr=positions, dpositions_ptr=dpositions,
        map_image=x.stride(0), map_token=x.stride(2), **sizes,
    )  # fmt: skip
    pixels = sizes["height"] * sizes["width"]
    _run_backward_map(
        lambda block: programs * cdiv(pixels, block.m) * cdiv(sizes["channels"], block.n),
        (padded(pixels), size[1]),
        grad_ptr=grad, positions_ptr=positions, dmap_ptr=dmap, **sizes, PRECISION=precision(x.dtype),
    )  # fmt: skip
    return dmap, dpositions
