"""Bi-level routing attention as arithmetic (BiFormer, arXiv 2303.08810, section 3.2).

Letters: B batch, P windows, w tokens per window, C channels, m heads, k routed windows.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import routed_torch
from .backend import WORKSPACE, choose_backend


def route_windows(q_win: Tensor, k_win: Tensor, topk: int, scale: float) -> tuple[Tensor, Tensor]:
    """Choose, for every query window, the `topk` key windows with the highest affinity (eqs. 3-4).

    q_win, k_win: (B, P, C) window means; of fewer windows than `topk`, all are kept. Routing takes no part in autograd.
    Returns the kept logits (B, P, topk), descending, and their window numbers, int64 of the same shape.
    """
    affinity = (q_win.detach() * scale) @ k_win.detach().transpose(-2, -1)
    return affinity.topk(min(topk, affinity.shape[-1]), dim=-1)


def routed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    idx: Tensor,
    num_heads: int,
    scale: float,
    key_mask: Tensor | None = None,
    backend: str | None = None,
    workspace: int = WORKSPACE,
) -> Tensor:
    """Every token of a window attends to all tokens of its routed windows (eqs. 5-6).

    q: (B, P, w_q, C); k, v: (B, P, w, C); idx: (B, P, k) int64 window numbers in 0..P-1, repeats allowed.
    Channels are split in `num_heads` consecutive heads.
    key_mask: (B, P, w) bool, False for keys that nobody may read, such as padding; a query without any key
    left gets zeros. None: all keys are read.
    backend: see `ops.backend`; ValueError for one that cannot run.
    workspace: bytes that "torch" may use for gathered windows and their logits at a time, at least one window's.
    Returns (B, P, w_q, C).
    """
    name = choose_backend(backend, q, num_heads)
    if not k.dtype == v.dtype == q.dtype:  # under autocast they may come from different layers
        k, v = k.to(q.dtype), v.to(q.dtype)
    if name == "reference":
        return routed_attention_reference(q, k, v, idx, key_mask, num_heads, scale)
    if name == "triton":
        return _triton(q, k, v, idx, key_mask, num_heads, scale)[0]
    return _torch(q, k, v, idx, key_mask, num_heads, scale, workspace)


def routed_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, idx: Tensor, key_mask: Tensor | None, num_heads: int, scale: float
) -> Tensor:
    """`routed_attention` by copying the routed windows and PyTorch's own attention."""
    b, p, w, c = k.shape
    w_q, topk = q.shape[2], idx.shape[-1]
    first_window = p * torch.arange(b, device=idx.device)
    rows = (idx + first_window[:, None, None]).flatten()

    def gathered_heads(x: Tensor) -> Tensor:  # (B, P, w, C) -> (B*P, m, k*w, C/m)
        x = x.reshape(b * p, w * c).index_select(0, rows)
        return x.view(b * p, topk * w, num_heads, c // num_heads).transpose(1, 2)

    q = q.reshape(b * p, w_q, num_heads, c // num_heads).transpose(1, 2)
    if key_mask is None:
        out = F.scaled_dot_product_attention(q, gathered_heads(k), gathered_heads(v), scale=scale)
    else:
        readable = key_mask.reshape(b * p, w)[rows].view(b * p, 1, 1, topk * w)
        nothing = ~readable.any(-1, keepdim=True)
        out = F.scaled_dot_product_attention(
            q, gathered_heads(k), gathered_heads(v), attn_mask=readable | nothing, scale=scale
        ).masked_fill(nothing, 0)
    return out.transpose(1, 2).reshape(b, p, w_q, c)


# -- the backends as operators ------------------------------------------------------------------------------------
# torch.compile and torch.export see each as one node. Bodies run on real tensors only, so Triton loads on first use.


@torch.library.custom_op("debiformer::routed_attention_torch", mutates_args=())
def _torch(
    q: Tensor, k: Tensor, v: Tensor, idx: Tensor, key_mask: Tensor | None, num_heads: int, scale: float, workspace: int
) -> Tensor:
    return routed_torch.forward(q, k, v, idx, key_mask, num_heads, scale, workspace)


@torch.library.custom_op("debiformer::routed_attention_torch_backward", mutates_args=())
def _torch_backward(
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
    return routed_torch.backward(grad, q, k, v, idx, key_mask, num_heads, scale, workspace)


@torch.library.custom_op("debiformer::routed_attention_triton", mutates_args=())
def _triton(
    q: Tensor, k: Tensor, v: Tensor, idx: Tensor, key_mask: Tensor | None, num_heads: int, scale: float
) -> tuple[Tensor, Tensor]:
    from . import routed_triton

    return routed_triton.forward(q, k, v, idx, key_mask, num_heads, scale)


@torch.library.custom_op("debiformer::routed_attention_triton_backward", mutates_args=())
def _triton_backward(
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
    from . import routed_triton

    return routed_triton.backward(grad, q, k, v, idx, key_mask, out, lse, num_heads, scale)


@_torch.register_fake
def _(q, k, v, idx, key_mask, num_heads, scale, workspace):  # noqa: ANN001, ANN202
    return q.new_empty(q.shape)


@_triton.register_fake
def _(q, k, v, idx, key_mask, num_heads, scale):  # noqa: ANN001, ANN202
    b, p, w_q, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((b, p, num_heads, w_q), dtype=torch.float32)


@_torch_backward.register_fake
@_triton_backward.register_fake
def _(grad, q, k, v, *_):  # noqa: ANN001, ANN002, ANN202
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save_torch(ctx, inputs, output) -> None:  # noqa: ANN001
    *tensors, ctx.num_heads, ctx.scale, ctx.workspace = inputs
    ctx.save_for_backward(*tensors)


def _grads_torch(ctx, grad):  # noqa: ANN001, ANN202
    grads = _torch_backward(grad, *ctx.saved_tensors, ctx.num_heads, ctx.scale, ctx.workspace)
    return *grads, None, None, None, None, None


def _save_triton(ctx, inputs, output) -> None:  # noqa: ANN001
    *tensors, ctx.num_heads, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def _grads_triton(ctx, grad, _):  # noqa: ANN001, ANN202
    return *_triton_backward(grad, *ctx.saved_tensors, ctx.num_heads, ctx.scale), None, None, None, None


_torch.register_autograd(_grads_torch, setup_context=_save_torch)
_triton.register_autograd(_grads_triton, setup_context=_save_triton)


# PyTorch's counter of floating-point operations: two matrix products forward; backward five, logits being recomputed.


@register_flop_formula([torch.ops.debiformer.routed_attention_torch, torch.ops.debiformer.routed_attention_triton])
def _flops(q_shape, k_shape, v_shape, idx_shape, *_, **__) -> int:  # noqa: ANN001, ANN002, ANN003
    return 4 * q_shape.numel() * idx_shape[2] * k_shape[2]


@register_flop_formula(
    [torch.ops.debiformer.routed_attention_torch_backward, torch.ops.debiformer.routed_attention_triton_backward]
)
def _backward_flops(grad_shape, q_shape, k_shape, v_shape, idx_shape, *_, **__) -> int:  # noqa: ANN001, ANN002, ANN003
    return 10 * q_shape.numel() * idx_shape[2] * k_shape[2]
