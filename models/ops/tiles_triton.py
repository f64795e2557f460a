"""Steps on tiles that the Triton kernels share.

Letters: B batch, C channels, m heads of D = C/m, M rows and N columns of a tile.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
"""Read when Triton is imported: jit decorates for the interpreter or for the compiler from then on."""


@triton.jit
def load_rows(ptr, offsets, rows_valid, channels, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """A tile (rows, BLOCK_D): channels of the rows that begin at `offsets`, zeros where there are none."""
    pointers = ptr + offsets[:, None] + channels[None, :]
    if HEAD_DIM == BLOCK_D:
        return tl.load(pointers, mask=rows_valid[:, None], other=0.0)
    return tl.load(pointers, mask=rows_valid[:, None] & (channels < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def rounded(x, type: tl.constexpr):
    """float32 numbers in another type, rounded to nearest."""
    if INTERPRETED and type == tl.bfloat16:  # the interpreter cuts bits off: carry the rounding into those it keeps
        bits = x.to(tl.int32, bitcast=True)
        x = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
    return x.to(type)


@triton.jit
def store_rows(ptr, offsets, rows_valid, channels, tile, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Writes what `load_rows` reads, in the type of `ptr`."""
    pointers = ptr + offsets[:, None] + channels[None, :]
    tile = rounded(tile, ptr.dtype.element_ty)
    if HEAD_DIM == BLOCK_D:
        tl.store(pointers, tile, mask=rows_valid[:, None])
    else:
        tl.store(pointers, tile, mask=rows_valid[:, None] & (channels < HEAD_DIM)[None, :])


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """Matrix product of two tiles, in float32."""
    if INTERPRETED:  # the interpreter multiplies bfloat16 by its bits
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def softmax_step(logits, v, largest, total, out, PRECISION: tl.constexpr):
    """One step of attention by online softmax.

    logits: base 2, (M, N), no row -inf throughout. v: (N, D). Returns the new largest logit and sum of weights per
    row (M), and the weighted sum of values (M, D).
    """
    new = tl.maximum(largest, tl.max(logits, 1))
    weights = tl.exp2(logits - new[:, None])
    shrink = tl.exp2(largest - new)
    out = out * shrink[:, None] + dot(rounded(weights, v.dtype), v, PRECISION)
    return new, total * shrink + tl.sum(weights, 1), out


@triton.jit
def store_attention(
    out_ptr, lse_ptr, image, head, num_heads, queries, query, is_query, channel, largest, total, out,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Writes what the steps have summed: out (B, queries, C) and lse (B, m, queries)."""
    rows = (image * queries + query) * (num_heads * HEAD_DIM)
    store_rows(out_ptr + head * HEAD_DIM, rows, is_query, channel, out / total[:, None], HEAD_DIM, BLOCK_D)
    tl.store(lse_ptr + (image * num_heads + head) * queries + query, largest + tl.log2(total), mask=is_query)


@triton.jit
def load_gradient(
    grad_ptr, out_ptr, lse_ptr, delta_ptr, image, head, num_heads, queries, query, is_query, channel,
    FROM_OUT: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """What backward needs of each query.

    Returns where its row of (B, queries, C) begins, its gradient (M, D), lse and delta = sum(grad * out) (M): computed
    FROM_OUT, or read. Queries that do not exist have lse = inf, so that their weights are 0.
    """
    rows = (image * queries + query) * (num_heads * HEAD_DIM)
    grad = load_rows(grad_ptr + head * HEAD_DIM, rows, is_query, channel, HEAD_DIM, BLOCK_D)
    number = (image * num_heads + head) * queries + query
    lse = tl.load(lse_ptr + number, mask=is_query, other=float("inf"))
    if FROM_OUT:
        out = load_rows(out_ptr + head * HEAD_DIM, rows, is_query, channel, HEAD_DIM, BLOCK_D)
        delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    else:
        delta = tl.load(delta_ptr + number, mask=is_query, other=0.0)
    return rows, grad, lse, delta
