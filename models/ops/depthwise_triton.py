"""Depthwise convolution of maps with what surrounds it in one pass, in Triton; forward and backward.

y = act(residual + conv(x) + bias), where act is GELU or nothing, and the residual nothing, x itself or another map.

Letters: B batch, H x W map, C channels, K x K kernel. Maps (B, H, W, C); weights (C, 1, K, K).

_forward           One program: a band of ROWS rows, BLOCK_M pixels of each, BLOCK_N channels.
_backward_weights  One program: BLOCK_N channels of every so many bands. Gradients of weights and bias,
                   (programs, C*K*K + C) in float32, are added up afterwards; with GELU also the gradient before it,
                   for which the convolution is computed again.
A row of the map is read once for all rows of the band that it meets: instructions bind these kernels, not memory.
The gradient of x is `_forward` of the gradient, with the kernel turned round.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch_triton import Block, Kernel, as_tokens, cdiv, padded
from .tiles_triton import rounded

ROWS = tl.constexpr(7)
"""Rows of a band: those of the smallest map divide the larger ones, too."""
PROGRAMS = 1056
"""Programs of the weights' gradient at most."""
NOTHING, ITSELF, OTHER = 0, 1, 2
"""What is added to the convolution."""


@triton.jit
def _pixels(map_ptr, token, y, x, height, width, channel, channels):
    """Pixels (M, N) in float32; zeros beyond the map. y: a number or (M,); x: (M,)."""
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    at = map_ptr + (y * width + x)[:, None] * token + channel[None, :]
    return tl.load(at, mask=inside[:, None] & (channel < channels)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _row(map_ptr, token, y, column, height, width, channel, channels, KERNEL: tl.constexpr):
    """The pixels of a row that meet each column of the kernel, K of (M, N)."""
    found = ()
    for kx in tl.static_range(KERNEL):
        x = column + kx - KERNEL // 2
        found = found + (_pixels(map_ptr, token, y, x, height, width, channel, channels),)
    return found


@triton.jit
def _weights(weight_ptr, channel, channels, KERNEL: tl.constexpr, RESIDUAL: tl.constexpr, FLIP: tl.constexpr):
    """The kernel's taps, K*K of (1, N) in float32, with the identity of a residual connection."""
    taps = ()
    for tap in tl.static_range(KERNEL * KERNEL):
        at = channel * (KERNEL * KERNEL) + (KERNEL * KERNEL - 1 - tap if FLIP else tap)
        weight = tl.load(weight_ptr + at, mask=channel < channels, other=0.0).to(tl.float32)[None, :]
        if (RESIDUAL == 1) and (tap == KERNEL * KERNEL // 2):
            weight += 1.0
        taps = taps + (weight,)
    return taps


@triton.jit
def _convolved(pixels, weights, bias, FIRST: tl.constexpr, TAPS: tl.constexpr):
    """bias + conv of the pixels from the FIRST one on, (M, N)."""
    total = pixels[FIRST] * weights[0] + bias
    for tap in tl.static_range(1, TAPS):
        total += pixels[FIRST + tap] * weights[tap]
    return total


@triton.jit
def _normal(x):
    """The standard normal distribution up to x, and its density; to 1e-7 (Abramowitz and Stegun, 7.1.26).

    Half the instructions of erf and exp, since both come from one exponential.
    """
    bell = tl.exp(-0.5 * x * x)
    t = 1.0 / (1.0 + 0.23164189 * tl.abs(x))
    tail = t * (0.127414796 + t * (-0.142248368 + t * (0.710706871 + t * (-0.726576013 + t * 0.530702714)))) * bell
    return tl.where(x > 0, 1.0 - tail, tail), 0.3989422804014327 * bell


@triton.jit
def _gelu_in_half(x):
    """x times the standard normal distribution up to x, for maps in half precision; to 3e-6.

    The distribution is a logistic function of x (c0 + c1 x**2 + ..), fitted to the least error: two thirds of the
    instructions of `_normal`.
    """
    square = tl.minimum(x * x, 25.0)
    slope = 0.10522669 + square * (-3.6027517e-4 + square * (-8.8238418e-5 + square * 3.229023e-6))
    return x / (1.0 + tl.exp2(-x * (2.3020454 + square * slope)))


@triton.jit
def _bias(bias_ptr, channel, channels, BIAS: tl.constexpr):
    """(1, N) in float32."""
    if BIAS:
        return tl.load(bias_ptr + channel, mask=channel < channels, other=0.0).to(tl.float32)[None, :]
    return (channel * 0.0)[None, :]


@triton.jit
def _forward(
    map_ptr, weight_ptr, bias_ptr, residual_ptr, out_ptr,
    map_image, map_token, residual_image, residual_token, height, width, channels,
    KERNEL: tl.constexpr, RESIDUAL: tl.constexpr, BIAS: tl.constexpr, GELU: tl.constexpr, FLIP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    across, parts, bands = tl.cdiv(width, BLOCK_M), tl.cdiv(channels, BLOCK_N), tl.cdiv(height, ROWS)
    channel = tl.program_id(0) % parts * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.program_id(0) // parts % across * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(0) // parts // across % bands * ROWS
    image = (tl.program_id(0) // parts // across // bands).to(tl.int64)
    map_ptr += image * map_image
    residual_ptr += image * residual_image
    weights = _weights(weight_ptr, channel, channels, KERNEL, RESIDUAL, FLIP)
    bias = _bias(bias_ptr, channel, channels, BIAS)
    pixels = ()
    for step in tl.static_range(ROWS + KERNEL - 1):
        y = first + step - KERNEL // 2
        pixels = pixels + _row(map_ptr, map_token, y, column, height, width, channel, channels, KERNEL)
        if step >= KERNEL - 1:
            row = first + step - KERNEL + 1
            out = _convolved(pixels, weights, bias, (step - KERNEL + 1) * KERNEL, KERNEL * KERNEL)
            if RESIDUAL == 2:
                out += _pixels(residual_ptr, residual_token, row, column, height, width, channel, channels)
            if GELU and out_ptr.dtype.element_ty == tl.float32:
                below, _ = _normal(out)
                out *= below
            elif GELU:
                out = _gelu_in_half(out)
            at = ((image * height + row) * width + column)[:, None] * channels + channel[None, :]
            exists = ((column < width) & (row < height))[:, None] & (channel < channels)[None, :]
            tl.store(out_ptr + at, rounded(out, out_ptr.dtype.element_ty), mask=exists)


@triton.jit
def _backward_weights(
    grad_ptr, map_ptr, weight_ptr, bias_ptr, before_ptr, partial_ptr,
    map_image, map_token, height, width, channels, all_bands, bands_each,
    KERNEL: tl.constexpr, RESIDUAL: tl.constexpr, BIAS: tl.constexpr, GELU: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    TAPS: tl.constexpr = KERNEL * KERNEL
    across, parts, bands = tl.cdiv(width, BLOCK_M), tl.cdiv(channels, BLOCK_N), tl.cdiv(height, ROWS)
    channel = tl.program_id(0) % parts * BLOCK_N + tl.arange(0, BLOCK_N)
    share = tl.program_id(0) // parts
    if GELU:
        weights = _weights(weight_ptr, channel, channels, KERNEL, RESIDUAL, False)
        bias = _bias(bias_ptr, channel, channels, BIAS)
    sums = ()
    for _ in tl.static_range(TAPS + 1):
        sums = sums + (tl.zeros([BLOCK_M, BLOCK_N], tl.float32),)
    for place in range(bands_each * across):
        band = share * bands_each + place // across
        column = place % across * BLOCK_M + tl.arange(0, BLOCK_M)
        first = band % bands * ROWS
        image = tl.where(band < all_bands, band // bands, 0).to(tl.int64)
        source, end = map_ptr + image * map_image, tl.where(band < all_bands, height, 0)
        pixels = ()
        for step in tl.static_range(ROWS + KERNEL - 1):
            y = first + step - KERNEL // 2
            pixels = pixels + _row(source, map_token, y, column, end, width, channel, channels, KERNEL)
            if step >= KERNEL - 1:
                row = first + step - KERNEL + 1
                at = ((image * height + row) * width + column)[:, None] * channels + channel[None, :]
                exists = ((column < width) & (row < end))[:, None] & (channel < channels)[None, :]
                grad = tl.load(grad_ptr + at, mask=exists, other=0.0).to(tl.float32)
                if GELU:
                    x = _convolved(pixels, weights, bias, (step - KERNEL + 1) * KERNEL, TAPS)
                    below, density = _normal(x)
                    grad *= below + x * density
                    tl.store(before_ptr + at, rounded(grad, before_ptr.dtype.element_ty), mask=exists)
                grown = ()
                for tap in tl.static_range(TAPS):
                    grown = grown + (sums[tap] + pixels[(step - KERNEL + 1) * KERNEL + tap] * grad,)
                sums = grown + (sums[TAPS] + grad,)
    partial_ptr += share * (TAPS + 1) * channels
    for tap in tl.static_range(TAPS):  # a channel's taps are adjacent, as in the weight; the biases follow
        tl.store(partial_ptr + channel * TAPS + tap, tl.sum(sums[tap], 0), mask=channel < channels)
    tl.store(partial_ptr + TAPS * channels + channel, tl.sum(sums[TAPS], 0), mask=channel < channels)


def _trips(arguments: dict[str, Any], block: Block) -> float:
    return arguments["bands_each"] * cdiv(arguments["width"], block.m)


def _fits(block: Block, size: tuple[int, int], arguments: dict[str, Any]) -> bool:
    # A kernel of 5 x 5 taps leaves registers for four numbers of a tile in each thread, not for eight.
    return block.m < 2 * size[0] and block.n <= size[1] and (block.warps != 2 or arguments["KERNEL"] == 3)


def _fits_sums(block: Block, size: tuple[int, int], arguments: dict[str, Any]) -> bool:
    # Sums of 25 taps, or of 9 beside the convolution itself, leave them for two.
    few = arguments["KERNEL"] == 3 and not arguments["GELU"]
    return block.m < 2 * size[0] and block.n <= size[1] and (block.m == 4 or few)


_run_forward = Kernel(_forward, [(8, 64, 2, 1), (8, 64, 4, 1), (8, 16, 1, 1)], lambda *_: 1, _fits)
_SUMS = [(8, 64, 4, 1), (4, 64, 4, 1), (4, 16, 1, 1)]
_run_backward_weights = Kernel(_backward_weights, _SUMS, _trips, _fits_sums, float32=_SUMS[1:])


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
        lambda block: batch * cdiv(height, ROWS.value) * cdiv(width, block.m) * cdiv(channels, block.n),
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
    bands = batch * cdiv(height, ROWS.value)
    shares = min(bands, max(1, PROGRAMS // cdiv(channels, 64)))
    partial = x.new_empty((shares, (kernel * kernel + 1) * channels), dtype=torch.float32)
    _run_backward_weights(
        lambda block: shares * cdiv(channels, block.n), (padded(width), padded(channels)),
        grad_ptr=grad, map_ptr=x, weight_ptr=weight, bias_ptr=bias, before_ptr=before,
        partial_ptr=partial, all_bands=bands, bands_each=cdiv(bands, shares), **_sizes(x, kernel),
        RESIDUAL=ITSELF if itself else NOTHING, BIAS=bias.numel() > 0, GELU=gelu,
    )  # fmt: skip
    dx = forward(before, weight, bias.new_empty(0), before if itself else None, gelu=False, flip=True)
    return dx, partial[:, : weight.numel() + bias.numel()].sum(0).to(weight.dtype)
