"""Plain attention and bi-level routing attention (BRA). A new attention is shown in docs/EXTENDING.md.

Letters: B batch, H x W map, C channels, S windows per side, P = S*S windows, w tokens per window, k routed windows.
Every attention module here takes and returns (B, H, W, C).
"""

from collections.abc import Callable

from torch import Tensor, nn

from . import ops
from .attention_maps import RoutedMaps, one_image, plain_maps
from .attention_table import register_attention
from .layers import QKV, DepthwiseConv, MapLinear


def check_heads(dim: int, num_heads: int) -> None:
    """ValueError unless the heads divide the width evenly."""
    if num_heads < 1 or dim % num_heads:
        raise ValueError(f"{num_heads} heads do not divide the width {dim}")


class Router(nn.Module):
    """Chooses the windows that each window attends to. No parameters; a module for the sake of its repr.

    n_win: windows per side; topk: windows kept, 1 .. n_win**2; scale: factor on the logits.
    """

    def __init__(self, n_win: int, topk: int, scale: float) -> None:
        super().__init__()
        if n_win < 1:
            raise ValueError(f"n_win must be at least 1, not {n_win}")
        if not 1 <= topk <= n_win**2:
            raise ValueError(f"top-k must lie in 1..{n_win**2} ({n_win}x{n_win} windows), not {topk}")
        self.n_win, self.topk, self.scale = n_win, topk, scale

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Two maps (B, H, W, C) -> logits (B, P, k) in descending order and window numbers (B, P, k), int64."""
        return ops.route_maps(q, k, self.n_win, self.topk, self.scale)

    def extra_repr(self) -> str:
        return f"n_win={self.n_win}, topk={self.topk}"


def choose_windows(router: Router, q: Tensor, k: Tensor) -> Tensor:
    """Maps (B, H, W, C), sides multiples of `router.n_win` -> numbers of the routed windows (B, P, k), best first."""
    return router(q, k)[1]


def attend_routed_windows(router: Router, q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
    """Route windows, then let each query attend to the tokens of its window's routed windows.

    q: (B, Hq, Wq, C); k, v: (B, H, W, C); all sides multiples of `router.n_win`. Returns (B, Hq, Wq, C).
    Where all windows are routed that is plain attention, and nothing is chosen.
    """
    if router.topk == router.n_win**2:
        return ops.full_attention(q, k, v, num_heads, router.scale)
    return ops.routed_attention(q, k, v, choose_windows(router, q, k), router.n_win, num_heads, router.scale)


@register_attention("bi_level_routing")
class BiLevelRoutingAttention(nn.Module):
    """BRA (arXiv 2303.08810, section 3.2): window routing, token attention in routed windows, LePE.

    The scale is C**-0.5 with the full width C, not the head width, in both levels, as published.
    Sides that are no multiple of `n_win` are zero-padded; the padding takes part in routing and attention.
    """

    window_grids = ("tokens",)

    def __init__(self, dim: int, num_heads: int, n_win: int, topk: int) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        self.num_heads = num_heads
        self.qkv = QKV(MapLinear(dim, 3 * dim))
        self.router = Router(n_win, topk, scale=dim**-0.5)
        self.lepe = DepthwiseConv(dim, 5)
        self.wo = MapLinear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1], x.shape[2]
        q, k, v, v_lepe = self.qkv(ops.pad_to_multiple(x, self.router.n_win), uses=(1, 1, 2))
        out = attend_routed_windows(self.router, q, k, v, self.num_heads)
        return self.wo(self.lepe(v_lepe, residual=out)[:, :height, :width])

    def attention_maps(self, x: Tensor) -> RoutedMaps:
        """The exact maps of one image (1, H, W, C)."""
        q, k, v = self.qkv(ops.pad_to_multiple(x, self.router.n_win))
        return RoutedMaps(
            tokens=(x.shape[1], x.shape[2]),
            num_heads=self.num_heads,
            q=one_image(q),
            k=one_image(k),
            n_win=self.router.n_win,
            idx=one_image(choose_windows(self.router, q, k)),
            scale=self.router.scale,
            values=one_image(v),
            weight=self.wo.weight,
            rest=one_image(self.wo(self.lepe(v))),
        )


@register_attention("full")
class FullAttention(nn.Module):
    """Attention over all tokens plus LePE: BiFormer's last stage. The qkv has no bias.

    linear: class of the projections. lepe_on_values: LePE reads v as in BRA, not the attention's input.
    """

    def __init__(
        self, dim: int, num_heads: int, linear: Callable[..., nn.Module] = MapLinear, lepe_on_values: bool = False
    ) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        self.num_heads, self.lepe_on_values = num_heads, lepe_on_values
        self.qkv = linear(dim, 3 * dim, bias=False)
        self.lepe = DepthwiseConv(dim, 5)
        self.proj = linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        out = ops.full_attention(q, k, v, self.num_heads)
        return self.proj(self.lepe(v if self.lepe_on_values else x, residual=out))

    def attention_maps(self, x: Tensor) -> RoutedMaps:
        """The exact maps of one image (1, H, W, C)."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        rest = self.proj(self.lepe(v if self.lepe_on_values else x))
        parts = {"values": one_image(v), "weight": self.proj.weight.flatten(1), "rest": one_image(rest)}
        return plain_maps(q, k, self.num_heads, **parts)
