"""The table of relative position biases in Triton: bilinear reads, and the gradient of the table.

Letters as in `deformable_triton`, whose kernels read the table by `sample`.

_pack      The four entries between which a read lies, side by side, so that one read brings them: entry (y, x) of the
           packed table holds table[y:y+2, x:x+2], zeros beyond the table, as 8 bytes in half precision. In float32 it
           holds table[y, x:x+2], and the packed table has one row more. Reads need no mask: displacements lie in the
           table. Beside it, for rows of agents filled up to 64: where each begins, (B, g, row).

The table's gradient, from gradients of logits (I, m, n, pitch) of some images and agents:

_gather_on_cells  Where one token step is one table cell, an agent's gradients are one H x W block, which is added to
                  the table four times, shifted by a cell, by four weights. One program: ROWS x COLUMNS cells of one
                  head's table and one share of the (image, agent) pairs; four float32 sums (shares, 4, m, Th, Tw).
_add_shifted      Adds up the shares, and the four sums by their shifts.
_gather           At other sizes. Each cell asks which tokens read it, inverting sampling; sums (shares, m, Th, Tw).

Every sum has a fixed order: no atomics. Pairs that do not meet a program's cells are skipped.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch_triton import Block, Kernel, cdiv, padded
from .tiles_triton import rounded

PROGRAMS = 1024  # as many as fill a large GPU a few times; where there are fewer, the work of one is shared out


@triton.jit
def _as_bits(x, type: tl.constexpr):
    """Numbers (float32) rounded to `type`, their bits as int64."""
    if type == tl.float32:
        bits = x.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    else:
        bits = rounded(x, type).to(tl.int16, bitcast=True).to(tl.int64) & 0xFFFF
    return bits


@triton.jit
def origins(positions_ptr, image, agent, is_agent, group, agents, groups, table_h, table_w):
    """Where in the table, in cells, the first token reads the agents' biases."""
    at = positions_ptr + ((image * agents + agent) * groups + group) * 2
    y = tl.load(at, mask=is_agent, other=0.0).to(tl.float32)
    x = tl.load(at + 1, mask=is_agent, other=0.0).to(tl.float32)
    return (table_h - 1) * 0.25 * (1.0 - y), (table_w - 1) * 0.25 * (1.0 - x)


@triton.jit
def load_agents(begins_ptr, places_ptr, row, agent, all_agents):
    """What `pack` noted of agents: where in the packed table they begin, and how far beyond that cell (or where)."""
    at = row.to(tl.int32) + agent
    return tl.load(begins_ptr + at), tl.load(places_ptr + at), tl.load(places_ptr + all_agents + at)


@triton.jit
def _cell(at, last):
    """The cell below a place, at most `last`, and how far beyond it the place is."""
    cell = tl.minimum(tl.maximum(tl.floor(at).to(tl.int32), 0), last)
    return cell, at - cell.to(tl.float32)


@triton.jit
def _pack_table(table_ptr, packed_ptr, program, size, table_h, table_w, type: tl.constexpr, BLOCK_M: tl.constexpr):
    cell = program % tl.cdiv(size, BLOCK_M) * BLOCK_M + tl.arange(0, BLOCK_M)
    head = program // tl.cdiv(size, BLOCK_M)
    row, column = cell // table_w, cell % table_w
    table = table_ptr + head * table_h * table_w + cell
    right = column + 1 < table_w
    a = tl.load(table, mask=row < table_h, other=0.0).to(tl.float32)
    b = tl.load(table + 1, mask=(row < table_h) & right, other=0.0).to(tl.float32)
    if type == tl.float32:
        word = _as_bits(a, type) | (_as_bits(b, type) << 32)
    else:
        c = tl.load(table + table_w, mask=row + 1 < table_h, other=0.0).to(tl.float32)
        d = tl.load(table + table_w + 1, mask=(row + 1 < table_h) & right, other=0.0).to(tl.float32)
        word = _as_bits(a, type) | (_as_bits(b, type) << 16) | (_as_bits(c, type) << 32) | (_as_bits(d, type) << 48)
    tl.store(packed_ptr + head * size + cell, word, mask=cell < size)


@triton.jit
def _pack(
    table_ptr, packed_ptr, positions_ptr, begins_ptr, places_ptr, type_ptr,
    num_heads, packed_size, table_h, table_w, images, groups, agents, row_of_agents,
    ON_CELLS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    type: tl.constexpr = type_ptr.dtype.element_ty
    programs = num_heads * tl.cdiv(packed_size, BLOCK_M)
    if tl.program_id(0) < programs:
        _pack_table(table_ptr, packed_ptr, tl.program_id(0), packed_size, table_h, table_w, type, BLOCK_M)
    else:
        n = (tl.program_id(0) - programs) * BLOCK_M + tl.arange(0, BLOCK_M)
        total = images * groups * row_of_agents
        agent = n % row_of_agents
        group, image = n // row_of_agents % groups, n // row_of_agents // groups
        exists = (n < total) & (agent < agents)
        y, x = origins(positions_ptr, image.to(tl.int64), agent, exists, group, agents, groups, table_h, table_w)
        if ON_CELLS:
            row, y = _cell(y, table_h // 2)
            column, x = _cell(x, table_w // 2)
            tl.store(begins_ptr + n, row * table_w + column, mask=n < total)
        tl.store(places_ptr + n, y, mask=n < total)
        tl.store(places_ptr + total + n, x, mask=n < total)


@triton.jit
def _two(word, type: tl.constexpr):
    """The two numbers of a 4-byte word."""
    if type == tl.bfloat16:
        low, high = (word << 16).to(tl.float32, bitcast=True), (word & -65536).to(tl.float32, bitcast=True)
    else:
        low = (word & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        high = (word >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return low, high


@triton.jit
def _four(packed_ptr, at, table_w, type: tl.constexpr):
    """The entries of the cells at `at`: upper left, upper right, lower left, lower right."""
    word = tl.load(packed_ptr + at)
    low, high = word.to(tl.int32), (word >> 32).to(tl.int32)
    if type == tl.float32:
        a, b = low.to(tl.float32, bitcast=True), high.to(tl.float32, bitcast=True)
        below = tl.load(packed_ptr + at + table_w)
        c = below.to(tl.int32).to(tl.float32, bitcast=True)
        d = (below >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    else:
        a, b = _two(low, type)
        c, d = _two(high, type)
    return a, b, c, d


@triton.jit
def sample(
    packed_ptr, begin, y, x, token, width, step_y, step_x, table_h, table_w,
    ON_CELLS: tl.constexpr, AGENTS_FIRST: tl.constexpr, type: tl.constexpr,
):  # fmt: skip
    """Biases of agents, prepared by `pack`, for tokens, and their derivatives by y and x.

    (agents, tokens) or, unless AGENTS_FIRST, (tokens, agents). ON_CELLS: a token step is a table cell.
    """
    row, column = token // width, token % width
    if ON_CELLS:
        step = row * table_w + column
        if AGENTS_FIRST:
            at, y, x = begin[:, None] + step[None, :], y[:, None], x[:, None]
        else:
            at, y, x = step[:, None] + begin[None, :], y[None, :], x[None, :]
    else:
        row, column = row.to(tl.float32) * step_y, column.to(tl.float32) * step_x
        if AGENTS_FIRST:
            y, x = y[:, None] + row[None, :], x[:, None] + column[None, :]
        else:
            y, x = row[:, None] + y[None, :], column[:, None] + x[None, :]
        cell_y, y = _cell(y, table_h - 1)
        cell_x, x = _cell(x, table_w - 1)
        at = cell_y * table_w + cell_x
    a, b, c, d = _four(packed_ptr, at, table_w, type)
    upper, lower = a + x * (b - a), c + x * (d - c)
    by_y = lower - upper
    return upper + y * by_y, by_y, (b - a) + y * ((d - c) - (b - a))


@triton.jit
def _gather_on_cells(
    dlogits_ptr, positions_ptr, sums_ptr,
    num_heads, groups, height, width, agents, table_h, table_w, pitch,
    images, first_image, first_agent, some_agents, shares,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % num_heads
    share = tl.program_id(0) // num_heads % shares
    tile = tl.program_id(0) // num_heads // shares
    across = tl.cdiv(table_w, BLOCK_N)
    top, left = tile // across * BLOCK_M, tile % across * BLOCK_N
    row, column = top + tl.arange(0, BLOCK_M), left + tl.arange(0, BLOCK_N)
    group = head // (num_heads // groups)
    offset = row[:, None] * width + column[None, :]

    upper_left = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    upper_right = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    lower_left = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    lower_right = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    span = tl.cdiv(images * some_agents, shares)
    for pair in range(share * span, tl.minimum((share + 1) * span, images * some_agents)):
        image, agent = pair // some_agents, pair % some_agents
        y, x = origins(
            positions_ptr, first_image + image, first_agent + agent, True, group, agents, groups, table_h, table_w
        )
        cell_y, y = _cell(y, table_h // 2)
        cell_x, x = _cell(x, table_w // 2)
        if (cell_y < top + BLOCK_M) & (cell_y + height > top) & (cell_x < left + BLOCK_N) & (cell_x + width > left):
            is_row = (row >= cell_y) & (row < cell_y + height)
            is_column = (column >= cell_x) & (column < cell_x + width)
            begin = ((image.to(tl.int64) * num_heads + head) * some_agents + agent) * pitch - (cell_y * width + cell_x)
            values = tl.load(dlogits_ptr + begin + offset, mask=is_row[:, None] & is_column[None, :], other=0.0)
            values = values.to(tl.float32)
            upper_left += (1.0 - y) * (1.0 - x) * values
            upper_right += (1.0 - y) * x * values
            lower_left += y * (1.0 - x) * values
            lower_right += y * x * values
    size = num_heads * table_h * table_w
    at = sums_ptr + share.to(tl.int64) * 4 * size + (head * table_h + row[:, None]) * table_w + column[None, :]
    exists = (row < table_h)[:, None] & (column < table_w)[None, :]
    tl.store(at, upper_left, mask=exists)
    tl.store(at + size, upper_right, mask=exists)
    tl.store(at + 2 * size, lower_left, mask=exists)
    tl.store(at + 3 * size, lower_right, mask=exists)


@triton.jit
def _add_shifted(sums_ptr, dtable_ptr, cells, table_h, table_w, shares, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    cell = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row, column = cell // table_w % table_h, cell % table_w
    exists, down, right = cell < cells, row > 0, column > 0
    total = tl.load(dtable_ptr + cell, mask=exists, other=0.0)
    for share in range(shares):
        at = sums_ptr + share * 4 * cells + cell
        total += tl.load(at, mask=exists, other=0.0)
        total += tl.load(at + cells - 1, mask=exists & right, other=0.0)
        total += tl.load(at + 2 * cells - table_w, mask=exists & down, other=0.0)
        total += tl.load(at + 3 * cells - table_w - 1, mask=exists & down & right, other=0.0)
    tl.store(dtable_ptr + cell, total, mask=exists)


@triton.jit
def _gather(
    dlogits_ptr, positions_ptr, sums_ptr,
    num_heads, groups, height, width, agents, table_h, table_w, pitch,
    images, first_image, first_agent, some_agents, shares,
    step_y, step_x, inverse_y, inverse_x, taps_y, taps_x,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % num_heads
    share = tl.program_id(0) // num_heads % shares
    tile = tl.program_id(0) // num_heads // shares
    across = tl.cdiv(table_w, BLOCK_N)
    top, left = tile // across * BLOCK_M, tile % across * BLOCK_N
    row, column = top + tl.arange(0, BLOCK_M), left + tl.arange(0, BLOCK_N)
    group = head // (num_heads // groups)

    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    span = tl.cdiv(images * some_agents, shares)
    for pair in range(share * span, tl.minimum((share + 1) * span, images * some_agents)):
        image, agent = pair // some_agents, pair % some_agents
        y, x = origins(
            positions_ptr, first_image + image, first_agent + agent, True, group, agents, groups, table_h, table_w
        )
        met_y = (y < top + BLOCK_M) & (y + (height - 1) * step_y > top - 1)
        met_x = (x < left + BLOCK_N) & (x + (width - 1) * step_x > left - 1)
        if met_y & met_x:
            dlogits = dlogits_ptr + ((image.to(tl.int64) * num_heads + head) * some_agents + agent) * pitch
            first_i = (tl.floor((row - 1 - y) * inverse_y) + 1).to(tl.int32)
            first_j = (tl.floor((column - 1 - x) * inverse_x) + 1).to(tl.int32)
            for tap_y in range(taps_y):
                i = first_i + tap_y
                share_y = tl.maximum(1.0 - tl.abs(i.to(tl.float32) * step_y + y - row), 0.0)
                for tap_x in range(taps_x):
                    j = first_j + tap_x
                    share_x = tl.maximum(1.0 - tl.abs(j.to(tl.float32) * step_x + x - column), 0.0)
                    is_i, is_j = (i >= 0) & (i < height), (j >= 0) & (j < width)
                    tokens = i[:, None] * width + j[None, :]
                    values = tl.load(dlogits + tokens, mask=is_i[:, None] & is_j[None, :], other=0.0)
                    total += share_y[:, None] * share_x[None, :] * values.to(tl.float32)
    at = ((share * num_heads + head).to(tl.int64) * table_h + row[:, None]) * table_w + column[None, :]
    tl.store(sums_ptr + at, total, mask=(row < table_h)[:, None] & (column < table_w)[None, :])


def _pairs(arguments: dict[str, Any], block: Block) -> float:
    """Pairs that meet a program's cells, on average."""
    pairs = arguments["images"] * arguments["some_agents"] / arguments["shares"]
    for side, cells, tile in (("height", "table_h", block.m), ("width", "table_w", block.n)):
        tiles = cdiv(arguments[cells], tile)
        pairs *= min(1, (arguments[side] + tile) / (tiles * tile))
    return pairs


_run_pack = Kernel(_pack, [(1024, 1, 4, 1), (256, 1, 4, 1), (16, 1, 1, 1)], lambda *_: 1)
_run_gather_on_cells = Kernel(
    _gather_on_cells, [(16, 128, 4, 1), (16, 64, 2, 1), (16, 32, 1, 1), (32, 32, 2, 1), (16, 16, 1, 1)], _pairs
)
_run_add_shifted = Kernel(_add_shifted, [(256, 1, 4, 1), (16, 1, 1, 1)], lambda arguments, _: arguments["shares"])
_run_gather = Kernel(
    _gather,
    [(8, 64, 4, 1), (8, 16, 1, 1)],
    lambda arguments, block: _pairs(arguments, block) * arguments["taps_y"] * arguments["taps_x"],
)


def pack(q: Tensor, rpe_table: Tensor, positions: Tensor, on_cells: bool) -> dict[str, Any]:
    """The packed table for q's type, and agents as `load_agents` reads them, as arguments of the kernels."""
    heads, table_h, table_w = rpe_table.shape
    images, agents, groups = len(positions), positions.shape[1] * positions.shape[2], positions.shape[3]
    size = (table_h + (q.dtype == torch.float32)) * table_w
    row = 64 * cdiv(agents, 64)
    packed = rpe_table.new_empty((heads, size), dtype=torch.int64)
    begins = rpe_table.new_empty(images * groups * row, dtype=torch.int32)
    places = rpe_table.new_empty(2 * images * groups * row, dtype=torch.float32)
    total = images * groups * row
    _run_pack(
        lambda block: heads * cdiv(size, block.m) + cdiv(total, block.m), (padded(max(size, total)), 1),
        table_ptr=rpe_table.contiguous(), packed_ptr=packed, positions_ptr=positions, begins_ptr=begins,
        places_ptr=places, type_ptr=q.new_empty(0), num_heads=heads, packed_size=size, table_h=table_h, table_w=table_w,
        images=images, groups=groups, agents=agents, row_of_agents=row, ON_CELLS=on_cells,
    )  # fmt: skip
    arguments = {"packed_ptr": packed, "begins_ptr": begins, "places_ptr": places}
    return arguments | {"packed_size": size, "row_of_agents": row, "all_agents": total}


def add_table_gradient_(
    dtable: Tensor, part: tuple[slice, slice], dlogits: Tensor, positions: Tensor, geometry: dict[str, Any], pitch: int
) -> None:
    """Add to `dtable`, float32, what some images and agents give: gradients of logits `dlogits` (I, m, n, pitch)."""
    images, agents = (s.stop - s.start for s in part)
    num_heads, table_h, table_w = dtable.shape
    names = ("num_heads", "groups", "width", "agents", "table_h", "table_w")
    arguments = {name: geometry[name] for name in names} | {"height": geometry["tokens"] // geometry["width"]}
    arguments |= {"dlogits_ptr": dlogits, "positions_ptr": positions, "images": images, "pitch": pitch}
    arguments |= {"first_image": part[0].start, "first_agent": part[1].start, "some_agents": agents}
    on_cells = geometry["ON_CELLS"]
    size = padded(table_h), padded(table_w)
    tiles = cdiv(table_h, 16 if on_cells else 8)
    tiles *= cdiv(table_w, min(128, size[1]) if on_cells else 64)
    shares = max(1, min(PROGRAMS // (tiles * num_heads), images * agents))

    def programs(block: Block) -> int:
        return cdiv(table_h, block.m) * cdiv(table_w, block.n) * shares * num_heads

    if on_cells:
        sums = dtable.new_empty((shares, 4, *dtable.shape))
        _run_gather_on_cells(programs, size, **arguments, sums_ptr=sums, shares=shares)
        _run_add_shifted(
            lambda block: cdiv(dtable.numel(), block.m), (padded(dtable.numel()), 1),
            sums_ptr=sums, dtable_ptr=dtable, cells=dtable.numel(), table_h=table_h, table_w=table_w, shares=shares,
        )  # fmt: skip
        return
    steps = geometry["step_y"], geometry["step_x"]
    sides = arguments["height"], arguments["width"]
    taps = [min(side, math.ceil(2 / step)) if step else side for side, step in zip(sides, steps, strict=True)]
    sums = dtable.new_empty((shares, *dtable.shape))
    _run_gather(
        *(programs, size), **arguments, sums_ptr=sums, shares=shares, step_y=steps[0], step_x=steps[1],
        inverse_y=1 / (steps[0] or 1), inverse_x=1 / (steps[1] or 1), taps_y=taps[0], taps_x=taps[1],
    )  # fmt: skip
    dtable += sums.sum(0)
