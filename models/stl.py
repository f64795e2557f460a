"""Swin-T's layout with other attention: the ablation models of BiFormer (arXiv 2303.08810) and its MaxViT counterpart.

Letters: B batch, H x W map, C channels, P windows, w tokens per window.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.fx
from timm.layers import DropPath, LayerNorm2d
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from . import ops
from .attention import BiLevelRoutingAttention, FullAttention, Router, check_heads
from .attention_maps import RoutedMaps, one_image
from .attention_table import PerStage, build_attention, per_stage, register_attention, window_strides
from .backbone import Backbone, build_variant, check_per_stage, default_cfg
from .layers import AddNorm, DepthwiseConv, Downsampling, MapLinear, PointwiseConv, init_linear, to_nchw, to_nhwc
from .partition_attention import PartitionAttention
from .weights.releases import RELEASES


class PooledRouter(Router):
    """Chooses windows by their pooled queries and keys; on a map of fewer windows than top-k, all are kept."""

    def forward(self, q: Tensor, k: Tensor, window: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """(B, H, W, C) maps and tokens per window and axis -> logits (B, P, k), descending, and numbers, int64."""
        q_windows, k_windows = ops.pool_windows(q, window), ops.pool_windows(k, window)
        return ops.route_windows(q_windows, k_windows, self.topk, self.scale)


@register_attention("pooled_routing")
class PooledRoutingAttention(nn.Module):
    """BRA whose windows have (H // n_win) x (W // n_win) tokens, so that at some sizes there are more than n_win**2.

    The last row and column of windows is filled up with zeros, which take part in the attention but not in routing.
    Maps with fewer than `n_win` tokens a side, for which the published code has no windows, get windows of one token.
    (B, H, W, C) in and out.
    """

    def __init__(self, dim: int, num_heads: int, n_win: int, topk: int) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        self.num_heads, self.scale = num_heads, dim**-0.5
        self.qkv_linear = PointwiseConv(dim, 3 * dim)
        self.router = PooledRouter(n_win, topk, scale=1.0)
        self.lepe = DepthwiseConv(dim, 5)
        self.output_linear = PointwiseConv(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1], x.shape[2]
        window_h, rows = ops.split_side(height, self.router.n_win)
        window_w, columns = ops.split_side(width, self.router.n_win)
        window, n_win = (window_h, window_w), (rows, columns)

        q, k, v = self.qkv_linear(x).chunk(3, dim=-1)
        _, idx = self.router(q, k, window)
        lepe = self.lepe(v)
        q, k, v = (ops.pad_to_multiple(t, window) for t in (q, k, v))
        out = ops.routed_attention(q, k, v, idx, n_win, self.num_heads, self.scale)
        return self.output_linear(out[:, :height, :width] + lepe)

    def attention_maps(self, x: Tensor) -> RoutedMaps:
        """The exact maps of one image (1, H, W, C). ValueError for maps with more windows along one side."""
        (window_h, rows), (window_w, columns) = (ops.split_side(side, self.router.n_win) for side in x.shape[1:3])
        if rows != columns:
            raise ValueError(f"{rows}x{columns} windows cannot be shown; use a square image")
        q, k, _ = self.qkv_linear(x).chunk(3, dim=-1)
        _, idx = self.router(q, k, (window_h, window_w))
        q, k = (ops.pad_to_multiple(t, (window_h, window_w)) for t in (q, k))
        tokens = (x.shape[1], x.shape[2])
        return RoutedMaps(tokens, self.num_heads, one_image(q), one_image(k), rows, one_image(idx), self.scale)


class STLBlock(nn.Module):
    """Attention and feed-forward after LayerNorm, without positional convolution. (B, C, H, W) in and out.

    attn, mlp: modules (B, H, W, C) -> (B, H, W, C); eps: of the norms.
    """

    def __init__(self, dim: int, attn: nn.Module, mlp: nn.Module, eps: float, drop_path: float) -> None:
        super().__init__()
        self.norm1 = AddNorm(dim, eps=eps)
        self.attn = attn
        self.norm2 = AddNorm(dim, eps=eps)
        self.mlp = mlp
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x, y = self.norm1(to_nhwc(x))
        x, y = self.norm2(x, self.drop_path(self.attn(y)))
        x = x + self.drop_path(self.mlp(y))
        return to_nchw(x)


class Stage(nn.Module):
    """Blocks in sequence, one level down at the key `blocks`, as published."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, number: int) -> nn.Module:
        return self.blocks[number]

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self.blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


def patch_downsampling(
    in_chans: int, embed_dims: Sequence[int], norm_layer: Callable[[int], nn.Module]
) -> list[nn.Module]:
    """What opens each stage: 4x4 patches, then merging of 2x2 tokens; what fills no whole patch is lost."""
    stem = Downsampling(nn.Conv2d(in_chans, embed_dims[0], 4, stride=4), norm_layer(embed_dims[0]))
    merges = [
        Downsampling(norm_layer(before), nn.Conv2d(before, after, 2, stride=2))
        for before, after in pairwise(embed_dims)
    ]
    return [stem, *merges]


def check_smallest_size(x: Tensor, smallest: int) -> Tensor:
    """Returns x (B, C, H, W); ValueError if a side has fewer than `smallest` pixels."""
    if min(x.shape[2:]) < smallest:
        raise ValueError(f"image size {x.shape[2]}x{x.shape[3]}: this model needs at least {smallest} pixels a side")
    return x


torch.fx.wrap("check_smallest_size")


class SwinLayout(Backbone):
    """Four stages of blocks between patches. Images need at least 32 pixels a side (one token in the last stage).

    norm_layer(dim) builds the norms of stem, merging and classifier.
    img_size is accepted for timm's sake: nothing in these models depends on it. Everything else goes to `Backbone`.
    """

    def __init__(
        self,
        make_block: Callable[[int, int, float], nn.Module],
        norm_layer: Callable[[int], nn.Module],
        img_size: int | tuple[int, int] = 224,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            make_block,
            downsampling=partial(patch_downsampling, norm_layer=norm_layer),
            round_up=False,
            make_stage=Stage,
            norm_layer=norm_layer,
            **kwargs,
        )
        self.apply(init_linear)

    def check_input(self, x: Tensor) -> Tensor:
        return super().check_input(check_smallest_size(x, self.feature_info[len(self.stages) - 1]["reduction"]))


class BiFormerSTL(SwinLayout):
    """BiFormer's attention in Swin-T's layout. Arguments with four values hold one per stage.

    topk: routed windows per window; None for a stage with plain attention over all tokens.
    nchw: 1x1 convolutions, `PooledRoutingAttention`, and LePE on the values throughout; this variant pads by its
    definition, whatever `auto_pad` says.
    attn_layer: another attention, see `DeBiFormer`.
    """

    def __init__(
        self,
        embed_dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 8),
        mlp_ratios: Sequence[float] = (4, 4, 4, 4),
        n_win: int = 7,
        topk: Sequence[int | None] = (1, 4, 16, None),
        nchw: bool = False,
        attn_layer: PerStage = None,
        **kwargs: Any,
    ) -> None:
        check_per_stage(embed_dims=embed_dims, depths=depths, num_heads=num_heads, mlp_ratios=mlp_ratios, topk=topk)
        linear = PointwiseConv if nchw else MapLinear
        routing = PooledRoutingAttention if nchw else BiLevelRoutingAttention
        layers = per_stage(attn_layer, [FullAttention if k is None else routing for k in topk])

        def make_block(i: int, _number: int, drop_path: float) -> STLBlock:
            dim, hidden = embed_dims[i], int(embed_dims[i] * mlp_ratios[i])
            settings = {"n_win": n_win, "topk": topk[i], "linear": linear, "lepe_on_values": nchw}
            attn = build_attention(layers[i], dim, num_heads[i], **settings)
            mlp = nn.Sequential(linear(dim, hidden), nn.GELU(), linear(hidden, dim))
            return STLBlock(dim, attn, mlp, eps=1e-6, drop_path=drop_path)

        super().__init__(
            make_block,
            nn.BatchNorm2d,
            embed_dims=embed_dims,
            depths=depths,
            n_win=n_win,
            grid_strides=[window_strides(layer) for layer in layers],
            **kwargs,
        )


class MaxViTSTL(SwinLayout):
    """MaxViT's attention (arXiv 2204.01697) in Swin-T's layout: windows in even blocks, grids in odd ones.

    partition_size: tokens per side of a window or a grid. Arguments with four values hold one per stage.
    """

    def __init__(
        self,
        embed_dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (2, 2, 6, 2),
        mlp_ratios: Sequence[float] = (4, 4, 4, 4),
        partition_size: int = 7,
        **kwargs: Any,
    ) -> None:
        check_per_stage(embed_dims=embed_dims, depths=depths, mlp_ratios=mlp_ratios)

        def make_block(i: int, number: int, drop_path: float) -> STLBlock:
            dim, hidden = embed_dims[i], int(embed_dims[i] * mlp_ratios[i])
            attn = PartitionAttention(dim, partition_size, grid=number % 2 == 1)
            layers = {"fc1": PointwiseConv(dim, hidden), "act": nn.GELU(), "fc2": PointwiseConv(hidden, dim)}
            return STLBlock(dim, attn, nn.Sequential(OrderedDict(layers)), eps=1e-5, drop_path=drop_path)

        super().__init__(
            make_block,
            partial(LayerNorm2d, eps=1e-6),
            embed_dims=embed_dims,
            depths=depths,
            n_win=partition_size,
            grid_strides=[(1,)] * len(depths),
            **kwargs,
        )


CLASSES: dict[str, type[SwinLayout]] = {
    "biformer_stl": BiFormerSTL,
    "biformer_stl_nchw": BiFormerSTL,
    "maxvit_stl": MaxViTSTL,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "biformer_stl": {},
    "biformer_stl_nchw": {"nchw": True},
    "maxvit_stl": {},
}

default_cfgs = generate_default_cfgs(
    {
        "biformer_stl.in1k": default_cfg(url=RELEASES["biformer_stl"].url, paper_ids="arXiv:2303.08810"),
        "biformer_stl_nchw.in1k": default_cfg(url=RELEASES["biformer_stl_nchw"].url, paper_ids="arXiv:2303.08810"),
        "maxvit_stl.untrained": default_cfg(paper_ids="arXiv:2204.01697"),
    }
)


def _create(variant: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    return build_variant(CLASSES[variant], variant, pretrained, **{**VARIANTS[variant], **kwargs})


@register_model
def biformer_stl(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """BiFormer-STL: 28.4 M parameters, 4.6 G MACs, published top-1 82.7."""
    return _create("biformer_stl", pretrained, **kwargs)


@register_model
def biformer_stl_nchw(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """BiFormer-STL of 1x1 convolutions, with windows of H // 7 x W // 7 tokens: 28.4 M parameters, 4.6 G MACs."""
    return _create("biformer_stl_nchw", pretrained, **kwargs)


@register_model
def maxvit_stl(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MaxViT's attention in the same layout, for comparison: 28.3 M parameters, 4.5 G MACs; never published."""
    return _create("maxvit_stl", pretrained, **kwargs)
