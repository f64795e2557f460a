"""Bi-level routing attention as arithmetic (BiFormer, arXiv 2303.08810, section 3.2).

Letters: B batch, P windows, w tokens per window, C channels, m heads, k routed windows.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def route_windows(q_win: Tensor, k_win: Tensor, topk: int, scale: float) -> tuple[Tensor, Tensor]:
    """Choose, for every query window, the `topk` key windows with the highest affinity (eqs. 3-4).

    q_win, k_win: (B, P, C) window means; of fewer windows than `topk`, all are kept. Routing takes no part in autograd.
    Returns the kept logits (B, P, topk), descending, and their window numbers, int64 of the same shape.
    """
    affinity = (q_win.detach() * scale) @ k_win.detach().transpose(-2, -1)
    return affinity.topk(min(topk, affinity.shape[-1]), dim=-1)


def routed_attention(q: Tensor, k: Tensor, v: Tensor, idx: Tensor, num_heads: int, scale: float) -> Tensor:
    """Every token of a window attends to all tokens of its routed windows (eqs. 5-6).

    q: (B, P, w_q, C); k, v: (B, P, w, C); idx: (B, P, k) int64 window numbers in 0..P-1, repeats allowed.
    Channels are split in `num_heads` consecutive heads. Returns (B, P, w_q, C).

    A routed window is one contiguous row of w*2C numbers, so the gather copies whole rows by a
    B*P*k index and its backward adds whole rows; the index is never expanded to elements.
    """
    b, p, w, c = k.shape
    w_q, topk = q.shape[2], idx.shape[-1]
    first_row = p * torch.arange(b, device=idx.device)
    rows = (idx + first_row[:, None, None]).flatten()

    def gathered_heads(x: Tensor) -> Tensor:  # (B, P, w, C) -> (B*P, m, k*w, C/m)
        x = x.reshape(b * p, w * c).index_select(0, rows)
        return x.view(b * p, topk * w, num_heads, c // num_heads).transpose(1, 2)

    q = q.reshape(b * p, w_q, num_heads, c // num_heads).transpose(1, 2)
    out = F.scaled_dot_product_attention(q, gathered_heads(k), gathered_heads(v), scale=scale)
    return out.transpose(1, 2).reshape(b, p, w_q, c)
