"""Residual addition and LayerNorm of rows of C channels in one pass, in Triton; forward and backward.

_forward   One program: BLOCK_M rows. Writes the sum x + branch (if there is a branch) and its norm.
_backward  One program: every so many blocks of rows. Statistics are computed again from the sum, in registers. Its sums
           for weight and bias, (programs, 2C) in float32, are added up afterwards, so that nothing is atomic.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch_triton import Block, Kernel, cdiv, padded
from .tiles_triton import rounded

PROGRAMS = 528
"""Programs of backward at most: a few for every multiprocessor of a large GPU."""


@triton.jit
def standardised(x, is_channel, channels, eps):
    """Rows (M, N) with mean 0 and variance 1, and the factors 1/std."""
    mean = tl.sum(x, 1) / channels
    x = tl.where(is_channel[None, :], x - mean[:, None], 0.0)
    factor = 1.0 / tl.sqrt_rn(tl.sum(x * x, 1) / channels + eps)
    return x * factor[:, None], factor


@triton.jit
def _forward(
    x_ptr, branch_ptr, weight_ptr, bias_ptr, sum_ptr, normed_ptr, rows, channels, eps,
    ADD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row, channel = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    is_channel = channel < channels
    at = row.to(tl.int64)[:, None] * channels + channel[None, :]
    exists = (row < rows)[:, None] & is_channel[None, :]
    x = tl.load(x_ptr + at, mask=exists, other=0.0).to(tl.float32)
    if ADD:
        x = rounded(x + tl.load(branch_ptr + at, mask=exists, other=0.0).to(tl.float32), sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + at, x, mask=exists)
        x = x.to(tl.float32)
    x, _ = standardised(x, is_channel, channels, eps)
    weight = tl.load(weight_ptr + channel, mask=is_channel, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + channel, mask=is_channel, other=0.0).to(tl.float32)
    normed = x * weight[None, :] + bias[None, :]
    tl.store(normed_ptr + at, rounded(normed, normed_ptr.dtype.element_ty), mask=exists)


@triton.jit
def _backward(
    dsum_ptr, dnormed_ptr, sum_ptr, weight_ptr, dx_ptr, partial_ptr, rows, channels, eps, trips,
    ADD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    channel = tl.arange(0, BLOCK_N)
    is_channel = channel < channels
    weight = tl.load(weight_ptr + channel, mask=is_channel, other=0.0).to(tl.float32)
    dweight = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    dbias = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for trip in range(trips):
        row = (tl.program_id(0) * trips + trip) * BLOCK_M + tl.arange(0, BLOCK_M)
        at = row.to(tl.int64)[:, None] * channels + channel[None, :]
        exists = (row < rows)[:, None] & is_channel[None, :]
        x = tl.load(sum_ptr + at, mask=exists, other=0.0).to(tl.float32)
        grad = tl.load(dnormed_ptr + at, mask=exists, other=0.0).to(tl.float32)
        x, factor = standardised(x, is_channel, channels, eps)
        dweight += grad * x
        dbias += grad
        grad *= weight[None, :]
        along = tl.sum(grad * x, 1) / channels
        dx = (grad - x * along[:, None] - (tl.sum(grad, 1) / channels)[:, None]) * factor[:, None]
        if ADD:
            dx += tl.load(dsum_ptr + at, mask=exists, other=0.0).to(tl.float32)
        tl.store(dx_ptr + at, rounded(dx, dx_ptr.dtype.element_ty), mask=exists)
    at = partial_ptr + tl.program_id(0) * (2 * channels) + channel
    tl.store(at, tl.sum(dweight, 0), mask=is_channel)
    tl.store(at + channels, tl.sum(dbias, 0), mask=is_channel)


def whole_rows(block: Block, size: tuple[int, int], _arguments: dict[str, Any]) -> bool:
    return block.n == size[1]


_BLOCKS = [(64, 16, 1, 1), (32, 32, 1, 1), (32, 64, 2, 1), (16, 128, 2, 1), (8, 256, 2, 1), (8, 512, 4, 1)]
_BLOCKS += [(4, 1024, 4, 1), (2, 2048, 4, 1), (1, 4096, 8, 1), (1, 8192, 8, 1)]
_run_forward = Kernel(_forward, _BLOCKS, lambda *_: 1, whole_rows)
_run_backward = Kernel(_backward, _BLOCKS, lambda arguments, _: arguments["trips"], whole_rows)


def forward(x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `ops.add_norm`: x + branch (x itself without one), and its norm, contiguous."""
    x = x.contiguous()
    normed = torch.empty_like(x)
    total = x if branch is None else torch.empty_like(x)
    rows, channels = x.numel() // x.shape[-1], x.shape[-1]
    _run_forward(
        lambda block: cdiv(rows, block.m), (padded(rows), padded(channels)),
        x_ptr=x, branch_ptr=x if branch is None else branch.contiguous(), weight_ptr=weight, bias_ptr=bias,
        sum_ptr=total, normed_ptr=normed, rows=rows, channels=channels, eps=eps, ADD=branch is not None,
    )  # fmt: skip
    return total, normed


def backward(dsum: Tensor | None, dnormed: Tensor, total: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients of the sum (and so of both that were added), and of weight and bias, one behind the other."""
    total, dnormed = total.contiguous(), dnormed.contiguous()
    dx = torch.empty_like(total)
    rows, channels = total.numel() // total.shape[-1], total.shape[-1]
    block_rows = next(block[0] for block in _BLOCKS if block[1] == padded(channels))
    trips = cdiv(cdiv(rows, block_rows), PROGRAMS)
    programs = cdiv(cdiv(rows, block_rows), trips)
    partial = total.new_empty((programs, 2 * channels), dtype=torch.float32)
    _run_backward(
        lambda _: programs, (padded(rows), padded(channels)),
        dsum_ptr=dx if dsum is None else dsum.contiguous(), dnormed_ptr=dnormed, sum_ptr=total, weight_ptr=weight,
        dx_ptr=dx, partial_ptr=partial, rows=rows, channels=channels, eps=eps, trips=trips, ADD=dsum is not None,
    )  # fmt: skip
    return dx, partial.sum(0).to(weight.dtype)
