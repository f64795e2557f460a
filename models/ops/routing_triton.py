"""Routing of windows in Triton: their means, then the windows of highest affinity.

Letters: B batch, H x W maps, P windows, w tokens per window, C channels, k routed windows.

_means   One program: one window of one image's queries or keys, BLOCK_N channels. Means (B, P, C) in the map's type.
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
    map_ptr, mean_ptr, image, window, map_image, map_token, window_h, window_w, columns, windows, channels,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, channel,
):  # fmt: skip
    first = map_ptr + image * map_image
    corner_y, corner_x, width = window // columns * window_h, window % columns * window_w, columns * window_w
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, window_h * window_w, BLOCK_M):
        token = start + tl.arange(0, BLOCK_M)
        at = (corner_y + token // window_w) * width + corner_x + token % window_w
        exists = (token < window_h * window_w)[:, None] & (channel < channels)[None, :]
        total += tl.load(first + at[:, None] * map_token + channel[None, :], mask=exists, other=0.0).to(tl.float32)
    mean = rounded(tl.sum(total, 0) / (window_h * window_w), mean_ptr.dtype.element_ty)
    tl.store(mean_ptr + (image * windows + window) * channels + channel, mean, mask=channel < channels)


@triton.jit
def _means(
    q_ptr, k_ptr, q_mean_ptr, k_mean_ptr, q_image, k_image, q_token, k_token, q_h, q_w, k_h, k_w,
    columns, windows, channels, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    parts = tl.cdiv(channels, BLOCK_N)
    channel = tl.program_id(0) % parts * BLOCK_N + tl.arange(0, BLOCK_N)
    window = tl.program_id(0) // parts // 2 % windows
    image = (tl.program_id(0) // parts // 2 // windows).to(tl.int64)
    if tl.program_id(0) // parts % 2 == 0:
        _mean(
            q_ptr, q_mean_ptr, image, window, q_image, q_token, q_h, q_w, columns, windows, channels, BLOCK_M, BLOCK_N,
            channel,
        )  # fmt: skip
    else:
        _mean(
            k_ptr, k_mean_ptr, image, window, k_image, k_token, k_h, k_w, columns, windows, channels, BLOCK_M, BLOCK_N,
            channel,
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


def _tokens(arguments: dict[str, Any], block: Block) -> float:
    # Half of the programs read the one map, half the other.
    return (cdiv(arguments["q_h"] * arguments["q_w"], block.m) + cdiv(arguments["k_h"] * arguments["k_w"], block.m)) / 2


_run_means = Kernel(_means, [(16, 64, 2, 1), (4, 64, 1, 1), (1, 64, 1, 1), (1, 16, 1, 1)], _tokens)
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
    windows_of = {"q_h": q.shape[1] // rows, "q_w": q.shape[2] // columns}
    windows_of |= {"k_h": k.shape[1] // rows, "k_w": k.shape[2] // columns}
    tokens = max(windows_of["q_h"] * windows_of["q_w"], windows_of["k_h"] * windows_of["k_w"])
    _run_means(
        lambda block: batch * windows * 2 * cdiv(channels, block.n), (tokens, padded(channels)),
        q_ptr=q, k_ptr=k, q_mean_ptr=means[0], k_mean_ptr=means[1], **strides(q=q, k=k), **windows_of,
        columns=columns, windows=windows, channels=channels,
    )  # fmt: skip
    logits = q.new_empty((batch, windows, topk))
    idx = q.new_empty((batch, windows, topk), dtype=torch.int64)
    _run_choose(
        lambda block: batch * cdiv(windows, block.m), (padded(windows), padded(channels)),
        q_ptr=means[0], k_ptr=means[1], logits_ptr=logits, idx_ptr=idx, windows=windows, channels=channels, topk=topk,
        scale=scale, PRECISION=precision(q.dtype), WINDOWS=padded(windows),
    )  # fmt: skip
    return logits, idx
