"""Routed attention in Triton, in one of two ways; nothing is gathered in memory or kept for backward but `lse`.

Letters: B batch, P windows of an image, w_q and w tokens per query and key window, C channels, m heads of D = C/m, k
routed windows. Maps q, out (B, Hq, Wq, C) and k, v (B, H, W, C) stay as they lie: windows are found inside the kernels,
head h owns channels h*D .. (h+1)*D. Weights are powers of two, logits are scaled by log2(e); lse (B, m, Hq*Wq) is the
logarithm of the sum of weights in base 2.

Gathered, for windows with many queries. Windows of all images are numbered b*P + p.

_forward     One program: BLOCK_M query tokens of one window and head. The k*w routed keys are one sequence; key n is
             token n % w of window idx[n // w], so any window size fills whole blocks of BLOCK_N. Online softmax.
_invert      One program: one key window. Lists which query windows read it, in ascending order: `readers` (B*P*k) and
             `first` (B*P + 1), where reader list j is readers[first[j]:first[j+1]].
_backward_q  Like _forward: dq, and delta (B, m, Hq*Wq) = sum(grad * out) on the way.
_backward_kv One program: BLOCK_N key tokens of one window and head. The queries of all its readers are one sequence.
             Each key gradient has one owner, so nothing is atomic and every run gives the same bits. Where every query
             reads one window (k = 1), it is also the only reader: dq is written here too, in one pass over everything.

All keys, in half precision, for windows with few queries, which would leave tiles empty: `masked_triton`.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import masked_triton
from .launch_triton import Block, Kernel, as_tokens, cdiv, padded, precision, strides
from .tiles_triton import LOG2E, dot, load_gradient, load_rows, rounded, softmax_step, store_attention, store_rows


@triton.jit
def _token(window, token, width, across, window_h, window_w):
    """Where token number `token` of a window lies in its map, row-major."""
    row, column = token // window_w, token % window_w
    return (window // across * window_h + row) * width + window % across * window_w + column


@triton.jit
def _routed_keys(start, idx_ptr, query_window, topk, w, width, across, window_h, window_w, BLOCK_N: tl.constexpr):
    """Where keys start .. start+BLOCK_N of a query window lie in their map, and whether they exist."""
    n = start + tl.arange(0, BLOCK_N)
    exists = n < topk * w
    slot = n // w
    routed = tl.load(idx_ptr + query_window * topk + slot, mask=exists, other=0).to(tl.int32)
    return _token(routed, n - slot * w, width, across, window_h, window_w), exists


@triton.jit
def _forward(
    q_ptr, k_ptr, v_ptr, idx_ptr, out_ptr, lse_ptr,
    q_image, k_image, v_image, q_token, k_token, v_token,
    windows, across, num_heads, q_width, q_window_h, q_window_w, width, window_h, window_w, topk, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    w_q, w = q_window_h * q_window_w, window_h * window_w
    head = tl.program_id(0) % num_heads
    blocks = tl.cdiv(w_q, BLOCK_M)
    number = (tl.program_id(0) // num_heads // blocks).to(tl.int64)
    image, window = number // windows, (number % windows).to(tl.int32)
    n = tl.program_id(0) // num_heads % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    is_token = n < w_q
    token = _token(window, n, q_width, across, q_window_h, q_window_w)
    first = head * HEAD_DIM
    channel = tl.arange(0, BLOCK_D)
    q = load_rows(q_ptr + image * q_image + first, token * q_token, is_token, channel, HEAD_DIM, BLOCK_D)

    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    out = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, topk * w, BLOCK_N):
        key, exists = _routed_keys(start, idx_ptr, number, topk, w, width, across, window_h, window_w, BLOCK_N)
        k = load_rows(k_ptr + image * k_image + first, key * k_token, exists, channel, HEAD_DIM, BLOCK_D)
        v = load_rows(v_ptr + image * v_image + first, key * v_token, exists, channel, HEAD_DIM, BLOCK_D)
        logits = dot(q, tl.trans(k), PRECISION) * (scale * LOG2E)
        logits = tl.where(exists[None, :], logits, float("-inf"))
        largest, total, out = softmax_step(logits, v, largest, total, out, PRECISION)

    store_attention(
        out_ptr, lse_ptr, image, head, num_heads, windows * w_q, token, is_token, channel, largest, total, out,
        HEAD_DIM, BLOCK_D,
    )  # fmt: skip


@triton.jit
def _backward_q(
    grad_ptr, q_ptr, k_ptr, v_ptr, idx_ptr, out_ptr, lse_ptr, delta_ptr, dq_ptr,
    q_image, k_image, v_image, q_token, k_token, v_token,
    windows, across, num_heads, q_width, q_window_h, q_window_w, width, window_h, window_w, topk, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    w_q, w = q_window_h * q_window_w, window_h * window_w
    head = tl.program_id(0) % num_heads
    blocks = tl.cdiv(w_q, BLOCK_M)
    number = (tl.program_id(0) // num_heads // blocks).to(tl.int64)
    image, window = number // windows, (number % windows).to(tl.int32)
    n = tl.program_id(0) // num_heads % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    is_token = n < w_q
    token = _token(window, n, q_width, across, q_window_h, q_window_w)
    first = head * HEAD_DIM
    channel = tl.arange(0, BLOCK_D)
    tokens = windows * w_q
    q = load_rows(q_ptr + image * q_image + first, token * q_token, is_token, channel, HEAD_DIM, BLOCK_D)
    rows, grad, lse, delta = load_gradient(
        grad_ptr, out_ptr, lse_ptr, delta_ptr, image, head, num_heads, tokens, token, is_token, channel,
        True, HEAD_DIM, BLOCK_D,
    )  # fmt: skip
    tl.store(delta_ptr + (image * num_heads + head) * tokens + token, delta, mask=is_token)

    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, topk * w, BLOCK_N):
        key, exists = _routed_keys(start, idx_ptr, number, topk, w, width, across, window_h, window_w, BLOCK_N)
        k = load_rows(k_ptr + image * k_image + first, key * k_token, exists, channel, HEAD_DIM, BLOCK_D)
        v = load_rows(v_ptr + image * v_image + first, key * v_token, exists, channel, HEAD_DIM, BLOCK_D)
        logits = dot(q, tl.trans(k), PRECISION) * (scale * LOG2E)
        weights = tl.exp2(logits - lse[:, None])  # of keys that do not exist too: their rows of k are zeros
        dlogits = weights * (dot(grad, tl.trans(v), PRECISION) - delta[:, None])
        dq += dot(rounded(dlogits, k.dtype), k, PRECISION)
    store_rows(dq_ptr + first, rows, is_token, channel, dq * scale, HEAD_DIM, BLOCK_D)


@triton.jit
def _invert(idx_ptr, readers_ptr, first_ptr, windows, topk, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    image = (tl.program_id(0) // windows).to(tl.int64)
    window = tl.program_id(0) % windows
    routes = windows * topk
    earlier = 0
    for start in range(0, routes, BLOCK_M):
        route = start + tl.arange(0, BLOCK_M)
        target = tl.load(idx_ptr + image * routes + route, mask=route < routes, other=windows)
        earlier += tl.sum((target < window).to(tl.int32))
    place = image * routes + earlier
    tl.store(first_ptr + tl.program_id(0), place)
    for start in range(0, routes, BLOCK_M):
        route = start + tl.arange(0, BLOCK_M)
        target = tl.load(idx_ptr + image * routes + route, mask=route < routes, other=windows)
        tl.device_assert((route >= routes) | ((target >= 0) & (target < windows)), "a window number is out of range")
        hit = (target == window).to(tl.int32)
        tl.store(readers_ptr + place + tl.cumsum(hit) - 1, route // topk, mask=hit != 0)
        place += tl.sum(hit)
    if tl.program_id(0) == tl.num_programs(0) - 1:
        tl.store(first_ptr + tl.num_programs(0), place)


@triton.jit
def _backward_kv(
    grad_ptr, q_ptr, k_ptr, v_ptr, out_ptr, readers_ptr, first_ptr, lse_ptr, delta_ptr, dq_ptr, dk_ptr, dv_ptr,
    q_image, k_image, v_image, q_token, k_token, v_token,
    windows, across, num_heads, q_width, q_window_h, q_window_w, width, window_h, window_w, topk, scale,
    WITH_DQ: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    w_q, w = q_window_h * q_window_w, window_h * window_w
    head = tl.program_id(0) % num_heads
    blocks = tl.cdiv(w, BLOCK_N)
    number = (tl.program_id(0) // num_heads // blocks).to(tl.int64)
    image, window = number // windows, (number % windows).to(tl.int32)
    n = tl.program_id(0) // num_heads % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    is_key = n < w
    key = _token(window, n, width, across, window_h, window_w)
    channel = tl.arange(0, BLOCK_D)
    first_channel = head * HEAD_DIM
    k = load_rows(k_ptr + image * k_image + first_channel, key * k_token, is_key, channel, HEAD_DIM, BLOCK_D)
    v = load_rows(v_ptr + image * v_image + first_channel, key * v_token, is_key, channel, HEAD_DIM, BLOCK_D)

    begin = tl.load(first_ptr + number)
    queries = (tl.load(first_ptr + number + 1) - begin).to(tl.int32) * w_q
    tokens = windows * w_q
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in range(0, queries, BLOCK_M):
        query = start + tl.arange(0, BLOCK_M)
        exists = query < queries
        slot = query // w_q
        reader = tl.load(readers_ptr + begin + slot, mask=exists, other=0)
        token = _token(reader, query - slot * w_q, q_width, across, q_window_h, q_window_w)
        q = load_rows(q_ptr + image * q_image + first_channel, token * q_token, exists, channel, HEAD_DIM, BLOCK_D)
        rows, grad, lse, delta = load_gradient(
            grad_ptr, out_ptr, lse_ptr, delta_ptr, image, head, num_heads, tokens, token, exists, channel,
            WITH_DQ, HEAD_DIM, BLOCK_D,
        )  # fmt: skip
        # Keys are the rows here, so that no tile of weights has to be transposed.
        logits = dot(k, tl.trans(q), PRECISION) * (scale * LOG2E)
        weights = tl.exp2(logits - lse[None, :])
        dv += dot(rounded(weights, grad.dtype), grad, PRECISION)
        dlogits = weights * (dot(v, tl.trans(grad), PRECISION) - delta[None, :])
        dlogits = rounded(dlogits, q.dtype)
        dk += dot(dlogits, q, PRECISION)
        if WITH_DQ:
            dq = dot(tl.trans(dlogits), k, PRECISION)
            store_rows(dq_ptr + first_channel, rows, exists, channel, dq * scale, HEAD_DIM, BLOCK_D)
    rows = (image * (windows * w) + key) * (num_heads * HEAD_DIM)
    store_rows(dk_ptr + first_channel, rows, is_key, channel, dk * scale, HEAD_DIM, BLOCK_D)
    store_rows(dv_ptr + first_channel, rows, is_key, channel, dv, HEAD_DIM, BLOCK_D)


def _keys(arguments: dict[str, Any], block: Block) -> float:
    keys = arguments["topk"] * arguments["window_h"] * arguments["window_w"]
    return cdiv(keys, block.n)


def _readers(arguments: dict[str, Any], block: Block) -> float:
    return cdiv(arguments["topk"] * arguments["q_window_h"] * arguments["q_window_w"], block.m)


_QUERY_BLOCKS = [
    *((64, 64, 4, 3), (128, 64, 8, 3), (64, 128, 4, 2), (64, 64, 4, 2), (64, 32, 4, 3), (32, 64, 4, 3)),
    *((16, 128, 1, 1), (16, 64, 1, 1), (16, 64, 2, 3), (16, 32, 1, 2), (16, 16, 1, 3)),
]
_KEY_BLOCKS = [
    *((64, 64, 4, 2), (64, 64, 8, 2), (32, 64, 4, 2), (64, 32, 4, 2), (64, 16, 1, 2), (64, 16, 2, 2)),
    *((32, 16, 1, 2), (32, 16, 2, 3), (16, 16, 1, 3)),
]
_run_forward = Kernel(
    *(_forward, _QUERY_BLOCKS, _keys), float32=[(64, 32, 4, 3), (16, 64, 2, 3), (16, 32, 1, 2), (16, 16, 1, 3)]
)
_run_backward_q = Kernel(_backward_q, _QUERY_BLOCKS, _keys, float32=[(16, 16, 1, 3)])
_run_backward_kv = Kernel(
    *(_backward_kv, _KEY_BLOCKS, _readers),
    # A program that writes dq has to see all keys.
    lambda block, size, arguments: (
        block.n == size[1] if arguments["WITH_DQ"] else block.m <= size[0] and block.n <= size[1]
    ),
    float32=[(32, 16, 2, 3), (16, 16, 1, 3)],
)
_run_invert = Kernel(
    *(_invert, [(1024, 1, 4, 1), (256, 1, 4, 1), (64, 1, 2, 1), (16, 1, 1, 1)]),
    lambda arguments, block: cdiv(arguments["windows"] * arguments["topk"], block.m),
)


def _describe(q: Tensor, k: Tensor, v: Tensor, idx: Tensor, n_win: tuple[int, int], num_heads: int) -> dict[str, Any]:
    """The arguments that all gathering kernels take, by name."""
    head_dim = q.shape[3] // num_heads
    return {
        **{"q_ptr": q, "k_ptr": k, "v_ptr": v, **strides(q=q, k=k, v=v)},
        **{"windows": n_win[0] * n_win[1], "across": n_win[1], "num_heads": num_heads, "topk": idx.shape[2]},
        **{"q_width": q.shape[2], "q_window_h": q.shape[1] // n_win[0], "q_window_w": q.shape[2] // n_win[1]},
        **{"width": k.shape[2], "window_h": k.shape[1] // n_win[0], "window_w": k.shape[2] // n_win[1]},
        **{"HEAD_DIM": head_dim, "BLOCK_D": padded(head_dim), "PRECISION": precision(q.dtype)},
    }


def _sizes(arguments: dict[str, Any]) -> tuple[int, int, int]:
    """Tokens per query window and key window, and routed windows."""
    w_q = arguments["q_window_h"] * arguments["q_window_w"]
    return w_q, arguments["window_h"] * arguments["window_w"], arguments["topk"]


def forward(
    q: Tensor, k: Tensor, v: Tensor, idx: Tensor, n_win: tuple[int, int], num_heads: int, scale: float
) -> tuple[Tensor, Tensor]:
    """See `ops.routed_attention`. Returns out (B, Hq, Wq, C) and lse (B, m, Hq*Wq), in base 2, for `backward`."""
    q, k, v, idx = as_tokens(q), as_tokens(k), as_tokens(v), idx.contiguous()
    b, height, width, _ = q.shape
    out = q.new_empty(q.shape)
    lse = q.new_empty((b, num_heads, height * width), dtype=torch.float32)
    if masked_triton.suits(q, idx, num_heads):
        masked_triton.forward(q, k, v, idx, n_win, num_heads, scale, out, lse)
        return out, lse
    arguments = _describe(q, k, v, idx, n_win, num_heads)
    w_q, w, topk = _sizes(arguments)
    _run_forward(
        lambda block: idx.shape[0] * idx.shape[1] * cdiv(w_q, block.m) * num_heads,
        (padded(w_q), padded(w * topk)),
        **arguments, idx_ptr=idx, out_ptr=out, lse_ptr=lse, scale=scale,
    )  # fmt: skip
    return out, lse


def invert_routes(idx: Tensor) -> tuple[Tensor, Tensor]:
    """Who reads each window: idx (B, P, k) -> readers (B*P*k) int32, first (B*P + 1) int64.

    readers[first[j]:first[j+1]] are the query windows of the image that read window j (= b*P + p), ascending.
    """
    b, p, topk = idx.shape
    readers = idx.new_empty(b * p * topk, dtype=torch.int32)
    first = idx.new_empty(b * p + 1, dtype=torch.int64)
    _run_invert(
        lambda _: b * p, (padded(p * topk), 1), idx_ptr=idx, readers_ptr=readers, first_ptr=first, windows=p, topk=topk
    )
    return readers, first


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, contiguous."""
    q, k, v, idx, grad = as_tokens(q), as_tokens(k), as_tokens(v), idx.contiguous(), grad.contiguous()
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    if masked_triton.suits(q, idx, num_heads):
        masked_triton.backward(grad, q, k, v, idx, out, lse, n_win, num_heads, scale, dq, dk, dv)
        return dq, dk, dv
    arguments = {**_describe(q, k, v, idx, n_win, num_heads), "grad_ptr": grad, "out_ptr": out, "scale": scale}
    w_q, w, topk = _sizes(arguments)
    one_pass = topk == 1 and w <= 64 and q.dtype != torch.float32
    delta = lse if one_pass else torch.empty_like(lse)
    arguments |= {"lse_ptr": lse, "delta_ptr": delta, "dq_ptr": dq}
    windows = idx.shape[0] * idx.shape[1]
    if not one_pass:
        _run_backward_q(
            lambda block: windows * cdiv(w_q, block.m) * num_heads,
            (padded(w_q), padded(w * topk)),
            **arguments, idx_ptr=idx,
        )  # fmt: skip
    readers, first = invert_routes(idx)
    _run_backward_kv(
        lambda block: windows * cdiv(w, block.n) * num_heads,
        (padded(w_q * topk), padded(w)),
        **arguments, readers_ptr=readers, first_ptr=first, dk_ptr=dk, dv_ptr=dv, WITH_DQ=one_pass,
    )  # fmt: skip
    return dq, dk, dv
