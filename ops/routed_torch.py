"""Routed attention with PyTorch's own kernels: whole window rows gathered, a bounded number of windows at a time.

A routed window is one contiguous row of w*C numbers, so a gather copies whole rows by a B*P*k index and its backward
adds whole rows. The copies are not kept: backward gathers again.

Letters: B batch, P windows, w tokens per window, C channels, m heads, k routed windows, R query windows at a time.
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

    def mask(self, chunk: slice) -> tuple[Tensor | None, Tensor | None]:
        """To be added to logits, (R, 1, w_q, k*w), and which query windows have no keys, (R, 1, 1, 1); None: no mask.

        Where all keys are masked none is, so that weights are numbers.
        """
        if self.key_mask is None:
            return None, None
        masked = ~self.key_mask[self.rows[chunk]].flatten(1)[:, None, None]
        nothing = masked.all(-1, keepdim=True)
        added = torch.zeros_like(masked, dtype=self.q.dtype).masked_fill(masked & ~nothing, -torch.inf)
        return added.expand(-1, -1, self.q.shape[1], -1), nothing


def lse_shape(q: Tensor, num_heads: int) -> tuple[int, ...]:
    """Of what `forward` keeps for `backward` beside its output, by device: (B*P, m, w_q) on the CPU, else nothing."""
    return (q.shape[0] * q.shape[1], num_heads, q.shape[2]) if q.device.type == "cpu" else (0,)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    idx: Tensor,
    key_mask: Tensor | None,
    num_heads: int,
    scale: float,
    workspace: int,
) -> tuple[Tensor, Tensor]:
    """See `ops.routed_attention`. Returns out and, on the CPU, the logarithms of the sums of weights."""
    chunks = _Chunks(q, k, v, idx, key_mask, num_heads)
    out = torch.empty_like(chunks.q, memory_format=torch.contiguous_format)
    lse = q.new_empty(lse_shape(q, num_heads), dtype=torch.promote_types(q.dtype, torch.float32))
    for chunk in chunks.slices(2 * chunks.keys * q.shape[-1], q.element_size(), workspace):
        inputs = chunks.heads(chunks.q[chunk]), chunks.gather(chunks.k, chunk), chunks.gather(chunks.v, chunk)
        mask, nothing = chunks.mask(chunk)
        if q.device.type == "cpu":  # the kernel behind PyTorch's attention there; this way it also returns lse
            read, lse[chunk] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                *inputs, attn_mask=mask, scale=scale
            )
        else:
            read = F.scaled_dot_product_attention(*inputs, attn_mask=mask, scale=scale)
        if nothing is not None:
            read = read.masked_fill(nothing, 0)
        out[chunk] = read.transpose(1, 2).flatten(2)
    return out.view(q.shape), lse


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
    workspace: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; those of the keys and values of half precision are summed in float32."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    chunks = _Chunks(q, k, v, idx, key_mask, num_heads)
    grad_rows, out_rows = grad.reshape(chunks.q.shape), out.view(chunks.q.shape)
    dq = torch.empty_like(chunks.q, memory_format=torch.contiguous_format)
    dk, dv = torch.zeros_like(chunks.k, dtype=dtype), torch.zeros_like(chunks.v, dtype=dtype)

    def rows(x: Tensor) -> Tensor:  # (R, m, k*w, C/m) -> (R*k, w*C)
        return x.transpose(1, 2).reshape(-1, chunks.k.shape[1]).to(dtype)

    for chunk in chunks.slices(4 * chunks.keys * q.shape[-1], dtype.itemsize, workspace):
        queries, dout = chunks.heads(chunks.q[chunk]), chunks.heads(grad_rows[chunk])
        keys, values = chunks.gather(chunks.k, chunk), chunks.gather(chunks.v, chunk)
        mask, nothing = chunks.mask(chunk)
        if nothing is not None:
            dout = dout.masked_fill(nothing, 0)
        if q.device.type == "cpu":
            dqueries, dkeys, dvalues = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                dout, queries, keys, values, chunks.heads(out_rows[chunk]), lse[chunk], 0.0, False,
                attn_mask=mask, scale=scale,
            )  # fmt: skip
        else:
            dqueries, dkeys, dvalues = _gradients(dout, queries, keys, values, mask, scale, workspace)
        dq[chunk] = dqueries.transpose(1, 2).flatten(2)
        into = chunks.rows[chunk].flatten()
        add_rows_(dk, into, rows(dkeys))
        add_rows_(dv, into, rows(dvalues))
    return dq.view(q.shape), dk.to(k.dtype).view(k.shape), dv.to(v.dtype).view(v.shape)


def _gradients(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, workspace: int
) -> tuple[Tensor, Tensor, Tensor]:
    """By matrix products in float32 at least, of as many queries at a time as the workspace takes logits of."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    dq, k, v = torch.empty_like(q), k.to(dtype), v.to(dtype)
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    at_once = max(1, workspace // (4 * dtype.itemsize * len(q) * q.shape[1] * k.shape[2]))
    for start in range(0, q.shape[2], at_once):
        part = slice(start, start + at_once)
        queries, grad = q[:, :, part].to(dtype), dout[:, :, part].to(dtype)
        logits = (queries * scale) @ k.mT
        weights = (logits if mask is None else logits + mask[:, :, part]).softmax(-1)
        dlogits = torch._softmax_backward_data(grad @ v.mT, weights, -1, dtype)
        dq[:, :, part] = (dlogits @ k).mul_(scale)
        dk += (dlogits.mT @ queries).mul_(scale)
        dv += weights.mT @ grad
    return dq, dk, dv
