"""Gradients of queries, keys and values as the gradient of their one projection, in Triton.

One program: BLOCK_M tokens, BLOCK_N channels of each of the three.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from .launch_triton import Kernel, cdiv, padded
from .tiles_triton import rounded


@triton.jit
def _put(first_ptr, second_ptr, out_ptr, at, to, exists, ADD: tl.constexpr):
    x = tl.load(first_ptr + at, mask=exists, other=0.0)
    if ADD:
        x = rounded(x.to(tl.float32) + tl.load(second_ptr + at, mask=exists, other=0.0).to(tl.float32), x.dtype)
    tl.store(out_ptr + to, x, mask=exists)


@triton.jit
def _join(
    q_ptr, k_ptr, v_ptr, q_more_ptr, k_more_ptr, v_more_ptr, out_ptr, tokens, channels,
    ADD_Q: tl.constexpr, ADD_K: tl.constexpr, ADD_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    parts = tl.cdiv(channels, BLOCK_N)
    token = (tl.program_id(0) // parts).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tl.program_id(0) % parts * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = (token < tokens)[:, None] & (channel < channels)[None, :]
    at = token[:, None] * channels + channel[None, :]
    to = 3 * token[:, None] * channels + channel[None, :]
    _put(q_ptr, q_more_ptr, out_ptr, at, to, exists, ADD_Q)
    _put(k_ptr, k_more_ptr, out_ptr, at, to + channels, exists, ADD_K)
    _put(v_ptr, v_more_ptr, out_ptr, at, to + 2 * channels, exists, ADD_V)


_run_join = Kernel(_join, [(32, 64, 4, 1), (16, 64, 4, 1), (16, 16, 1, 1)], lambda *_: 1)


def join(grads: Sequence[Tensor], more: Sequence[Tensor]) -> Tensor:
    """Three of (..., C), and what is added to each or nothing (0,) -> (..., 3C). All are contiguous."""
    channels, tokens = grads[0].shape[-1], grads[0].numel() // grads[0].shape[-1]
    out = grads[0].new_empty((*grads[0].shape[:-1], 3 * channels))
    names = [f"{name}{part}_ptr" for part in ("", "_more") for name in "qkv"]
    _run_join(
        lambda block: cdiv(tokens, block.m) * cdiv(channels, block.n), (padded(tokens), padded(channels)),
        **dict(zip(names, (*grads, *more), strict=True)), out_ptr=out, tokens=tokens, channels=channels,
        **{f"ADD_{name}": x.numel() > 0 for name, x in zip("QKV", more, strict=True)},
    )  # fmt: skip
    return out
