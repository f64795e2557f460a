"""Routing of windows in Triton: their means, then the windows of highest affinity.

Letters: B batch, H x W maps, P windows, w tokens per window, C channels, k routed windows.

_means   One program: BLOCK_M tokens at a time, of one window of the queries or keys or of several small ones of all
         images, BLOCK_N channels. Means (B, P, C) in the map's type.
_choose  One program: BLOCK_M query windows of one image against all key windows, whose largest logits are taken out one
         by one; of equal ones the first window's. NaN is the largest.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch_triton import Block, Kernel, as_tokens, cdiv, padded, precision, strides
from .tiles_triton import dot, rounded


@triton.jit
def _mean(
    map_ptr, mean_ptr, group, channel, map_image, map_token, window_h, window_w, columns, windows, all_windows,
    channels, TOKENS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    AT_ONCE: tl.constexpr = TOKENS if TOKENS < BLOCK_M else BLOCK_M
    WINDOWS: tl.constexpr = BLOCK_M // AT_ONCE
    number = group * WINDOWS + tl.arange(0, WINDOWS)
    image, window, width = (number // windows).to(tl.int64), number % windows, columns * window_w
    corner = window // columns * window_h * width + window % columns * window_w
    first = map_ptr + image * map_image + corner * map_token
    total = tl.zeros([WINDOWS, AT_ONCE, BLOCK_N], tl.float32)
    for start in range(0, window_h * window_w, AT_ONCE):
        token = start + tl.arange(0, AT_ONCE)
        at = (token // window_w * width + token % window_w) * map_token
        exists = (number < all_windows)[:, None] & (token < window_h * window_w)[None, :]
        exists = exists[:, :, None] & (channel < channels)[None, None, :]
        pixels = first[:, None, None] + at[None, :, None] + channel[None, None, :]
        total += tl.load(pixels, mask=exists, other=0.0).to(tl.float32)
    mean = rounded(tl.sum(total, 1) / (window_h * window_w), mean_ptr.dtype.element_ty)
    at = mean_ptr + number[:, None] * channels + channel[None, :]
    tl.store(at, mean, mask=(number < all_windows)[:, None] & (channel < channels)[None, :])


@triton.jit
def _means(
    q_ptr, k_ptr, q_mean_ptr, k_mean_ptr, q_image, k_image, q_token, k_token, q_h, q_w, k_h, k_w,
    columns, windows, all_windows, channels,
    Q_TOKENS: tl.constexpr, K_TOKENS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    parts = tl.cdiv(channels, BLOCK_N)
    channel = tl.program_id(0) % parts * BLOCK_N + tl.arange(0, BLOCK_N)
    group = tl.program_id(0) // parts
    groups = tl.cdiv(all_windows, tl.maximum(BLOCK_M // Q_TOKENS, 1))
    if group < groups:
        _mean(
            q_ptr, q_mean_ptr, group, channel, q_image, q_token, q_h, q_w, columns, windows, all_windows, channels,
            Q_TOKENS, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    else:
        _mean(
            k_ptr, k_mean_ptr, group - groups, channel, k_image, k_token, k_h, k_w, columns, windows, all_windows,
            channels, K_TOKENS, BLOCK_M, BLOCK_N,
        )  # fmt: skip


@triton.jit
def _choose(
    q_ptr, k_ptr, logits_ptr, idx_ptr, windows, channels, topk, scale,
    PRECISION: tl.constexpr, WINDOWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(windows, BLOCK_M)
    query = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    key = tl.arange(0, WINDOWS)
    logits = tl.zeros([BLOCK_M, WINDOWS], tl.float32)
    for start in range(0, channels, BLOCK_N):
        channel = start + tl.arange(0, BLOCK_N)
        exists = (channel < channels)[None, :]
        at = (image * windows + query)[:, None] * channels + channel[None, :]
        q = tl.load(q_ptr + at, mask=(query < windows)[:, None] & exists, other=0.0)
        at = (image * windows + key)[:, None] * channels + channel[None, :]
        k = tl.load(k_ptr + at, mask=(key < windows)[:, None] & exists, other=0.0)
        logits += dot(q, tl.trans(k), PRECISION)
    logits *= scale
    left = tl.where(logits != logits, float("inf"), tl.maximum(logits, -3.0e38))
    left = tl.where((key < windows)[None, :], left, -float("inf"))
    row = (image * windows + query) * topk
    for slot in range(topk):
        best, window = tl.max(left, 1, return_indices=True)
        tl.store(logits_ptr + row + slot, rounded(best, logits_ptr.dtype.element_ty), mask=query < windows)
        tl.store(idx_ptr + row + slot, window.to(tl.int64), mask=query < windows)
        left = tl.where(key[None, :] == window[:, None], -float("inf"), left)


def _groups(arguments: dict[str, Any], block: Block) -> list[int]:
    """Programs that read the one map, and the other, for each part of the channels."""
    return [cdiv(arguments["all_windows"], max(1, block.m // arguments[name])) for name in ("Q_TOKENS", "K_TOKENS")]


def _trips(arguments: dict[str, Any], block: Block) -> float:
    trips = [cdiv(arguments["q_h"] * arguments["q_w"], block.m), cdiv(arguments["k_h"] * arguments["k_w"], block.m)]
    groups = _groups(arguments, block)
    return sum(n * count for n, count in zip(groups, trips, strict=True)) / sum(groups)


_run_means = Kernel(
    _means,
    [(8, 128, 1, 1), (16, 64, 1, 1), (8, 64, 1, 1), (4, 16, 1, 1)],
    _trips,
    lambda block, size, _arguments: block.n <= size[1],
)
_run_choose = Kernel(
    _choose,
    [(16, 64, 4, 1), (16, 32, 4, 1), (16, 16, 4, 1)],
    lambda arguments, block: cdiv(arguments["channels"], block.n) + arguments["topk"],
    float32=[(16, 32, 4, 1), (16, 16, 4, 1)],
)


def choose(q: Tensor, k: Tensor, n_win: tuple[int, int], topk: int, scale: float) -> tuple[Tensor, Tensor]:
    """See `ops.route_maps`."""
    (rows, columns), (batch, _, _, channels), windows = n_win, q.shape, n_win[0] * n_win[1]
    q, k = as_tokens(q), as_tokens(k)
    means = q.new_empty((2, batch, windows, channels))
    sides = {"q_h": q.shape[1] // rows, "q_w": q.shape[2] // columns}
    sides |= {"k_h": k.shape[1] // rows, "k_w": k.shape[2] // columns}
    tokens = [1 << (sides[f"{name}_h"] * sides[f"{name}_w"] - 1).bit_length() for name in "qk"]
    arguments = {
        **{"q_ptr": q, "k_ptr": k, "q_mean_ptr": means[0], "k_mean_ptr": means[1], **strides(q=q, k=k), **sides},
        **{"columns": columns, "windows": windows, "all_windows": batch * windows, "channels": channels},
        **{"Q_TOKENS": tokens[0], "K_TOKENS": tokens[1]},
    }
    _run_means(
        lambda block: sum(_groups(arguments, block)) * cdiv(channels, block.n),
        (padded(max(tokens)), padded(channels)),
        **arguments,
    )
    logits = q.new_empty((batch, windows, topk))
    idx = q.new_empty((batch, windows, topk), dtype=torch.int64)
    _run_choose(
        lambda block: batch * cdiv(windows, block.m), (padded(windows), padded(channels)),
        q_ptr=means[0], k_ptr=means[1], logits_ptr=logits, idx_ptr=idx, windows=windows, channels=channels, topk=topk,
        scale=scale, PRECISION=precision(q.dtype), WINDOWS=padded(windows),
    )  # fmt: skip
    return logits, idx
