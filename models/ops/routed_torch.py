"""Routed attention with PyTorch's own kernels, in one of two ways.

Gathered: a routed window is one contiguous row of w*C numbers, so a gather copies whole rows by a B*P*k index and its
backward adds whole rows. The copies are made for a bounded number of query windows at a time and not kept: backward
gathers again.

Dense: all keys, with the logarithm of how often the query's window reads the key's as a bias, -inf where never. That
is the same sum, for exp(logit + log n) = n exp(logit). It multiplies more and copies nothing, which is faster where
windows are small or many of them are read: most of the models' attentions.

Letters: B batch, P windows, w tokens per window, C channels, m heads, k routed windows, R query windows at a time,
I images at a time.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor


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

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, idx: Tensor, key_mask: Tensor | None, num_heads: int) -> None:
        b, p, self.w, c = k.shape
        self.num_heads, self.keys = num_heads, idx.shape[-1] * self.w
        self.q = q.reshape(b * p, -1, c)
        self.k, self.v = k.reshape(b * p, -1), v.reshape(b * p, -1)
        self.key_mask = None if key_mask is None else key_mask.reshape(b * p, self.w)
        self.rows = window_rows(idx)

    def slices(self, numbers_per_window: int, itemsize: int, workspace: int) -> Iterator[slice]:
        size = max(1, workspace // (numbers_per_window * itemsize))
        return (slice(start, start + size) for start in range(0, len(self.q), size))

    def heads(self, x: Tensor) -> Tensor:
        """(R, n, C) or rows (R*k, w*C) -> (R, m, n, C/m)."""
        if x.ndim == 2:
            x = x.view(-1, self.keys, self.q.shape[-1])
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def gather(self, x: Tensor, chunk: slice) -> Tensor:
        """Routed windows of the chunk's query windows: (R, m, k*w, C/m), a copy."""
        return self.heads(x.index_select(0, self.rows[chunk].flatten()))

    def unreadable(self, chunk: slice) -> tuple[Tensor, Tensor]:
        """Which keys are masked, (R, 1, 1, k*w), and which query windows have no other, (R, 1, 1, 1)."""
        masked = ~self.key_mask[self.rows[chunk]].flatten(1)[:, None, None]
        nothing = masked.all(-1, keepdim=True)
        return masked & ~nothing, nothing


DENSE_COST = 32
"""Most products per product needed at which the dense way wins: queries of a window x windows / routed windows.

Measured on two CPU cores; a gathered number costs about as much as so many products.
"""


class _Dense:
    """The inputs by heads, (B, m, P*w, C/m), and the bias between all tokens of an image."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, idx: Tensor, key_mask: Tensor | None, num_heads: int) -> None:
        self.num_heads = num_heads
        self.q, self.k, self.v = self.heads(q), self.heads(k), self.heads(v)
        self.idx, self.key_mask = idx, key_mask
        self.tokens = q.shape[2], k.shape[2]

    def heads(self, x: Tensor) -> Tensor:
        """(B, P, w, C) -> (B, m, P*w, C/m), a view."""
        return x.flatten(1, 2).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def chunks(self, copies: int, itemsize: int, workspace: int) -> Iterator[slice]:
        """Images of which `copies` arrays like one head's logits fit the workspace."""
        images = max(1, workspace // (copies * self.q.shape[2] * self.k.shape[2] * itemsize))
        return (slice(start, start + images) for start in range(0, len(self.q), images))

    def bias(self, images: slice, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """(I, 1, P*w_q, P*w), and which query windows have no key to read (I, 1, P*w_q, 1), None if all have."""
        idx = self.idx[images]
        reads = idx.new_zeros(*idx.shape[:2], idx.shape[1], dtype=dtype)
        bias = reads.scatter_add_(2, idx, torch.ones_like(idx, dtype=dtype)).log_()
        bias = bias.repeat_interleave(self.tokens[1], dim=2)
        nothing = None
        if self.key_mask is not None:
            bias.masked_fill_(~self.key_mask[images].flatten(1)[:, None], -torch.inf)
            nothing = (bias == -torch.inf).all(-1, keepdim=True)
            bias.masked_fill_(nothing, 0)
            nothing = nothing.repeat_interleave(self.tokens[0], dim=1)[:, None]
        return bias.repeat_interleave(self.tokens[0], dim=1)[:, None], nothing


def _is_dense(q: Tensor, k: Tensor, idx: Tensor, workspace: int) -> bool:
    p, w_q, topk = q.shape[1], q.shape[2], idx.shape[-1]
    fits = p * w_q * p * k.shape[2] * q.element_size() <= workspace
    return fits and w_q * p <= DENSE_COST * topk


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    idx: Tensor,
    key_mask: Tensor | None,
    num_heads: int,
    scale: float,
    workspace: int,
) -> Tensor:
    """See `ops.routed_attention`."""
    way = _forward_dense if _is_dense(q, k, idx, workspace) else _forward_gathered
    return way(q, k, v, idx, key_mask, num_heads, scale, workspace)


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    idx: Tensor,
    key_mask: Tensor | None,
    num_heads: int,
    scale: float,
    workspace: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; half precision is computed and summed in float32."""
    way = _backward_dense if _is_dense(q, k, idx, workspace) else _backward_gathered
    return way(grad, q, k, v, idx, key_mask, num_heads, scale, workspace)


def _forward_dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    idx: Tensor,
    key_mask: Tensor | None,
    num_heads: int,
    scale: float,
    workspace: int,
) -> Tensor:
    dense = _Dense(q, k, v, idx, key_mask, num_heads)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for images in dense.chunks(1, q.element_size(), workspace):
        bias, nothing = dense.bias(images, q.dtype)
        read = F.scaled_dot_product_attention(
            dense.q[images], dense.k[images], dense.v[images], attn_mask=bias, scale=scale
        )
        if nothing is not None:
            read = read.masked_fill(nothing, 0)
        dense.heads(out)[images] = read
    return out


def _backward_dense(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    idx: Tensor,
    key_mask: Tensor | None,
    num_heads: int,
    scale: float,
    workspace: int,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(q.dtype, torch.float32)
    dense, grads = _Dense(q, k, v, idx, key_mask, num_heads), [x.new_empty(x.shape) for x in (q, k, v)]
    dout = dense.heads(grad)
    for images in dense.chunks(3 * num_heads + 1, dtype.itemsize, workspace):
        queries, keys, values, douts = (x[images].to(dtype) for x in (dense.q, dense.k, dense.v, dout))
        bias, nothing = dense.bias(images, dtype)
        logits = (queries * scale) @ keys.mT
        weights = logits.add_(bias).softmax(-1)
        if nothing is not None:
            douts = douts.masked_fill(nothing, 0)
        dlogits = torch._softmax_backward_data(douts @ values.mT, weights, -1, dtype).mul_(scale)
        for target, part in zip(grads, (dlogits @ keys, dlogits.mT @ queries, weights.mT @ douts), strict=True):
            dense.heads(target)[images] = part.to(target.dtype)
    return tuple(grads)


def _forward_gathered(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    idx: Tensor,
    key_mask: Tensor | None,
    num_heads: int,
    scale: float,
    workspace: int,
) -> Tensor:
    chunks = _Chunks(q, k, v, idx, key_mask, num_heads)
    out = torch.empty_like(chunks.q, memory_format=torch.contiguous_format)
    for chunk in chunks.slices(2 * chunks.keys * q.shape[-1], q.element_size(), workspace):
        inputs = chunks.heads(chunks.q[chunk]), chunks.gather(chunks.k, chunk), chunks.gather(chunks.v, chunk)
        if key_mask is None:
            read = F.scaled_dot_product_attention(*inputs, scale=scale)
        else:
            masked, nothing = chunks.unreadable(chunk)
            read = F.scaled_dot_product_attention(*inputs, attn_mask=~masked, scale=scale).masked_fill(nothing, 0)
        out[chunk] = read.transpose(1, 2).flatten(2)
    return out.view(q.shape)


def _backward_gathered(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    idx: Tensor,
    key_mask: Tensor | None,
    num_heads: int,
    scale: float,
    workspace: int,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(q.dtype, torch.float32)
    chunks = _Chunks(q, k, v, idx, key_mask, num_heads)
    grad_rows = grad.reshape(chunks.q.shape)
    dq = torch.empty_like(chunks.q, memory_format=torch.contiguous_format)
    dk, dv = torch.zeros_like(chunks.k, dtype=dtype), torch.zeros_like(chunks.v, dtype=dtype)

    def rows(x: Tensor) -> Tensor:  # (R, m, k*w, C/m) -> (R*k, w*C)
        return x.transpose(1, 2).reshape(-1, chunks.k.shape[1])

    # Per query window: gathered keys and values with their gradients, and four arrays like the logits. Windows that
    # are too large for the workspace are taken one at a time, with as many of their queries at a time as fit.
    copies, logits = 4 * chunks.keys * q.shape[-1], 4 * chunks.keys * num_heads
    tile = min(q.shape[2], max(1, (workspace // dtype.itemsize - copies) // logits))
    for chunk in chunks.slices(copies + logits * q.shape[2], dtype.itemsize, workspace):
        keys, values = chunks.gather(chunks.k, chunk).to(dtype), chunks.gather(chunks.v, chunk).to(dtype)
        masked, nothing = (None, None) if key_mask is None else chunks.unreadable(chunk)
        dkeys, dvalues = torch.zeros_like(keys), torch.zeros_like(values)
        for start in range(0, q.shape[2], tile):
            part = chunk, slice(start, start + tile)
            queries, dout = chunks.heads(chunks.q[part]).to(dtype), chunks.heads(grad_rows[part]).to(dtype)
            if nothing is not None:
                dout = dout.masked_fill(nothing, 0)
            weights, dlogits = _weights_and_dlogits(queries * scale, keys, values, dout, masked)
            dq[part] = (dlogits @ keys).mul_(scale).transpose(1, 2).flatten(2).to(q.dtype)
            dkeys += (dlogits.mT @ queries).mul_(scale)
            dvalues += weights.mT @ dout
        into = chunks.rows[chunk].flatten()
        add_rows_(dk, into, rows(dkeys))
        add_rows_(dv, into, rows(dvalues))
    return dq.view(q.shape), dk.to(k.dtype).view(k.shape), dv.to(v.dtype).view(v.shape)


def _weights_and_dlogits(
    q: Tensor, keys: Tensor, values: Tensor, dout: Tensor, masked: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Attention weights, and the gradient of the logits from that of the output."""
    logits = q @ keys.mT
    if masked is not None:
        logits.masked_fill_(masked, -torch.inf)
    weights = logits.softmax(-1)
    return weights, torch._softmax_backward_data(dout @ values.mT, weights, -1, weights.dtype)
