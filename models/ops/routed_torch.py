"""Routed attention with PyTorch's own kernels, in one of two ways.

Gathered: a routed window is one contiguous row of w*C numbers, so a gather copies whole rows by a B*P*k index and its
backward adds whole rows. The copies are made for a bounded number of query windows at a time and not kept: backward
gathers again.

Dense: all keys, with a bias of -inf where the query's window does not read the key's. It multiplies more and copies
nothing, not even to put tokens in windows, which is faster where windows are small or many of them are read: most of
the models' attentions.

Letters: B batch, P windows, w tokens per window, C channels, m heads, k routed windows, R query windows at a time,
I images at a time.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .windows import from_windows, to_windows


def window_rows(idx: Tensor) -> Tensor:
    """Window numbers (B, P, k) within images -> row numbers (B*P, k) in a batch of windows."""
    b, p, k = idx.shape
    return (idx + p * torch.arange(b, device=idx.device)[:, None, None]).view(b * p, k)


def add_rows_(target: Tensor, rows: Tensor, source: Tensor) -> None:
    """target[rows] += source for matrices, in the same order every time, also where `rows` repeat."""
    if target.device.type == "cpu":
        target.index_add_(0, rows, source)
    else:  # there index_add_ is atomic, this sorts
        target.index_put_((rows,), source, accumulate=True)


class _Chunks:
    """The inputs as rows of windows, and the chunks of query windows whose copies fit the workspace."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, idx: Tensor, num_heads: int) -> None:
        b, p, self.w, c = k.shape
        self.num_heads, self.keys = num_heads, idx.shape[-1] * self.w
        self.q = q.reshape(b * p, -1, c)
        self.k, self.v = k.reshape(b * p, -1), v.reshape(b * p, -1)
        self.rows = window_rows(idx)

    def slices(self, numbers_per_window: int, itemsize: int, workspace: int) -> Iterator[slice]:
        size = max(1, workspace // (numbers_per_window * itemsize))
        return (slice(start, start + size) for start in range(0, len(self.q), size))

    def heads(self, x: Tensor) -> Tensor:
        """(R, n, C) or rows (R*k, w*C) -> (R, m, n, C/m)."""
        if x.ndim == 2:
            x = x.view(-1, self.keys, self.q.shape[-1])
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def sums(self, lse: Tensor) -> Tensor:
        """What `lse_like` makes, by windows: (B*P, m, n)."""
        return lse.view(len(self.q), self.num_heads, -1)

    def gather(self, x: Tensor, chunk: slice) -> Tensor:
        """Routed windows of the chunk's query windows: (R, m, k*w, C/m), a copy."""
        return self.heads(x.index_select(0, self.rows[chunk].flatten()))


DENSE_COST = 32
"""Most products per product needed at which the dense way wins: queries of a window x windows / routed windows.

Measured on two CPU cores; a gathered number costs about as much as so many products.
"""


class _Dense:
    """The maps by heads, (B, m, H*W, C/m), and the bias between all tokens of an image."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, idx: Tensor, n_win: tuple[int, int], num_heads: int) -> None:
        self.num_heads, self.idx = num_heads, idx
        self.q, self.k, self.v = self.heads(q), self.heads(k), self.heads(v)
        self.q_window, self.k_window = window_of_tokens(q, n_win), window_of_tokens(k, n_win)

    def heads(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, m, H*W, C/m), a view."""
        return x.flatten(1, 2).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def chunks(self, copies: int, itemsize: int, workspace: int) -> Iterator[slice]:
        """Images of which `copies` arrays like one head's logits fit the workspace."""
        images = max(1, workspace // (copies * self.q.shape[2] * self.k.shape[2] * itemsize))
        return (slice(start, start + images) for start in range(0, len(self.q), images))

    def bias(self, images: slice, dtype: torch.dtype) -> Tensor:
        """(I, 1, Hq*Wq, H*W): 0 where the query's window reads the key's, else -inf."""
        idx = self.idx[images]
        bias = torch.full((*idx.shape[:2], idx.shape[1]), -torch.inf, dtype=dtype, device=idx.device)
        bias.scatter_(2, idx, 0)
        return bias.index_select(2, self.k_window).index_select(1, self.q_window)[:, None]


def window_of_tokens(x: Tensor, n_win: tuple[int, int]) -> Tensor:
    """Window numbers (H*W) of the tokens of a map (B, H, W, C)."""
    rows, columns = (
        torch.arange(side, device=x.device) // (side // n) for side, n in zip(x.shape[1:3], n_win, strict=True)
    )
    return (rows[:, None] * n_win[1] + columns).flatten()


def _is_dense(q: Tensor, k: Tensor, idx: Tensor, workspace: int) -> bool:
    topk, queries, keys = idx.shape[2], q.shape[1] * q.shape[2], k.shape[1] * k.shape[2]
    return queries * keys * q.element_size() <= workspace and queries <= DENSE_COST * topk


def lse_like(q: Tensor, num_heads: int) -> Tensor:
    """An empty tensor for what `forward` tells `backward`: on CPUs the logarithm of every query's sum (B, m, Hq*Wq).

    In float32 at least. Elsewhere it has no elements, and backward computes the weights again.
    """
    shape = (q.shape[0], num_heads, q.shape[1] * q.shape[2]) if q.device.type == "cpu" else (0,)
    return q.new_empty(shape, dtype=torch.promote_types(q.dtype, torch.float32))


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor | None]:
    """Attention (R, m, n, C/m), and on CPUs the logarithms of the sums (R, m, n)."""
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale), None
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return flash(*_rows_of_channels(q, k, v), 0.0, False, attn_mask=bias, scale=scale)


def _gradients(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the arguments of `_attend`; out, lse: what it returned."""
    if q.device.type == "cpu":
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        inputs = _rows_of_channels(dout, q, k, v, out)
        return flash(*inputs, lse, 0.0, False, attn_mask=bias, scale=scale)
    logits = (q * scale) @ k.mT
    weights = (logits if bias is None else logits.add_(bias)).softmax(-1)
    dlogits = torch._softmax_backward_data(dout @ v.mT, weights, -1, q.dtype).mul_(scale)
    return dlogits @ k, dlogits.mT @ q, weights.mT @ dout


def _rows_of_channels(*tensors: Tensor) -> list[Tensor]:
    """The tensors with the numbers of a head side by side, as PyTorch's kernel wants them."""
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    idx: Tensor,
    n_win: tuple[int, int],
    num_heads: int,
    scale: float,
    workspace: int,
) -> tuple[Tensor, Tensor]:
    """See `ops.routed_attention`; and what `backward` wants to know."""
    way = _forward_dense if _is_dense(q, k, idx, workspace) else _forward_gathered
    return way(q, k, v, idx, n_win, num_heads, scale, workspace)


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
    workspace: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, contiguous; half precision is computed and summed in float32."""
    way = _backward_dense if _is_dense(q, k, idx, workspace) else _backward_gathered
    # Autocast would take the products to half precision again.
    with torch.autocast(q.device.type, enabled=False):
        return way(grad, q, k, v, idx, out, lse, n_win, num_heads, scale, workspace)


def _forward_dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    idx: Tensor,
    n_win: tuple[int, int],
    num_heads: int,
    scale: float,
    workspace: int,
) -> tuple[Tensor, Tensor]:
    dense, lse, parts = _Dense(q, k, v, idx, n_win, num_heads), lse_like(q, num_heads), []
    for images in dense.chunks(1, q.element_size(), workspace):
        bias = dense.bias(images, q.dtype)
        part, sums = _attend(dense.q[images], dense.k[images], dense.v[images], bias, scale)
        parts.append(part)
        if sums is not None:
            lse[images] = sums
    return _as_map(parts, q), lse


def _as_map(parts: list[Tensor], like: Tensor) -> Tensor:
    """Images by heads (I, m, H*W, C/m) -> all of them as a contiguous map; one part as PyTorch's kernel makes it is."""
    x = parts[0] if len(parts) == 1 else torch.cat(parts)
    return x.transpose(1, 2).reshape(like.shape)


def _backward_dense(
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
    workspace: int,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(q.dtype, torch.float32)
    dense, parts = _Dense(q, k, v, idx, n_win, num_heads), ([], [], [])
    sources = dense.heads(grad), dense.q, dense.k, dense.v
    # On CPUs no logits are kept, but there is the bias.
    for images in dense.chunks(1 if q.device.type == "cpu" else 3 * num_heads + 1, dtype.itemsize, workspace):
        inputs = (x[images].to(dtype) for x in sources)
        read = dense.heads(out)[images].to(dtype)
        gradients = _gradients(*inputs, dense.bias(images, dtype), read, lse[images], scale)
        for of_all, part in zip(parts, gradients, strict=True):
            of_all.append(part.to(q.dtype))
    return _as_map(parts[0], q), _as_map(parts[1], k), _as_map(parts[2], v)


def _forward_gathered(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    idx: Tensor,
    n_win: tuple[int, int],
    num_heads: int,
    scale: float,
    workspace: int,
) -> tuple[Tensor, Tensor]:
    height, width, c = q.shape[1:]
    chunks = _Chunks(to_windows(q, n_win), to_windows(k, n_win), to_windows(v, n_win), idx, num_heads)
    out, lse = torch.empty_like(chunks.q, memory_format=torch.contiguous_format), lse_like(q, num_heads)
    for chunk in chunks.slices(2 * chunks.keys * c, q.element_size(), workspace):
        inputs = chunks.heads(chunks.q[chunk]), chunks.gather(chunks.k, chunk), chunks.gather(chunks.v, chunk)
        part, sums = _attend(*inputs, None, scale)
        out[chunk] = part.transpose(1, 2).flatten(2)
        if sums is not None:
            chunks.sums(lse)[chunk] = sums
    return from_windows(out.unflatten(0, idx.shape[:2]), n_win, height, width), lse


def _backward_gathered(
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
    workspace: int,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype, on_cpu = torch.promote_types(q.dtype, torch.float32), q.device.type == "cpu"
    chunks = _Chunks(to_windows(q, n_win), to_windows(k, n_win), to_windows(v, n_win), idx, num_heads)
    grad_rows, out_rows = (to_windows(x, n_win).reshape(chunks.q.shape) for x in (grad, out))
    dq = torch.empty_like(chunks.q, memory_format=torch.contiguous_format)
    dk, dv = torch.zeros_like(chunks.k, dtype=dtype), torch.zeros_like(chunks.v, dtype=dtype)
    queries_per_window, c = chunks.q.shape[1:]

    def rows(x: Tensor) -> Tensor:  # (R, m, k*w, C/m) -> (R*k, w*C)
        return x.transpose(1, 2).reshape(-1, chunks.k.shape[1])

    # Per query window: gathered keys and values with their gradients, and elsewhere than on CPUs four arrays like the
    # logits. Windows too large for the workspace are taken one at a time, with as many of their queries as fit.
    copies, logits = 4 * chunks.keys * c, 0 if on_cpu else 4 * chunks.keys * num_heads
    room = max(0, workspace // dtype.itemsize - copies)
    tile = min(queries_per_window, max(1, room // logits)) if logits else queries_per_window
    for chunk in chunks.slices(copies + logits * queries_per_window, dtype.itemsize, workspace):
        keys, values = chunks.gather(chunks.k, chunk).to(dtype), chunks.gather(chunks.v, chunk).to(dtype)
        others: list[Tensor] = []
        for start in range(0, queries_per_window, tile):
            part = chunk, slice(start, start + tile)
            queries, dout, read = (chunks.heads(x[part]).to(dtype) for x in (chunks.q, grad_rows, out_rows))
            sums = chunks.sums(lse)[chunk] if on_cpu else lse
            dqueries, *more = _gradients(dout, queries, keys, values, None, read, sums, scale)
            dq[part] = dqueries.transpose(1, 2).flatten(2).to(q.dtype)
            others = [a.add_(b) for a, b in zip(others, more, strict=True)] if start else more
        into = chunks.rows[chunk].flatten()
        for target, gathered in zip((dk, dv), others, strict=True):
            add_rows_(target, into, rows(gathered))

    def as_map(x: Tensor, like: Tensor) -> Tensor:
        return from_windows(x.to(like.dtype).view(*idx.shape[:2], -1, c), n_win, *like.shape[1:3])

    return as_map(dq, q), as_map(dk, k), as_map(dv, v)
