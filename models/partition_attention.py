"""MaxViT's attention in windows and over grids (arXiv 2204.01697)."""

from functools import partial
from typing import Any

import torch
from timm.models.maxxvit import Attention2d
from torch import Tensor, nn

from . import ops
from .attention_maps import PartitionMaps, one_image
from .layers import to_nchw, to_nhwc


class RelativePositionBias(nn.Module):
    """A bias for each head and each pair of tokens of a window: timm's `RelPosBiasTf`, and its parameter's key.

    timm's has buffers that no checkpoint holds, and that a model built on the meta device is left without.
    """

    def __init__(self, window_size: tuple[int, int], num_heads: int, **factory: Any) -> None:
        super().__init__()
        self.window_size = window_size
        height, width = window_size
        self.relative_position_bias_table = nn.Parameter(
            torch.empty(num_heads, 2 * height - 1, 2 * width - 1, **factory)
        )
        nn.init.normal_(self.relative_position_bias_table, std=0.02)

    def get_bias(self) -> Tensor:
        """(heads, queries, keys), both row-major; the table is indexed by where the key is, seen from the query."""
        height, width = self.window_size
        area = height * width
        views = self.relative_position_bias_table.unfold(1, height, 1).unfold(2, width, 1)
        return views.flip(1, 2).reshape(-1, area, area)

    def forward(self, attention: Tensor) -> Tensor:
        """Add the bias to logits (B, heads, queries, keys)."""
        return attention + self.get_bias()


class PartitionAttention(Attention2d):
    """MaxViT's attention in windows of size x size neighbouring tokens, or over a size x size grid of distant ones.

    timm's attention, relative position bias included, with 32-channel heads, (B, H, W, C) in and out. Sides that are no
    multiple of `size` are zero-padded; the padding takes part in the attention.
    """

    def __init__(self, dim: int, size: int, grid: bool) -> None:
        position_bias = partial(RelativePositionBias, (size, size))
        super().__init__(dim, dim, dim_head=32, head_first=False, rel_pos_cls=position_bias)
        self.size, self.grid = size, grid

    def forward(self, x: Tensor) -> Tensor:
        height, width, size = x.shape[1], x.shape[2], self.size
        x = ops.pad_to_multiple(x, size)
        padded_h, padded_w = x.shape[1], x.shape[2]
        n_win = (size, size) if self.grid else (padded_h // size, padded_w // size)

        def transposed(windows: Tensor) -> Tensor:
            # A grid holds one token, always at the same place, of each of size x size windows.
            return windows.transpose(1, 2) if self.grid else windows

        parts = transposed(ops.to_windows(x, n_win))  # (B, P, size * size, C)
        tokens = to_nchw(parts.flatten(0, 1).unflatten(1, (size, size)))
        out = to_nhwc(super().forward(tokens)).reshape(parts.shape)
        return ops.from_windows(transposed(out), n_win, padded_h, padded_w)[:, :height, :width]

    def attention_maps(self, x: Tensor) -> PartitionMaps:
        """The exact maps of one image (1, H, W, C)."""
        q, k, v = to_nhwc(self.qkv(to_nchw(ops.pad_to_multiple(x, self.size)))).chunk(3, dim=-1)
        return PartitionMaps(
            tokens=(x.shape[1], x.shape[2]),
            num_heads=self.num_heads,
            q=one_image(q),
            k=one_image(k),
            bias=one_image(self.rel_pos.get_bias()[None]),
            scale=self.scale,
            grid=self.grid,
            values=one_image(v),
            weight=self.proj.weight.flatten(1),
            rest=self.proj.bias.expand_as(q[0]),
        )
