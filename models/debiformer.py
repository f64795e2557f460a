"""DeBiFormer: bi-level routing attention followed by deformable agents (arXiv 2410.08582)."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from timm.layers import DropPath, to_2tuple
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from .attention import BiLevelRoutingAttention
from .attention_table import AttentionLayer, PerStage, build_attention, per_stage, window_strides
from .backbone import Backbone, build_variant, check_per_stage, default_cfg, stage_sides
from .deformable_attention import DeformableAgentAttention
from .layers import AddNorm, ConvMlp, ResidualDepthwiseConv, to_nchw, to_nhwc
from .weights.releases import RELEASES


class DeBiFormerBlock(nn.Module):
    """Two rounds of depthwise position encoding, attention and feed-forward. (B, C, H, W) in and out.

    attn1, attn2: attention modules (B, H, W, C) -> (B, H, W, C).
    """

    def __init__(self, dim: int, attn1: nn.Module, attn2: nn.Module, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.pos_embed1 = ResidualDepthwiseConv(dim, 3)
        self.norm1 = AddNorm(dim, eps=1e-6)
        self.attn1 = attn1
        self.norm2 = AddNorm(dim, eps=1e-6)
        self.mlp1 = ConvMlp(dim, mlp_ratio)
        self.pos_embed2 = ResidualDepthwiseConv(dim, 3)
        self.norm3 = AddNorm(dim, eps=1e-6)
        self.attn2 = attn2
        self.norm4 = AddNorm(dim, eps=1e-6)
        self.mlp2 = ConvMlp(dim, mlp_ratio)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x, y = self.norm1(self.pos_embed1(to_nhwc(x)))
        x, y = self.norm2(x, self.drop_path(self.attn1(y)))
        x = x + self.drop_path(self.mlp1(y))
        x, y = self.norm3(self.pos_embed2(x))
        x, y = self.norm4(x, self.drop_path(self.attn2(y)))
        x = x + self.drop_path(self.mlp2(y))
        return to_nchw(x)


class DeBiFormer(Backbone):
    """The DeBiFormer family. Arguments with four values hold one per stage.

    img_size: pixels, a side or (height, width); fixes only the size of the relative position tables.
    n_win: windows per side. bra_topk: routed windows per window, None for a stage without BRA.
    agent_topk, agent_strides, offset_kernels, offset_groups, agent_mlp_ratios: see `DeformableAgentAttention`.
    attn_layer: another attention in place of both of a block: a name of `attention_table.ATTENTIONS`, or a class that
    takes (dim, num_heads) and, if its signature names them, n_win, topk, agent_stride, offset_groups, offset_kernel,
    agent_mlp_ratio, rpe_size; or four of them, None for the published one. attn1_layer, attn2_layer: likewise, for a
    block's first or second only.
    Everything else goes to `Backbone`.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        embed_dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (1, 1, 4, 1),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        mlp_ratios: Sequence[float] = (3, 3, 3, 3),
        n_win: int = 7,
        bra_topk: Sequence[int | None] = (1, 4, 16, None),
        agent_topk: Sequence[int] = (4, 8, 16, 49),
        agent_strides: Sequence[int] = (8, 4, 2, 1),
        offset_kernels: Sequence[int] = (9, 7, 5, 3),
        offset_groups: Sequence[int] = (1, 2, 4, 8),
        agent_mlp_ratios: Sequence[float] = (3, 3, 3, 3),
        attn_layer: PerStage = None,
        attn1_layer: PerStage = None,
        attn2_layer: PerStage = None,
        **kwargs: Any,
    ) -> None:
        check_per_stage(embed_dims=embed_dims, depths=depths, num_heads=num_heads, mlp_ratios=mlp_ratios)
        check_per_stage(bra_topk=bra_topk, agent_topk=agent_topk, agent_strides=agent_strides)
        check_per_stage(offset_kernels=offset_kernels, offset_groups=offset_groups, agent_mlp_ratios=agent_mlp_ratios)
        token_maps = list(zip(*(stage_sides(side) for side in to_2tuple(img_size)), strict=True))

        first = [DeformableAgentAttention if k is None else BiLevelRoutingAttention for k in bra_topk]
        first = per_stage(attn1_layer, per_stage(attn_layer, first), "attn1_layer")
        second = per_stage(attn2_layer, per_stage(attn_layer, [DeformableAgentAttention] * len(depths)), "attn2_layer")

        def attention_of(layer: AttentionLayer, i: int, topk: int) -> nn.Module:
            return build_attention(
                layer,
                embed_dims[i],
                num_heads[i],
                n_win=n_win,
                topk=topk,
                offset_groups=offset_groups[i],
                agent_stride=agent_strides[i],
                offset_kernel=offset_kernels[i],
                agent_mlp_ratio=agent_mlp_ratios[i],
                rpe_size=token_maps[i],
            )

        def make_block(i: int, _number: int, drop_path: float) -> DeBiFormerBlock:
            attn1 = attention_of(first[i], i, agent_topk[i] if bra_topk[i] is None else bra_topk[i])
            attn2 = attention_of(second[i], i, agent_topk[i])
            return DeBiFormerBlock(embed_dims[i], attn1, attn2, mlp_ratios[i], drop_path)

        super().__init__(
            make_block,
            embed_dims=embed_dims,
            depths=depths,
            n_win=n_win,
            grid_strides=[
                tuple(dict.fromkeys(window_strides(one, stride) + window_strides(other, stride)))
                for one, other, stride in zip(first, second, agent_strides, strict=True)
            ],
            **kwargs,
        )


VARIANTS: dict[str, dict[str, Any]] = {
    "debiformer_tiny": {},
    "debiformer_small": {
        "depths": (2, 2, 9, 3),
        "mlp_ratios": (3, 3, 3, 2),
        "agent_mlp_ratios": (3, 3, 3, 1),
        "drop_path_rate": 0.3,
    },
    "debiformer_base": {
        "embed_dims": (96, 192, 384, 768),
        "depths": (2, 2, 9, 2),
        "num_heads": (3, 6, 12, 24),
        "offset_groups": (1, 2, 3, 6),
        "drop_path_rate": 0.4,
    },
    # Ours, not published: small enough to train on a CPU in minutes, with every mechanism of the family.
    "debiformer_nano": {
        "img_size": 64,
        "embed_dims": (32, 64, 96, 128),
        "depths": (1, 1, 2, 1),
        "num_heads": (1, 2, 3, 4),
        "mlp_ratios": (2, 2, 2, 2),
        "n_win": 2,
        "bra_topk": (1, 2, 4, None),
        "agent_topk": (2, 3, 4, 4),
        "offset_groups": (1, 1, 3, 4),
        "agent_mlp_ratios": (2, 2, 2, 2),
    },
}

_cfg = partial(default_cfg, paper_ids="arXiv:2410.08582")
default_cfgs = generate_default_cfgs(
    {
        "debiformer_tiny.in1k": _cfg(url=RELEASES["debiformer_tiny"].url),
        "debiformer_small.in1k": _cfg(url=RELEASES["debiformer_small"].url),
        "debiformer_base.in1k": _cfg(url=RELEASES["debiformer_base"].url),
        "debiformer_nano.untrained": _cfg(input_size=(3, 64, 64), pool_size=(2, 2)),
    }
)


def _create(variant: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    return build_variant(DeBiFormer, variant, pretrained, **{**VARIANTS[variant], **kwargs})


@register_model
def debiformer_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DeBiFormer-T: 21.5 M parameters, 2.6 G MACs, published top-1 81.9."""
    return _create("debiformer_tiny", pretrained, **kwargs)


@register_model
def debiformer_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DeBiFormer-S: 44.0 M parameters, 5.4 G MACs, published top-1 83.9."""
    return _create("debiformer_small", pretrained, **kwargs)


@register_model
def debiformer_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DeBiFormer-B: 95.5 M parameters, 11.7 G MACs, published top-1 84.4."""
    return _create("debiformer_base", pretrained, **kwargs)


@register_model
def debiformer_nano(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """A small DeBiFormer for 64-pixel images that trains on a CPU in minutes."""
    return _create("debiformer_nano", pretrained, **kwargs)


@register_model
def debi_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """The published code's name of debiformer_tiny."""
    return debiformer_tiny(pretrained, **kwargs)


@register_model
def debi_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """The published code's name of debiformer_small."""
    return debiformer_small(pretrained, **kwargs)


@register_model
def debi_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """The published code's name of debiformer_base."""
    return debiformer_base(pretrained, **kwargs)
