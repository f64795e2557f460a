"""The agents' positions from what their offset network's convolution found, in one pass in Triton.

position = clamp(reference point + projection . GELU(LayerNorm(x)))

Letters: B batch, Ha x Wa agent grid, g groups, D channels of a group; a row is one agent of one group.

_forward   One program: BLOCK_M rows, all their channels.
_backward  One program: every so many blocks of rows. Everything is computed again. Its sums for the norm's weight and
           bias and for the projection, (programs, 3D) in float32, are added up afterwards: nothing is atomic.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch_triton import Kernel, cdiv, padded
from .norm_triton import PROGRAMS, standardised, whole_rows
from .tiles_triton import rounded


@triton.jit
def _moved(
    x_ptr, weight, bias, projection, row, rows, height, width, groups, channels, eps,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Rows standardised (M, N), their factors 1/std (M), the norm (M, N), GELU's normal distribution function at it
    (M, N), and positions before they are clamped, y and x (M).
    """
    channel = tl.arange(0, BLOCK_N)
    at = row.to(tl.int64)[:, None] * channels + channel[None, :]
    exists = (row < rows)[:, None] & (channel < channels)[None, :]
    x = tl.load(x_ptr + at, mask=exists, other=0.0).to(tl.float32)
    x, factor = standardised(x, channel < channels, channels, eps)
    normed = x * weight[None, :] + bias[None, :]
    share = 0.5 * (1.0 + tl.erf(normed * 0.7071067811865476))
    offset = tl.sum(normed * share * projection[None, :], 1)
    agent = row // groups
    y = (2 * (agent // width % height) + 1).to(tl.float32) / height - 1.0 + offset
    x_position = (2 * (agent % width) + 1).to(tl.float32) / width - 1.0 + offset
    return x, factor, normed, share, y, x_position


@triton.jit
def _parameter(ptr, channels, BLOCK_N: tl.constexpr):
    channel = tl.arange(0, BLOCK_N)
    return tl.load(ptr + channel, mask=channel < channels, other=0.0).to(tl.float32)


@triton.jit
def _forward(
    x_ptr, weight_ptr, bias_ptr, projection_ptr, positions_ptr, rows, height, width, groups, channels, eps,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    weight, bias = _parameter(weight_ptr, channels, BLOCK_N), _parameter(bias_ptr, channels, BLOCK_N)
    projection = _parameter(projection_ptr, channels, BLOCK_N)
    _, _, _, _, y, x = _moved(
        x_ptr, weight, bias, projection, row, rows, height, width, groups, channels, eps, BLOCK_M, BLOCK_N
    )  # fmt: skip
    tl.store(positions_ptr + 2 * row, tl.minimum(tl.maximum(y, -1.0), 1.0), mask=row < rows)
    tl.store(positions_ptr + 2 * row + 1, tl.minimum(tl.maximum(x, -1.0), 1.0), mask=row < rows)


@triton.jit
def _backward(
    grad_ptr, x_ptr, weight_ptr, bias_ptr, projection_ptr, dx_ptr, partial_ptr,
    rows, height, width, groups, channels, eps, trips,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    channel = tl.arange(0, BLOCK_N)
    weight, bias = _parameter(weight_ptr, channels, BLOCK_N), _parameter(bias_ptr, channels, BLOCK_N)
    projection = _parameter(projection_ptr, channels, BLOCK_N)
    dweight = tl.zeros([BLOCK_N], tl.float32)
    dbias = tl.zeros([BLOCK_N], tl.float32)
    dprojection = tl.zeros([BLOCK_N], tl.float32)
    for trip in range(trips):
        row = (tl.program_id(0) * trips + trip) * BLOCK_M + tl.arange(0, BLOCK_M)
        standard, factor, normed, share, y, x = _moved(
            x_ptr, weight, bias, projection, row, rows, height, width, groups, channels, eps, BLOCK_M, BLOCK_N
        )  # fmt: skip
        dy = tl.load(grad_ptr + 2 * row, mask=row < rows, other=0.0)
        dx = tl.load(grad_ptr + 2 * row + 1, mask=row < rows, other=0.0)
        doffset = tl.where(tl.abs(y) <= 1.0, dy, 0.0) + tl.where(tl.abs(x) <= 1.0, dx, 0.0)
        dprojection += tl.sum(normed * share * doffset[:, None], 0)
        density = 0.3989422804014327 * tl.exp(-0.5 * normed * normed)
        grad = doffset[:, None] * projection[None, :] * (share + normed * density)
        dweight += tl.sum(grad * standard, 0)
        dbias += tl.sum(grad, 0)
        grad *= weight[None, :]
        along = tl.sum(grad * standard, 1) / channels
        grad = (grad - standard * along[:, None] - (tl.sum(grad, 1) / channels)[:, None]) * factor[:, None]
        at = row.to(tl.int64)[:, None] * channels + channel[None, :]
        exists = (row < rows)[:, None] & (channel < channels)[None, :]
        tl.store(dx_ptr + at, rounded(grad, dx_ptr.dtype.element_ty), mask=exists)
    at = partial_ptr + tl.program_id(0) * (3 * channels) + channel
    tl.store(at, dweight, mask=channel < channels)
    tl.store(at + channels, dbias, mask=channel < channels)
    tl.store(at + 2 * channels, dprojection, mask=channel < channels)


_BLOCKS = [(32, 16, 1, 1), (32, 32, 2, 1), (32, 64, 4, 1), (16, 128, 4, 1), (8, 256, 4, 1), (4, 512, 4, 1)]
_BLOCKS += [(2, 1024, 4, 1), (1, 2048, 4, 1), (1, 4096, 8, 1), (1, 8192, 8, 1)]
_run_forward = Kernel(_forward, _BLOCKS, lambda *_: 1, whole_rows)
_run_backward = Kernel(_backward, _BLOCKS, lambda arguments, _: arguments["trips"], whole_rows)


def _sizes(x: Tensor) -> dict[str, int]:
    _, height, width, groups, channels = x.shape
    sizes = {"rows": x.numel() // channels, "height": height, "width": width, "groups": groups}
    return sizes | {"channels": channels}


def forward(x: Tensor, weight: Tensor, bias: Tensor, projection: Tensor, eps: float) -> Tensor:
    """See `ops.agent_positions`: (B, Ha, Wa, g, D) -> (B, Ha, Wa, g, 2) in float32."""
    sizes = _sizes(x)
    positions = x.new_empty((*x.shape[:-1], 2), dtype=torch.float32)
    _run_forward(
        lambda block: cdiv(sizes["rows"], block.m), (padded(sizes["rows"]), padded(sizes["channels"])),
        x_ptr=x.contiguous(), weight_ptr=weight, bias_ptr=bias, projection_ptr=projection, positions_ptr=positions,
        **sizes, eps=eps,
    )  # fmt: skip
    return positions


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, projection: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradients of x, and of weight, bias and projection, one behind the other."""
    sizes = _sizes(x)
    x = x.contiguous()
    dx = torch.empty_like(x)
    blocks = cdiv(sizes["rows"], next(block[0] for block in _BLOCKS if block[1] == padded(sizes["channels"])))
    trips = cdiv(blocks, PROGRAMS)
    programs = cdiv(blocks, trips)
    partial = x.new_empty((programs, 3 * sizes["channels"]), dtype=torch.float32)
    _run_backward(
        lambda _: programs, (padded(sizes["rows"]), padded(sizes["channels"])),
        grad_ptr=grad.contiguous(), x_ptr=x, weight_ptr=weight, bias_ptr=bias, projection_ptr=projection, dx_ptr=dx,
        partial_ptr=partial, **sizes, eps=eps, trips=trips,
    )  # fmt: skip
    return dx, partial.sum(0).to(weight.dtype)
