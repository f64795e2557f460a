"""Depthwise convolution in steps, or with a large kernel, in Triton; forward and backward.

y = residual + conv(x) + bias at every so many pixels, where the residual may be nothing. The residual may reach beyond
the last pixels, and is all that there is there.

Letters: B batch, H x W map, Ho x Wo outputs, C channels, K x K kernel. Maps (B, H, W, C); weights (C/g, 1, K, K) and
biases (C/g), the same for g groups of channels.

_forward           One program: BLOCK_M outputs of one image, BLOCK_N channels.
_backward_map      One program: BLOCK_M pixels of one image, BLOCK_N channels. Only taps by which an output reads it.
_backward_weights  One program: a row of taps, BLOCK_N channels, all outputs of every so many images. Gradients of
                   weights and biases, (programs * g, C/g * (K*K + 1)) in float32, are added up afterwards.
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


@triton.jit
def _forward(
    map_ptr, weight_ptr, bias_ptr, residual_ptr, out_ptr,
    map_image, map_token, residual_image, residual_token, height, width, reached_h, reached_w, out_h, out_w,
    channels, own_channels,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, RESIDUAL: tl.constexpr, BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    parts, blocks = tl.cdiv(channels, BLOCK_N), tl.cdiv(out_h * out_w, BLOCK_M)
    channel = tl.program_id(0) % parts * BLOCK_N + tl.arange(0, BLOCK_N)
    number = tl.program_id(0) // parts % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    image = (tl.program_id(0) // parts // blocks).to(tl.int64)
    is_channel, own = channel < channels, channel % own_channels
    y, x = number // out_w, number % out_w
    reached = (y < reached_h) & (x < reached_w)
    out = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for tap_y in range(KERNEL):
        row = y * STRIDE + tap_y - KERNEL // 2
        for tap_x in tl.static_range(KERNEL):
            column = x * STRIDE + tap_x - KERNEL // 2
            inside = reached & (row >= 0) & (row < height) & (column >= 0) & (column < width)
            at = map_ptr + image * map_image + (row * width + column)[:, None] * map_token + channel[None, :]
            pixels = tl.load(at, mask=inside[:, None] & is_channel[None, :], other=0.0).to(tl.float32)
            tap = weight_ptr + own * (KERNEL * KERNEL) + tap_y * KERNEL + tap_x
            out += pixels * tl.load(tap, mask=is_channel, other=0.0).to(tl.float32)[None, :]
    if BIAS:
        bias = tl.load(bias_ptr + own, mask=is_channel, other=0.0).to(tl.float32)
        out += tl.where(reached[:, None], bias[None, :], 0.0)
    exists = (number < out_h * out_w)[:, None] & is_channel[None, :]
    if RESIDUAL:
        at = residual_ptr + image * residual_image + number[:, None] * residual_token + channel[None, :]
        out += tl.load(at, mask=exists, other=0.0).to(tl.float32)
    at = out_ptr + (image * out_h * out_w + number)[:, None] * channels + channel[None, :]
    tl.store(at, rounded(out, out_ptr.dtype.element_ty), mask=exists)


@triton.jit
def _backward_map(
    grad_ptr, weight_ptr, dmap_ptr, height, width, reached_h, reached_w, out_h, out_w, channels, own_channels,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    OUTPUTS: tl.constexpr = (KERNEL + STRIDE - 1) // STRIDE
    parts, blocks = tl.cdiv(channels, BLOCK_N), tl.cdiv(height * width, BLOCK_M)
    channel = tl.program_id(0) % parts * BLOCK_N + tl.arange(0, BLOCK_N)
    pixel = tl.program_id(0) // parts % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    image = (tl.program_id(0) // parts // blocks).to(tl.int64)
    exists = (pixel < height * width)[:, None] & (channel < channels)[None, :]
    below, right = pixel // width + KERNEL // 2, pixel % width + KERNEL // 2
    taps = weight_ptr + (channel % own_channels) * (KERNEL * KERNEL)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(OUTPUTS):
        y = below // STRIDE - step
        tap_y = below - y * STRIDE
        for across in tl.static_range(OUTPUTS):
            x = right // STRIDE - across
            tap_x = right - x * STRIDE
            reads = (y >= 0) & (y < reached_h) & (tap_y < KERNEL) & (x >= 0) & (x < reached_w) & (tap_x < KERNEL)
            mask = exists & reads[:, None]
            at = grad_ptr + ((image * out_h + y) * out_w + x)[:, None] * channels + channel[None, :]
            grad = tl.load(at, mask=mask, other=0.0).to(tl.float32)
            tap = taps[None, :] + (tap_y * KERNEL + tap_x)[:, None]
            total += grad * tl.load(tap, mask=mask, other=0.0).to(tl.float32)
    at = dmap_ptr + (image * height * width + pixel)[:, None] * channels + channel[None, :]
    tl.store(at, rounded(total, dmap_ptr.dtype.element_ty), mask=exists)


@triton.jit
def _backward_weights(
    grad_ptr, map_ptr, partial_ptr,
    map_image, map_token, height, width, reached_h, reached_w, out_h, out_w, channels, own_channels,
    batch, images_each,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    TAPS: tl.constexpr = KERNEL * KERNEL
    parts, blocks = tl.cdiv(channels, BLOCK_N), tl.cdiv(reached_h * reached_w, BLOCK_M)
    channel = tl.program_id(0) % parts * BLOCK_N + tl.arange(0, BLOCK_N)
    tap_y = tl.program_id(0) // parts % KERNEL
    share = tl.program_id(0) // parts // KERNEL
    is_channel = channel < channels
    sums = ()
    for _ in tl.static_range(KERNEL + 1):
        sums = sums + (tl.zeros([BLOCK_M, BLOCK_N], tl.float32),)
    for place in range(images_each * blocks):
        image = (share * images_each + place // blocks).to(tl.int64)
        number = place % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
        y, x = number // reached_w, number % reached_w
        exists = (number < reached_h * reached_w) & (image < batch)
        at = grad_ptr + ((image * out_h + y) * out_w + x)[:, None] * channels + channel[None, :]
        grad = tl.load(at, mask=exists[:, None] & is_channel[None, :], other=0.0).to(tl.float32)
        row = y * STRIDE + tap_y - KERNEL // 2
        grown = ()
        for tap_x in tl.static_range(KERNEL):
            column = x * STRIDE + tap_x - KERNEL // 2
            inside = exists & (row >= 0) & (row < height) & (column >= 0) & (column < width)
            at = map_ptr + image * map_image + (row * width + column)[:, None] * map_token + channel[None, :]
            pixels = tl.load(at, mask=inside[:, None] & is_channel[None, :], other=0.0).to(tl.float32)
            grown = grown + (sums[tap_x] + pixels * grad,)
        sums = grown + (sums[KERNEL] + grad,)
    own = channel % own_channels
    row_of_group = share * (channels // own_channels) + channel // own_channels
    partial_ptr += row_of_group * (own_channels * (TAPS + 1))
    for tap_x in tl.static_range(KERNEL):
        tl.store(partial_ptr + own * TAPS + tap_y * KERNEL + tap_x, tl.sum(sums[tap_x], 0), mask=is_channel)
    tl.store(partial_ptr + own_channels * TAPS + own, tl.sum(sums[KERNEL], 0), mask=is_channel & (tap_y == 0))


def _outputs_of_a_pixel(arguments: dict[str, Any], _: Block) -> float:
    return cdiv(arguments["KERNEL"], arguments["STRIDE"])


def _places(arguments: dict[str, Any], block: Block) -> float:
    return arguments["images_each"] * cdiv(arguments["reached_h"] * arguments["reached_w"], block.m)


_BLOCKS = [(16, 64, 4, 1), (16, 32, 2, 1), (16, 16, 1, 1)]
_run_forward = Kernel(_forward, _BLOCKS, lambda arguments, _: arguments["KERNEL"])
_run_backward_map = Kernel(_backward_map, [(32, 64, 4, 1), *_BLOCKS], _outputs_of_a_pixel)
_run_backward_weights = Kernel(_backward_weights, _BLOCKS, _places)


def _sizes(x: Tensor, weight: Tensor, out: Tensor, stride: int) -> dict[str, int]:
    (_, height, width, channels), (own_channels, _, kernel, _) = x.shape, weight.shape
    return {
        **{"height": height, "width": width, "reached_h": cdiv(height, stride), "reached_w": cdiv(width, stride)},
        **{"out_h": out.shape[1], "out_w": out.shape[2], "channels": channels, "own_channels": own_channels},
        **{"KERNEL": kernel, "STRIDE": stride},
    }


def forward(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, stride: int) -> Tensor:
    """See `ops.depthwise`; a bias or residual of no numbers is none."""
    x, adds = as_tokens(x), residual.numel() > 0
    batch, height, width, channels = x.shape
    sides = residual.shape[1:3] if adds else (cdiv(height, stride), cdiv(width, stride))
    residual = as_tokens(residual) if adds else x
    out = x.new_empty((batch, *sides, channels))
    places = out.shape[1] * out.shape[2]
    _run_forward(
        lambda block: batch * cdiv(places, block.m) * cdiv(channels, block.n), (padded(places), padded(channels)),
        map_ptr=x, weight_ptr=weight.contiguous(), bias_ptr=bias, residual_ptr=residual, out_ptr=out,
        map_image=x.stride(0), map_token=x.stride(2),
        residual_image=residual.stride(0), residual_token=residual.stride(2),
        **_sizes(x, weight, out, stride), RESIDUAL=adds, BIAS=bias.numel() > 0,
    )  # fmt: skip
    return out


def backward(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """Gradients of x, and of weight and bias, one behind the other."""
    x, grad, weight = as_tokens(x), grad.contiguous(), weight.contiguous()
    batch, height, width, channels = x.shape
    sizes = _sizes(x, weight, grad, stride)
    dx = x.new_empty(x.shape)
    _run_backward_map(
        lambda block: batch * cdiv(height * width, block.m) * cdiv(channels, block.n),
        (padded(height * width), padded(channels)),
        grad_ptr=grad, weight_ptr=weight, dmap_ptr=dx, **sizes,
    )  # fmt: skip
    kernel, own_channels = weight.shape[-1], weight.shape[0]
    shares = min(batch, max(1, PROGRAMS // (kernel * cdiv(channels, 64))))
    rows = shares * (channels // own_channels)
    partial = x.new_empty((rows, own_channels * (kernel * kernel + 1)), dtype=torch.float32)
    _run_backward_weights(
        lambda block: shares * kernel * cdiv(channels, block.n),
        (padded(sizes["reached_h"] * sizes["reached_w"]), padded(channels)),
        grad_ptr=grad, map_ptr=x, partial_ptr=partial, map_image=x.stride(0), map_token=x.stride(2),
        **sizes, batch=batch, images_each=cdiv(batch, shares),
    )  # fmt: skip
    return dx, partial[:, : weight.numel() + bias.numel()].sum(0).to(weight.dtype)
