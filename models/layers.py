"""Small modules shared by all families. Letters: B batch, H x W map, C channels."""

import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn


def to_nhwc(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H, W, C), a view."""
    return x.permute(0, 2, 3, 1)


def to_nchw(x: Tensor) -> Tensor:
    """(B, H, W, C) -> (B, C, H, W), a view with channels-last strides, so convolutions need no copy."""
    return x.permute(0, 3, 1, 2)


class PointwiseConv(nn.Conv2d):
    """A 1x1 convolution that works as Linear on the last axis: (..., C_in) -> (..., C_out).

    Its weight keeps the convolution's shape (C_out, C_in, 1, 1), as published checkpoints have it.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, kernel_size=1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.flatten(1), self.bias)


class DepthwiseConv(nn.Conv2d):
    """Depthwise convolution of a map (B, C, H, W) with padding kernel // 2: a side s becomes ceil(s / stride)."""

    def __init__(self, dim: int, kernel_size: int, stride: int = 1, bias: bool = True) -> None:
        super().__init__(dim, dim, kernel_size, stride, padding=kernel_size // 2, groups=dim, bias=bias)


class QKV(nn.Module):
    """The projection to queries, keys and values: (..., C) -> three of (..., C).

    projection: a layer C -> 3C on the last axis. It lives one level down, at the key `qkv`, as published.
    """

    def __init__(self, projection: nn.Module) -> None:
        super().__init__()
        self.qkv = projection

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.qkv(x).chunk(3, dim=-1)


class ConvMlp(nn.Module):
    """DeBiFormer's feed-forward: expand, add a 3x3 depthwise convolution, GELU, project. (B, H, W, C) in and out."""

    def __init__(self, dim: int, ratio: float) -> None:
        super().__init__()
        hidden = int(dim * ratio)
        self.linear1 = nn.Sequential(PointwiseConv(dim, hidden))
        self.dwc = DepthwiseConv(hidden, 3)
        self.act = nn.GELU()
        self.linear2 = nn.Sequential(PointwiseConv(hidden, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear1(x)
        x = x + to_nhwc(self.dwc(to_nchw(x)))
        return self.linear2(self.act(x))


def init_linear(module: nn.Module) -> None:
    """Draw a linear layer's (or 1x1 convolution's) weight from a truncated normal, std 0.02; its bias becomes zero."""
    if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1)):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
