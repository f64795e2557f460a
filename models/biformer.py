"""BiFormer: vision transformer with bi-level routing attention (arXiv 2303.08810)."""

from collections.abc import Sequence
from typing import Any

from timm.layers import DropPath
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from .attention import BiLevelRoutingAttention, FullAttention
from .attention_table import PerStage, build_attention, per_stage, window_strides
from .backbone import Backbone, build_variant, check_per_stage, default_cfg
from .layers import AddNorm, MapLinear, ResidualDepthwiseConv, init_linear, to_nchw, to_nhwc
from .weights.releases import RELEASES


class BiFormerBlock(nn.Module):
    """Depthwise position encoding, attention, feed-forward. (B, C, H, W) in and out.

    attn: attention module (B, H, W, C) -> (B, H, W, C).
    """

    def __init__(self, dim: int, attn: nn.Module, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.pos_embed = ResidualDepthwiseConv(dim, 3)
        self.norm1 = AddNorm(dim, eps=1e-6)
        self.attn = attn
        self.norm2 = AddNorm(dim, eps=1e-6)
        # The Identity keeps the second Linear at the published key mlp.3.
        self.mlp = nn.Sequential(MapLinear(dim, hidden), nn.Identity(), nn.GELU(), MapLinear(hidden, dim))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x, y = self.norm1(self.pos_embed(to_nhwc(x)))
        x, y = self.norm2(x, self.drop_path(self.attn(y)))
        x = x + self.drop_path(self.mlp(y))
        return to_nchw(x)


class BiFormer(Backbone):
    """The BiFormer family. Arguments with four values hold one per stage.

    topk: routed windows per window; None for a stage with plain attention over all tokens.
    attn_layer: another attention, see `DeBiFormer`.
    img_size is accepted for timm's sake: nothing in this family depends on it. Everything else goes to `Backbone`.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        embed_dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 8, 2),
        num_heads: Sequence[int] = (2, 4, 8, 8),
        mlp_ratios: Sequence[float] = (3, 3, 3, 3),
        n_win: int = 7,
        topk: Sequence[int | None] = (1, 4, 16, None),
        attn_layer: PerStage = None,
        **kwargs: Any,
    ) -> None:
        check_per_stage(embed_dims=embed_dims, depths=depths, num_heads=num_heads, mlp_ratios=mlp_ratios, topk=topk)
        layers = per_stage(attn_layer, [FullAttention if k is None else BiLevelRoutingAttention for k in topk])

        def make_block(i: int, _number: int, drop_path: float) -> BiFormerBlock:
            attn = build_attention(layers[i], embed_dims[i], num_heads[i], n_win=n_win, topk=topk[i])
            return BiFormerBlock(embed_dims[i], attn, mlp_ratios[i], drop_path)

        super().__init__(
            make_block,
            embed_dims=embed_dims,
            depths=depths,
            n_win=n_win,
            grid_strides=[window_strides(layer) for layer in layers],
            **kwargs,
        )
        self.apply(init_linear)


VARIANTS: dict[str, dict[str, Any]] = {
    "biformer_tiny": {},
    "biformer_small": {"depths": (4, 4, 18, 4)},
    "biformer_base": {"depths": (4, 4, 18, 4), "embed_dims": (96, 192, 384, 768), "num_heads": (3, 6, 12, 8)},
}

default_cfgs = generate_default_cfgs(
    {f"{variant}.in1k": default_cfg(url=RELEASES[variant].url, paper_ids="arXiv:2303.08810") for variant in VARIANTS}
)


def _create(variant: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    return build_variant(BiFormer, variant, pretrained, **{**VARIANTS[variant], **kwargs})


@register_model
def biformer_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """BiFormer-T: 13.1 M parameters, 2.2 G MACs, published top-1 81.4."""
    return _create("biformer_tiny", pretrained, **kwargs)


@register_model
def biformer_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """BiFormer-S: 25.5 M parameters, 4.5 G MACs, published top-1 83.8."""
    return _create("biformer_small", pretrained, **kwargs)


@register_model
def biformer_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """BiFormer-B: 56.8 M parameters, 9.8 G MACs, published top-1 84.3."""
    return _create("biformer_base", pretrained, **kwargs)
