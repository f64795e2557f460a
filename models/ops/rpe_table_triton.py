"""The table of relative position biases in Triton: bilinear reads, and the gradient of the table.

Letters as in `deformable_triton`, whose kernels sample the table; here are the reads they share, and

_backward  One program: a tile of one head's table and one share of the (image, agent) pairs. Each cell asks which
           tokens read it, the inverse of sampling, and adds up the gradients of their logits: a gather, no atomics. The
           sums of the shares, (shares, m, Th, Tw) in float32, are added up afterwards. A pair that does not meet the
           tile is skipped.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 1024
"""As many as fill a large GPU a few times; where there are fewer, the work of one is shared out."""
_TILE_ROWS, _TILE_COLUMNS = 8, 64


@triton.jit
def origins(positions_ptr, image, agent, is_agent, group, agents, groups, table_h, table_w):
    """Where in the table, in cells, the first token reads the agents' biases."""
    at = positions_ptr + ((image * agents + agent) * groups + group) * 2
    y = tl.load(at, mask=is_agent, other=0.0).to(tl.float32)
    x = tl.load(at + 1, mask=is_agent, other=0.0).to(tl.float32)
    return (table_h - 1) * 0.25 * (1.0 - y), (table_w - 1) * 0.25 * (1.0 - x)


@triton.jit
def _entry(table_ptr, row, column, table_h, table_w):
    inside = (row >= 0) & (row < table_h) & (column >= 0) & (column < table_w)
    return tl.load(table_ptr + row * table_w + column, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def sample(table_ptr, y, x, table_h, table_w):
    """Bilinear reads of one head's table, zeros outside, and their derivatives by y and x."""
    row, column = tl.floor(y), tl.floor(x)
    y, x = y - row, x - column
    row, column = row.to(tl.int32), column.to(tl.int32)
    a = _entry(table_ptr, row, column, table_h, table_w)
    b = _entry(table_ptr, row, column + 1, table_h, table_w)
    c = _entry(table_ptr, row + 1, column, table_h, table_w)
    d = _entry(table_ptr, row + 1, column + 1, table_h, table_w)
    upper, lower = a + x * (b - a), c + x * (d - c)
    return upper + y * (lower - upper), lower - upper, b - a + y * (d - c - b + a)


@triton.jit
def _backward(
    dlogits_ptr, positions_ptr, dtable_ptr,
    num_heads, groups, tokens, width, agents, table_h, table_w, step_y, step_x, inverse_y, inverse_x,
    images, first_image, first_agent, some_agents, shares,
    TAPS_Y: tl.constexpr, TAPS_X: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % num_heads
    share = tl.program_id(0) // num_heads % shares
    tile = tl.program_id(0) // num_heads // shares
    across = tl.cdiv(table_w, COLUMNS)
    top, left = tile // across * ROWS, tile % across * COLUMNS
    row, column = top + tl.arange(0, ROWS), left + tl.arange(0, COLUMNS)
    group = head // (num_heads // groups)
    height = tokens // width

    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    span = tl.cdiv(images * some_agents, shares)
    for pair in range(share * span, tl.minimum((share + 1) * span, images * some_agents)):
        image, agent = pair // some_agents, pair % some_agents
        y, x = origins(
            positions_ptr, first_image + image, first_agent + agent, True, group, agents, groups, table_h, table_w
        )
        met_y = (y < top + ROWS) & (y + (height - 1) * step_y > top - 1)
        met_x = (x < left + COLUMNS) & (x + (width - 1) * step_x > left - 1)
        if met_y & met_x:
            dlogits = dlogits_ptr + ((image.to(tl.int64) * num_heads + head) * some_agents + agent) * tokens
            first_i = (tl.floor((row - 1 - y) * inverse_y) + 1).to(tl.int32)
            first_j = (tl.floor((column - 1 - x) * inverse_x) + 1).to(tl.int32)
            for tap_y in range(TAPS_Y):
                i = first_i + tap_y
                share_y = tl.maximum(1.0 - tl.abs(i.to(tl.float32) * step_y + y - row), 0.0)
                for tap_x in range(TAPS_X):
                    j = first_j + tap_x
                    share_x = tl.maximum(1.0 - tl.abs(j.to(tl.float32) * step_x + x - column), 0.0)
                    is_i, is_j = (i >= 0) & (i < height), (j >= 0) & (j < width)
                    values = tl.load(
                        dlogits + i[:, None] * width + j[None, :], mask=is_i[:, None] & is_j[None, :], other=0.0
                    )
                    total += share_y[:, None] * share_x[None, :] * values.to(tl.float32)
    at = ((share * num_heads + head).to(tl.int64) * table_h + row[:, None]) * table_w + column[None, :]
    tl.store(dtable_ptr + at, total, mask=(row < table_h)[:, None] & (column < table_w)[None, :])


def room_for_sums(x: Tensor, *shape: int) -> Tensor:
    """Room for sums in float32, where `x` is."""
    return x.new_empty(shape, dtype=torch.float32)


def table_gradient(part: tuple[slice, slice], dlogits: Tensor, positions: Tensor, geometry: dict[str, Any]) -> Tensor:
    """What some images and agents, with gradients of logits `dlogits` (I, m, n, T), add to the table's gradient."""
    images, agents = (s.stop - s.start for s in part)
    num_heads, table_h, table_w = geometry["num_heads"], geometry["table_h"], geometry["table_w"]
    steps = geometry["step_y"], geometry["step_x"]
    sides = geometry["tokens"] // geometry["width"], geometry["width"]
    taps = [min(side, math.ceil(2 / step)) if step else side for side, step in zip(sides, steps, strict=True)]
    tiles = triton.cdiv(table_h, _TILE_ROWS) * triton.cdiv(table_w, _TILE_COLUMNS)
    shares = max(1, min(PROGRAMS // (tiles * num_heads), images * agents))
    dtable = room_for_sums(dlogits, shares, num_heads, table_h, table_w)
    _backward[(tiles * shares * num_heads,)](
        dlogits_ptr=dlogits, positions_ptr=positions, dtable_ptr=dtable,
        inverse_y=1 / (steps[0] or 1), inverse_x=1 / (steps[1] or 1), TAPS_Y=taps[0], TAPS_X=taps[1],
        images=images, first_image=part[0].start, first_agent=part[1].start, some_agents=agents, shares=shares,
        ROWS=_TILE_ROWS, COLUMNS=_TILE_COLUMNS, **geometry,
    )  # fmt: skip
    return dtable.sum(0)
