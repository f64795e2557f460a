"""Depthwise convolution of maps with what surrounds it in one pass, in Triton; forward and backward.

y = act(residual + conv(x) + bias), where act is GELU or nothing, and the residual nothing, x itself or another map.

Letters: B batch, H x W map, C channels, K x K kernel. Maps (B, H, W, C); weights (C, 1, K, K).

_forward           One program: BLOCK_M pixels along a row, BLOCK_N channels.
_backward_weights  One program: BLOCK_N channels, every so many rows of the map. Gradients of weights and bias,
                   (programs, C*K*K + C) in float32, are added up afterwards; with GELU also the gradient before it,
                   for which the convolution is computed again.
The gradient of x is `_forward` of the gradient, with the kernel turned round.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch_triton import Block, Kernel, as_tokens, cdiv, padded
from .tiles_triton import rounded

PROGRAMS = 1056
"""Programs of the weights' gradient at most."""
NOTHING, ITSELF, OTHER = 0, 1, 2
"""What is added to the convolution."""


@triton.jit
def _taps(map_ptr, token, row, column, ky, kx, height, width, channel, is_channel, KERNEL: tl.constexpr):
    """The pixels (M, N) that meet tap (ky, kx) of the kernel."""
    y, x = row + ky - KERNEL // 2, column + kx - KERNEL // 2
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    at = map_ptr + (y * width + x)[:, None] * token + channel[None, :]
    return tl.load(at, mask=inside[:, None] & is_channel[None, :], other=0.0).to(tl.float32)


@triton.jit
def _convolved(
    map_ptr, weight_ptr, bias_ptr, residual_ptr, token, residual_token, row, column, height, width, channel, channels,
    KERNEL: tl.constexpr, RESIDUAL: tl.constexpr, BIAS: tl.constexpr, FLIP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """residual + conv + bias before the activation, (M, N)."""
    is_channel = channel < channels
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if BIAS:
        total += tl.load(bias_ptr + channel, mask=is_channel, other=0.0).to(tl.float32)[None, :]
    for ky in tl.static_range(KERNEL):
        for kx in tl.static_range(KERNEL):
            tap = KERNEL * KERNEL - 1 - ky * KERNEL - kx if FLIP else ky * KERNEL + kx
            weight = tl.load(weight_ptr + channel * (KERNEL * KERNEL) + tap, mask=is_channel, other=0.0).to(tl.float32)
            if (RESIDUAL == 1) and (ky == KERNEL // 2) and (kx == KERNEL // 2):
                weight += 1.0
            values = _taps(map_ptr, token, row, column, ky, kx, height, width, channel, is_channel, KERNEL)
            total += values * weight[None, :]
    if RESIDUAL == 2:
        total += _taps(
            residual_ptr, residual_token, row, column, KERNEL // 2, KERNEL // 2, height, width, channel, is_channel,
            KERNEL,
        )  # fmt: skip
    return total


@triton.jit
def _forward(
    map_ptr, weight_ptr, bias_ptr, residual_ptr, out_ptr,
    map_image, map_token, residual_image, residual_token, height, width, channels,
    KERNEL: tl.constexpr, RESIDUAL: tl.constexpr, BIAS: tl.constexpr, GELU: tl.constexpr, FLIP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    across, parts = tl.cdiv(width, BLOCK_M), tl.cdiv(channels, BLOCK_N)
    channel = tl.program_id(0) % parts * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.program_id(0) // parts % across * BLOCK_M + tl.arange(0, BLOCK_M)
    row = tl.program_id(0) // parts // across % height
    image = (tl.program_id(0) // parts // across // height).to(tl.int64)
    out = _convolved(
        map_ptr + image * map_image, weight_ptr, bias_ptr, residual_ptr + image * residual_image,
        map_token, residual_token, row, column, height, width, channel, channels,
        KERNEL, RESIDUAL, BIAS, FLIP, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    if GELU:
        out = 0.5 * out * (1.0 + tl.erf(out * 0.7071067811865476))
    at = ((image * height + row) * width + column)[:, None] * channels + channel[None, :]
    exists = (column < width)[:, None] & (channel < channels)[None, :]
    tl.store(out_ptr + at, rounded(out, out_ptr.dtype.element_ty), mask=exists)


@triton.jit
def _backward_weights(
    grad_ptr, map_ptr, weight_ptr, bias_ptr, before_ptr, partial_ptr,
    map_image, map_token, height, width, channels, all_rows, rows_each,
    KERNEL: tl.constexpr, RESIDUAL: tl.constexpr, BIAS: tl.constexpr, GELU: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    parts = tl.cdiv(channels, BLOCK_N)
    channel = tl.program_id(0) % parts * BLOCK_N + tl.arange(0, BLOCK_N)
    share = tl.program_id(0) // parts
    is_channel = channel < channels
    tap = tl.arange(0, 32)
    dweight = tl.zeros([32, BLOCK_N], tl.float32)
    for step in range(rows_each * tl.cdiv(width, BLOCK_M)):
        line = share * rows_each + step // tl.cdiv(width, BLOCK_M)
        column = step % tl.cdiv(width, BLOCK_M) * BLOCK_M + tl.arange(0, BLOCK_M)
        row, image = line % height, (line // height).to(tl.int64)
        exists = ((column < width) & (line < all_rows))[:, None] & is_channel[None, :]
        at = ((image * height + row) * width + column)[:, None] * channels + channel[None, :]
        grad = tl.load(grad_ptr + at, mask=exists, other=0.0).to(tl.float32)
        source = map_ptr + tl.where(line < all_rows, image, 0) * map_image
        if GELU:
            x = _convolved(
                source, weight_ptr, bias_ptr, map_ptr, map_token, map_token, row, column, height, width,
                channel, channels, KERNEL, RESIDUAL, BIAS, False, BLOCK_M, BLOCK_N,
            )  # fmt: skip
            density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
            grad *= 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * density
            before = rounded(grad, before_ptr.dtype.element_ty)
            tl.store(before_ptr + at, before, mask=exists)
        for ky in tl.static_range(KERNEL):
            for kx in tl.static_range(KERNEL):
                values = _taps(source, map_token, row, column, ky, kx, height, width, channel, is_channel, KERNEL)
                total = tl.sum(values * grad, 0)
                dweight += tl.where((tap == ky * KERNEL + kx)[:, None], total[None, :], 0.0)
        dweight += tl.where((tap == KERNEL * KERNEL)[:, None], tl.sum(grad, 0)[None, :], 0.0)
    # A channel's taps are adjacent, as in the weight; the biases follow.
    is_bias = (tap == KERNEL * KERNEL)[:, None]
    at = tl.where(is_bias, KERNEL * KERNEL * channels + channel, KERNEL * KERNEL * channel + tap[:, None])
    at += share * (KERNEL * KERNEL + 1) * channels
    tl.store(partial_ptr + at, dweight, mask=(tap <= KERNEL * KERNEL)[:, None] & is_channel[None, :])


def _lines(arguments: dict[str, Any], block: Block) -> float:
    return arguments["rows_each"] * cdiv(arguments["width"], block.m)


def _fits(block: Block, size: tuple[int, int], arguments: dict[str, Any]) -> bool:
    # Kernels of 5 x 5 taps leave two warps no registers for a wide tile.
    return block.m < 2 * size[0] and block.n <= size[1] and (block.warps != 2 or arguments["KERNEL"] == 3)


_BLOCKS = [(32, 64, 2, 1), (16, 64, 2, 1), (16, 64, 4, 1), (16, 16, 1, 1)]
_run_forward = Kernel(_forward, _BLOCKS, lambda *_: 1, _fits)
_run_backward_weights = Kernel(_backward_weights, _BLOCKS[2:], _lines, _fits)


def _sizes(x: Tensor, kernel: int) -> dict[str, int]:
    _, height, width, channels = x.shape
    return {"map_image": x.stride(0), "map_token": x.stride(2), "height": height, "width": width} | {
        "channels": channels,
        "KERNEL": kernel,
    }


def forward(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, gelu: bool, flip: bool = False) -> Tensor:
    """See `ops.depthwise`; a bias of no numbers is none. flip: take the kernel turned round."""
    itself = residual is x
    x, kernel = as_tokens(x), weight.shape[-1]
    other = x if residual is None or itself else as_tokens(residual)
    out = x.new_empty(x.shape)
    batch, height, width, channels = x.shape
    _run_forward(
        lambda block: batch * height * cdiv(width, block.m) * cdiv(channels, block.n),
        (padded(width), padded(channels)),
        map_ptr=x, weight_ptr=weight.contiguous(), bias_ptr=bias, residual_ptr=other, out_ptr=out,
        residual_image=other.stride(0), residual_token=other.stride(2), **_sizes(x, kernel),
        RESIDUAL=ITSELF if itself else NOTHING if residual is None else OTHER,
        BIAS=bias.numel() > 0, GELU=gelu, FLIP=flip,
    )  # fmt: skip
    return out


def backward(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, itself: bool, gelu: bool) -> tuple[Tensor, Tensor]:
    """Gradients of x, and of weight and bias, one behind the other. itself: x is the residual too."""
    x, grad, kernel = as_tokens(x), grad.contiguous(), weight.shape[-1]
    weight = weight.contiguous()
    batch, height, width, channels = x.shape
    before = torch.empty_like(grad) if gelu else grad
    shares = min(batch * height, max(1, PROGRAMS // cdiv(channels, 64)))
    rows_each = cdiv(batch * height, shares)
    partial = x.new_empty((shares, (kernel * kernel + 1) * channels), dtype=torch.float32)
    _run_backward_weights(
        lambda block: shares * cdiv(channels, block.n), (padded(width), padded(channels)),
        grad_ptr=grad, map_ptr=x, weight_ptr=weight, bias_ptr=bias, before_ptr=before,
        partial_ptr=partial, all_rows=batch * height, rows_each=rows_each, **_sizes(x, kernel),
        RESIDUAL=ITSELF if itself else NOTHING, BIAS=bias.numel() > 0, GELU=gelu,
    )  # fmt: skip
    dx = forward(before, weight, bias.new_empty(0), before if itself else None, gelu=False, flip=True)
    return dx, partial[:, : weight.numel() + bias.numel()].sum(0).to(weight.dtype)
