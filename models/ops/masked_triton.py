"""Routed attention over all keys of an image: for windows of few queries, of which a tile takes many.

Letters: B batch, P <= 64 windows of an image, w_q and w tokens per query and key window, C channels, m heads of
D = C/m, k routed windows, different from each other. Maps lie as in `routed_triton`.

Routes enter the logits as a second matrix product, of r (queries, 64), which is -2**15 where a window is not routed,
and of each key's window as a one among 64 zeros: no arithmetic per masked logit. Keys beyond the last have ones
throughout.

_mark      r of every window (B*P, 64), and the ones of every key, up to the end of its block of 128.
_forward   One program: BLOCK_M queries of one image and head, all keys, BLOCK_N at a time, by online softmax.
_backward  One program: all queries of one image and head, all keys, BLOCK_N at a time. It owns every gradient it
           writes: dk and dv of each block of keys, and dq at the end.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch_triton import Block, Kernel, cdiv, padded, precision, strides
from .tiles_triton import LOG2E, dot, load_gradient, load_rows, rounded, softmax_step, store_attention, store_rows

LARGEST = 256
"""Queries of an image at most; backward has them all in one tile."""
ROOM = 112 * 1024
"""Bytes of shared memory that takes."""
BARRED = tl.constexpr(-32768.0)


@triton.jit
def _window(token, width, across, window_h, window_w):
    """Number of the window that a token of a map lies in."""
    return token // width // window_h * across + token % width // window_w


@triton.jit
def _mark(
    idx_ptr, barred_ptr, hot_ptr, all_windows, topk, keys, width, across, window_h, window_w,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    number = tl.arange(0, 64)
    blocks = tl.cdiv(all_windows, BLOCK_M)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    if tl.program_id(0) < blocks:
        barred = tl.full([BLOCK_M, 64], BARRED, tl.float32)
        for slot in range(topk):
            routed = tl.load(idx_ptr + row.to(tl.int64) * topk + slot, mask=row < all_windows, other=-1)
            tl.device_assert((row >= all_windows) | ((routed >= 0) & (routed < 64)), "a window number is out of range")
            barred = tl.where(routed[:, None] == number[None, :], 0.0, barred)
        at = barred_ptr + row[:, None] * 64 + number[None, :]
        tl.store(at, barred.to(barred_ptr.dtype.element_ty), mask=(row < all_windows)[:, None])
    else:
        key = row - blocks * BLOCK_M
        window = _window(key, width, across, window_h, window_w)
        hot = (window[:, None] == number[None, :]) | (key >= keys)[:, None]
        at = hot_ptr + key[:, None] * 64 + number[None, :]
        tl.store(at, hot.to(tl.float32).to(hot_ptr.dtype.element_ty), mask=(key < (keys + 127) // 128 * 128)[:, None])


@triton.jit
def _forward(
    q_ptr, k_ptr, v_ptr, barred_ptr, hot_ptr, out_ptr, lse_ptr,
    q_image, k_image, v_image, q_token, k_token, v_token,
    windows, across, num_heads, queries, keys, q_width, q_window_h, q_window_w, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % num_heads
    blocks = tl.cdiv(queries, BLOCK_M)
    image = (tl.program_id(0) // num_heads // blocks).to(tl.int64)
    query = tl.program_id(0) // num_heads % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    is_query = query < queries
    first = head * HEAD_DIM
    channel = tl.arange(0, BLOCK_D)
    q = load_rows(q_ptr + image * q_image + first, query * q_token, is_query, channel, HEAD_DIM, BLOCK_D)
    query_window = image * windows + _window(query, q_width, across, q_window_h, q_window_w)
    marks = barred_ptr + query_window[:, None] * 64 + tl.arange(0, 64)[None, :]
    barred = tl.load(marks, mask=is_query[:, None], other=0.0)

    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    out = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, keys, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        is_key = key < keys
        k = load_rows(k_ptr + image * k_image + first, key * k_token, is_key, channel, HEAD_DIM, BLOCK_D)
        v = load_rows(v_ptr + image * v_image + first, key * v_token, is_key, channel, HEAD_DIM, BLOCK_D)
        logits = dot(q, tl.trans(k), PRECISION)
        hot = tl.load(hot_ptr + key[:, None] * 64 + tl.arange(0, 64)[None, :])
        logits += dot(barred, tl.trans(hot), PRECISION)
        logits *= scale * LOG2E
        largest, total, out = softmax_step(logits, v, largest, total, out, PRECISION)

    store_attention(
        out_ptr, lse_ptr, image, head, num_heads, queries, query, is_query, channel, largest, total, out,
        HEAD_DIM, BLOCK_D,
    )  # fmt: skip


@triton.jit
def _backward(
    grad_ptr, q_ptr, k_ptr, v_ptr, barred_ptr, hot_ptr, out_ptr, lse_ptr, dq_ptr, dk_ptr, dv_ptr,
    q_image, k_image, v_image, q_token, k_token, v_token,
    windows, across, num_heads, queries, keys, q_width, q_window_h, q_window_w, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % num_heads
    image = (tl.program_id(0) // num_heads).to(tl.int64)
    query = tl.arange(0, BLOCK_M)
    is_query = query < queries
    first = head * HEAD_DIM
    channel = tl.arange(0, BLOCK_D)
    q = load_rows(q_ptr + image * q_image + first, query * q_token, is_query, channel, HEAD_DIM, BLOCK_D)
    rows, grad, lse, delta = load_gradient(
        grad_ptr, out_ptr, lse_ptr, lse_ptr, image, head, num_heads, queries, query, is_query, channel,
        True, HEAD_DIM, BLOCK_D,
    )  # fmt: skip
    query_window = image * windows + _window(query, q_width, across, q_window_h, q_window_w)
    marks = barred_ptr + query_window[:, None] * 64 + tl.arange(0, 64)[None, :]
    barred = tl.load(marks, mask=is_query[:, None], other=0.0)

    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, keys, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        is_key = key < keys
        k = load_rows(k_ptr + image * k_image + first, key * k_token, is_key, channel, HEAD_DIM, BLOCK_D)
        v = load_rows(v_ptr + image * v_image + first, key * v_token, is_key, channel, HEAD_DIM, BLOCK_D)
        # Keys are the rows here, so that weights need not be transposed for the gradients of k and v.
        logits = dot(k, tl.trans(q), PRECISION)
        hot = tl.load(hot_ptr + key[:, None] * 64 + tl.arange(0, 64)[None, :])
        logits += dot(hot, tl.trans(barred), PRECISION)
        weights = tl.exp2(logits * (scale * LOG2E) - lse[None, :])
        dv = dot(rounded(weights, grad.dtype), grad, PRECISION)
        dlogits = weights * (dot(v, tl.trans(grad), PRECISION) - delta[None, :])
        dlogits = rounded(dlogits, q.dtype)
        dk = dot(dlogits, q, PRECISION)
        dq += dot(tl.trans(dlogits), k, PRECISION)
        key_rows = (image * keys + key) * (num_heads * HEAD_DIM)
        store_rows(dk_ptr + first, key_rows, is_key, channel, dk * scale, HEAD_DIM, BLOCK_D)
        store_rows(dv_ptr + first, key_rows, is_key, channel, dv, HEAD_DIM, BLOCK_D)
    store_rows(dq_ptr + first, rows, is_query, channel, dq * scale, HEAD_DIM, BLOCK_D)


def _blocks_of_keys(arguments: dict[str, Any], block: Block) -> float:
    return cdiv(arguments["keys"], block.n)


_run_mark = Kernel(_mark, [(32, 1, 4, 1), (16, 1, 4, 1)], lambda arguments, _: arguments["topk"])
_run_forward = Kernel(
    *(_forward, [(64, 64, 4, 2), (64, 64, 4, 1), (64, 32, 4, 2), (64, 128, 4, 1), (128, 64, 4, 2), (128, 64, 8, 2)]),
    _blocks_of_keys,
)
_run_backward = Kernel(
    _backward,
    [(256, 16, 8, 1), (128, 32, 8, 1), (128, 16, 4, 1), (64, 64, 4, 1), (64, 64, 4, 2), (64, 32, 4, 2)],
    _blocks_of_keys,
    lambda block, size, _arguments: block.m == size[0],
)


@functools.cache
def _has_room(device: torch.device) -> bool:
    """Whether a program may use the shared memory that 256 queries take in backward."""
    return device.type != "cuda" or torch.cuda.get_device_properties(device).shared_memory_per_block_optin >= ROOM


def suits(q: Tensor, idx: Tensor, num_heads: int) -> bool:
    """Whether this way is the faster one: it multiplies P/k times as much, but with queries of many windows at once."""
    (_, windows, topk), queries = idx.shape, q.shape[1] * q.shape[2]
    if q.dtype == torch.float32:  # whose tiles of that many queries leave no registers
        return False
    largest = LARGEST if q.shape[3] <= 32 * num_heads and _has_room(q.device) else 64
    return topk < windows <= 64 and queries <= min(16 * topk, largest)


def _marks(q: Tensor, k: Tensor, idx: Tensor, n_win: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Which windows each window does not read (B*P, 64), and each key's window (keys, 64), filled up; in q's type."""
    (b, windows, topk), keys = idx.shape, k.shape[1] * k.shape[2]
    last = 128 * cdiv(keys, 128)
    marks = q.new_empty((b * windows + last, 64))
    barred, hot = marks[: b * windows], marks[b * windows :]
    _run_mark(
        lambda block: cdiv(b * windows, block.m) + cdiv(last, block.m), (padded(b * windows), 1),
        idx_ptr=idx, barred_ptr=barred, hot_ptr=hot, all_windows=b * windows, topk=topk, keys=keys,
        width=k.shape[2], across=n_win[1], window_h=k.shape[1] // n_win[0], window_w=k.shape[2] // n_win[1],
    )  # fmt: skip
    return barred, hot


def _describe(
    q: Tensor, k: Tensor, v: Tensor, idx: Tensor, n_win: tuple[int, int], num_heads: int, scale: float
) -> dict[str, Any]:
    head_dim = q.shape[3] // num_heads
    barred, hot = _marks(q, k, idx, n_win)
    return {
        **{"q_ptr": q, "k_ptr": k, "v_ptr": v, "barred_ptr": barred, "hot_ptr": hot, **strides(q=q, k=k, v=v)},
        **{"windows": idx.shape[1], "across": n_win[1], "num_heads": num_heads, "scale": scale},
        **{"queries": q.shape[1] * q.shape[2], "keys": k.shape[1] * k.shape[2], "q_width": q.shape[2]},
        **{"q_window_h": q.shape[1] // n_win[0], "q_window_w": q.shape[2] // n_win[1]},
        **{"HEAD_DIM": head_dim, "BLOCK_D": padded(head_dim), "PRECISION": precision(q.dtype)},
    }


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    idx: Tensor,
    n_win: tuple[int, int],
    num_heads: int,
    scale: float,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Fills out and lse."""
    arguments = _describe(q, k, v, idx, n_win, num_heads, scale)
    queries, keys = arguments["queries"], arguments["keys"]
    _run_forward(
        lambda block: q.shape[0] * num_heads * cdiv(queries, block.m),
        (max(64, padded(queries)), max(64, padded(keys))),
        **arguments, out_ptr=out, lse_ptr=lse,
    )  # fmt: skip


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    idx: Tensor,
    out: Tensor,
    lse: Tensor,
    n_win: tuple[int, int],
    num_heads: int,
    scale: float,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> None:
    """Fills dq, dk and dv."""
    arguments = _describe(q, k, v, idx, n_win, num_heads, scale)
    _run_backward(
        lambda _: q.shape[0] * num_heads,
        (max(64, padded(arguments["queries"])), max(64, padded(arguments["keys"]))),
        **arguments, grad_ptr=grad, out_ptr=out, lse_ptr=lse, dq_ptr=dq, dk_ptr=dk, dv_ptr=dv,
    )  # fmt: skip
