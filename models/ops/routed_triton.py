"""Routed attention in Triton: the gather happens inside the attention, nothing is copied k times or kept for backward.

Letters: B batch, P windows, w_q and w tokens per query and key window, C channels, m heads of D = C/m, k routed
windows. Tensors q, out (B, P, w_q, C) and k, v (B, P, w, C) stay as they lie; head h owns channels h*D .. (h+1)*D of
a row. Windows of all images are numbered b*P + p. Weights are computed as powers of two, logits scaled by log2(e).

_forward     One program: BLOCK_M query tokens of one window and head. The k*w routed keys are one sequence; key n is
             token n % w of window idx[n // w], so any window size fills whole blocks of BLOCK_N, and tiny windows are
             read many at a time. Online softmax in float32; writes out and lse (B, P, m, w_q), the logarithm of the
             sum of weights in base 2 (+inf for a query without keys, so that all its weights are 0 again in backward).
_invert      One program: one key window. Lists which query windows read it, in ascending order and as often as they
             do: `readers` (B*P*k) and `first` (B*P + 1), where reader list j is readers[first[j]:first[j+1]]. Scans
             the image's P*k routes, which fit the cache.
_backward_q  Like _forward: dq, and delta (B, P, m, w_q) = sum(grad * out) on the way.
_backward_kv One program: BLOCK_N key tokens of one window and head. The queries of all its readers are one sequence,
             read as _forward reads keys. Each key gradient has one owner, so nothing is atomic and every run gives
             the same bits.

Programs of the heads of one window follow each other, so that the routed rows they share are still in the cache.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch_triton import (
    LOG2E,
    Kernel,
    as_rows,
    configs,
    dot,
    load_rows,
    padded,
    precision,
    rounded,
    softmax_step,
    store_rows,
)


@triton.jit
def _routed_keys(start, idx_ptr, window, windows, topk, w, BLOCK_N: tl.constexpr):
    """Keys start .. start+BLOCK_N of a query window: where each lies (window, token), and whether it exists."""
    n = start + tl.arange(0, BLOCK_N)
    exists = n < topk * w
    slot = n // w
    routed = tl.load(idx_ptr + window.to(tl.int64) * topk + slot, mask=exists, other=0)
    return (window // windows * windows + routed).to(tl.int64), n - slot * w, exists


@triton.jit
def _base_2_logits(q, k, key_window, key, exists, mask_ptr, w, scale, HAS_MASK: tl.constexpr, PRECISION: tl.constexpr):
    """Logits (M, N), -inf for keys that do not exist or may not be read."""
    if HAS_MASK:
        exists = exists & (tl.load(mask_ptr + key_window * w + key, mask=exists, other=0) != 0)
    logits = dot(q, tl.trans(k), PRECISION) * (scale * LOG2E)
    return tl.where(exists[None, :], logits, float("-inf"))


@triton.jit
def _forward(
    q_ptr, k_ptr, v_ptr, idx_ptr, mask_ptr, out_ptr, lse_ptr,
    q_window, q_token, k_window, k_token, v_window, v_token,
    windows, num_heads, w_q, w, topk, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
    SIZE_M: tl.constexpr, SIZE_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % num_heads
    blocks = tl.cdiv(w_q, BLOCK_M)
    window = (tl.program_id(0) // num_heads // blocks).to(tl.int64)
    token = tl.program_id(0) // num_heads % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    is_token = token < w_q
    first = head * HEAD_DIM
    channel = tl.arange(0, BLOCK_D)
    q = load_rows(q_ptr + window * q_window + first, token * q_token, is_token, channel, HEAD_DIM, BLOCK_D)

    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    out = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, topk * w, BLOCK_N):
        key_window, key, exists = _routed_keys(start, idx_ptr, window, windows, topk, w, BLOCK_N)
        k = load_rows(k_ptr + first, key_window * k_window + key * k_token, exists, channel, HEAD_DIM, BLOCK_D)
        v = load_rows(v_ptr + first, key_window * v_window + key * v_token, exists, channel, HEAD_DIM, BLOCK_D)
        logits = _base_2_logits(q, k, key_window, key, exists, mask_ptr, w, scale, HAS_MASK, PRECISION)
        largest, total, weights, shrink = softmax_step(logits, largest, total)
        out = out * shrink[:, None] + dot(rounded(weights, v.dtype), v, PRECISION)

    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    lse = tl.where(empty, float("inf"), largest + tl.log2(total))
    rows = (window * w_q + token) * (num_heads * HEAD_DIM)
    store_rows(out_ptr + first, rows, is_token, channel, out / total[:, None], HEAD_DIM, BLOCK_D)
    tl.store(lse_ptr + (window * num_heads + head) * w_q + token, lse, mask=is_token)


@triton.jit
def _backward_q(
    grad_ptr, q_ptr, k_ptr, v_ptr, idx_ptr, mask_ptr, out_ptr, lse_ptr, delta_ptr, dq_ptr,
    q_window, q_token, k_window, k_token, v_window, v_token,
    windows, num_heads, w_q, w, topk, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
    SIZE_M: tl.constexpr, SIZE_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % num_heads
    blocks = tl.cdiv(w_q, BLOCK_M)
    window = (tl.program_id(0) // num_heads // blocks).to(tl.int64)
    token = tl.program_id(0) // num_heads % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    is_token = token < w_q
    first = head * HEAD_DIM
    channel = tl.arange(0, BLOCK_D)
    q = load_rows(q_ptr + window * q_window + first, token * q_token, is_token, channel, HEAD_DIM, BLOCK_D)
    rows = (window * w_q + token) * (num_heads * HEAD_DIM)
    grad = load_rows(grad_ptr + first, rows, is_token, channel, HEAD_DIM, BLOCK_D)
    out = load_rows(out_ptr + first, rows, is_token, channel, HEAD_DIM, BLOCK_D)
    per_query = (window * num_heads + head) * w_q + token
    lse = tl.load(lse_ptr + per_query, mask=is_token, other=float("inf"))
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_ptr + per_query, delta, mask=is_token)

    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, topk * w, BLOCK_N):
        key_window, key, exists = _routed_keys(start, idx_ptr, window, windows, topk, w, BLOCK_N)
        k = load_rows(k_ptr + first, key_window * k_window + key * k_token, exists, channel, HEAD_DIM, BLOCK_D)
        v = load_rows(v_ptr + first, key_window * v_window + key * v_token, exists, channel, HEAD_DIM, BLOCK_D)
        logits = _base_2_logits(q, k, key_window, key, exists, mask_ptr, w, scale, HAS_MASK, PRECISION)
        weights = tl.exp2(logits - lse[:, None])
        dweights = dot(grad, tl.trans(v), PRECISION)
        dlogits = weights * (dweights - delta[:, None])
        dq += dot(rounded(dlogits, k.dtype), k, PRECISION)
    store_rows(dq_ptr + first, rows, is_token, channel, dq * scale, HEAD_DIM, BLOCK_D)


@triton.jit
def _invert(idx_ptr, readers_ptr, first_ptr, windows, topk, BLOCK: tl.constexpr):
    image = (tl.program_id(0) // windows).to(tl.int64)
    window = tl.program_id(0) % windows
    routes = windows * topk
    earlier = 0
    for start in range(0, routes, BLOCK):
        route = start + tl.arange(0, BLOCK)
        target = tl.load(idx_ptr + image * routes + route, mask=route < routes, other=windows)
        earlier += tl.sum((target < window).to(tl.int32))
    place = image * routes + earlier
    tl.store(first_ptr + tl.program_id(0), place)
    for start in range(0, routes, BLOCK):
        route = start + tl.arange(0, BLOCK)
        target = tl.load(idx_ptr + image * routes + route, mask=route < routes, other=windows)
        hit = (target == window).to(tl.int32)
        reader = image * windows + route // topk
        tl.store(readers_ptr + place + tl.cumsum(hit) - 1, reader, mask=hit != 0)
        place += tl.sum(hit)
    if tl.program_id(0) == tl.num_programs(0) - 1:
        tl.store(first_ptr + tl.num_programs(0), place)


@triton.jit
def _backward_kv(
    grad_ptr, q_ptr, k_ptr, v_ptr, readers_ptr, first_ptr, mask_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    q_window, q_token, k_window, k_token, v_window, v_token,
    num_heads, w_q, w, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
    SIZE_M: tl.constexpr, SIZE_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % num_heads
    blocks = tl.cdiv(w, BLOCK_N)
    window = (tl.program_id(0) // num_heads // blocks).to(tl.int64)
    key = tl.program_id(0) // num_heads % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    is_key = key < w
    channel = tl.arange(0, BLOCK_D)
    head_first = head * HEAD_DIM
    k = load_rows(k_ptr + window * k_window + head_first, key * k_token, is_key, channel, HEAD_DIM, BLOCK_D)
    v = load_rows(v_ptr + window * v_window + head_first, key * v_token, is_key, channel, HEAD_DIM, BLOCK_D)
    readable = is_key
    if HAS_MASK:
        readable = is_key & (tl.load(mask_ptr + window * w + key, mask=is_key, other=0) != 0)

    begin = tl.load(first_ptr + window)
    queries = (tl.load(first_ptr + window + 1) - begin).to(tl.int32) * w_q
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in range(0, queries, BLOCK_M):
        n = start + tl.arange(0, BLOCK_M)
        exists = n < queries
        slot = n // w_q
        token = n - slot * w_q
        reader = tl.load(readers_ptr + begin + slot, mask=exists, other=0).to(tl.int64)
        q = load_rows(q_ptr + head_first, reader * q_window + token * q_token, exists, channel, HEAD_DIM, BLOCK_D)
        rows = (reader * w_q + token) * (num_heads * HEAD_DIM)
        grad = load_rows(grad_ptr + head_first, rows, exists, channel, HEAD_DIM, BLOCK_D)
        per_query = (reader * num_heads + head) * w_q + token
        lse = tl.load(lse_ptr + per_query, mask=exists, other=float("inf"))
        delta = tl.load(delta_ptr + per_query, mask=exists, other=0.0)
        # Keys are the rows here, so that no tile of weights has to be transposed.
        logits = dot(k, tl.trans(q), PRECISION) * (scale * LOG2E)
        weights = tl.exp2(tl.where(readable[:, None], logits - lse[None, :], float("-inf")))
        dv += dot(rounded(weights, grad.dtype), grad, PRECISION)
        dweights = dot(v, tl.trans(grad), PRECISION)
        dlogits = weights * (dweights - delta[None, :])
        dk += dot(rounded(dlogits, q.dtype), q, PRECISION)
    rows = (window * w + key) * (num_heads * HEAD_DIM)
    store_rows(dk_ptr + head_first, rows, is_key, channel, dk * scale, HEAD_DIM, BLOCK_D)
    store_rows(dv_ptr + head_first, rows, is_key, channel, dv, HEAD_DIM, BLOCK_D)


_KEY = ("HEAD_DIM", "HAS_MASK", "PRECISION")
_QUERY_BLOCKS = configs(
    *((128, 64, 8, 3), (64, 128, 4, 2), (64, 64, 4, 3), (64, 64, 8, 2), (64, 32, 4, 3), (32, 64, 4, 3)),
    *((32, 32, 4, 3), (16, 128, 4, 2), (16, 64, 4, 2), (16, 64, 2, 3), (16, 32, 2, 3), (16, 16, 1, 3)),
)
_KEY_BLOCKS = configs(
    *((64, 64, 8, 2), (64, 64, 4, 2), (32, 64, 4, 2), (64, 32, 4, 2), (32, 32, 4, 3)),
    *((64, 16, 4, 2), (64, 16, 2, 2), (32, 16, 2, 3), (16, 16, 1, 3)),
)
_run_forward = Kernel(_forward, _QUERY_BLOCKS, _KEY)
_run_backward_q = Kernel(_backward_q, _QUERY_BLOCKS, _KEY)
_run_backward_kv = Kernel(_backward_kv, _KEY_BLOCKS, _KEY)


def _describe(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, num_heads: int) -> dict[str, Any]:
    """The arguments that all kernels take, by name, but for the size class, which is theirs."""
    w_q, w, head_dim = q.shape[2], k.shape[2], q.shape[3] // num_heads
    return {
        **{f"{name}_window": x.stride(1) for name, x in zip("qkv", (q, k, v), strict=True)},
        **{f"{name}_token": x.stride(2) for name, x in zip("qkv", (q, k, v), strict=True)},
        **{"num_heads": num_heads, "w_q": w_q, "w": w, "HEAD_DIM": head_dim, "BLOCK_D": padded(head_dim)},
        **{"HAS_MASK": key_mask is not None, "PRECISION": precision(q.dtype)},
    }


def forward(
    q: Tensor, k: Tensor, v: Tensor, idx: Tensor, key_mask: Tensor | None, num_heads: int, scale: float
) -> tuple[Tensor, Tensor]:
    """See `ops.routed_attention`. Returns out (B, P, w_q, C) and lse (B, P, m, w_q), in base 2, for `backward`."""
    b, p, w_q, _ = q.shape
    w = k.shape[2]
    q, k, v, idx = as_rows(q), as_rows(k), as_rows(v), idx.contiguous()
    mask = None if key_mask is None else key_mask.contiguous()
    out = q.new_empty(q.shape)
    lse = q.new_empty((b, p, num_heads, w_q), dtype=torch.float32)
    _run_forward(
        lambda block: (b * p * triton.cdiv(w_q, block["BLOCK_M"]) * num_heads,),
        q_ptr=q, k_ptr=k, v_ptr=v, idx_ptr=idx, mask_ptr=mask, out_ptr=out, lse_ptr=lse,
        windows=p, topk=idx.shape[2], scale=scale, SIZE_M=padded(w_q), SIZE_N=padded(w * idx.shape[2]),
        **_describe(q, k, v, mask, num_heads),
    )  # fmt: skip
    return out, lse


def invert_routes(idx: Tensor) -> tuple[Tensor, Tensor]:
    """Who reads each window: idx (B, P, k) -> readers (B*P*k), first (B*P + 1), int32 and int64.

    readers[first[j]:first[j+1]] are the query windows, numbered b*P + p, that read window j, ascending.
    """
    b, p, topk = idx.shape
    readers = idx.new_empty(b * p * topk, dtype=torch.int32)
    first = idx.new_empty(b * p + 1, dtype=torch.int64)
    _invert[(b * p,)](idx, readers, first, p, topk, BLOCK=min(1024, padded(p * topk)))
    return readers, first


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    idx: Tensor,
    key_mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    num_heads: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, contiguous."""
    b, p, w_q, _ = q.shape
    w = k.shape[2]
    q, k, v, idx, grad = as_rows(q), as_rows(k), as_rows(v), idx.contiguous(), grad.contiguous()
    mask = None if key_mask is None else key_mask.contiguous()
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    delta = torch.empty_like(lse)
    common = {"mask_ptr": mask, "lse_ptr": lse, "delta_ptr": delta, "scale": scale}
    common |= {"grad_ptr": grad, "q_ptr": q, "k_ptr": k, "v_ptr": v, **_describe(q, k, v, mask, num_heads)}
    _run_backward_q(
        lambda block: (b * p * triton.cdiv(w_q, block["BLOCK_M"]) * num_heads,),
        idx_ptr=idx, out_ptr=out, dq_ptr=dq, windows=p, topk=idx.shape[2],
        SIZE_M=padded(w_q), SIZE_N=padded(w * idx.shape[2]), **common,
    )  # fmt: skip
    readers, first = invert_routes(idx)
    _run_backward_kv(
        lambda block: (b * p * triton.cdiv(w, block["BLOCK_N"]) * num_heads,),
        readers_ptr=readers, first_ptr=first, dk_ptr=dk, dv_ptr=dv,
        SIZE_M=padded(w_q * idx.shape[2]), SIZE_N=padded(w), **common,
    )  # fmt: skip
    return dq, dk, dv
