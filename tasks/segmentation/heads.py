"""Semantic FPN and UPerNet: what turns four feature maps into class logits.

Submodules carry the names that released checkpoints have. Letters: B batch, C_i channels of map i, H_i x W_i its size
(strides 4, 8, 16, 32), K classes.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Resize a map (B, C, H, W) to `size` (height, width), bilinearly, by pixel areas rather than corners."""
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


class ConvNormAct(nn.Module):
    """Convolution without bias that keeps the size, BatchNorm, ReLU, at the keys `conv` and `bn`."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class PlainConv(nn.Module):
    """A convolution that keeps the size, one level down, at the key `conv`."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class FPN(nn.Module):
    """Feature pyramid network (arXiv 1612.03144): maps (B, C_i, H_i, W_i) -> as many (B, channels, H_i, W_i)."""

    def __init__(self, in_channels: Sequence[int], channels: int = 256) -> None:
        super().__init__()
        self.lateral_convs = nn.ModuleList(PlainConv(width, channels, 1) for width in in_channels)
        self.fpn_convs = nn.ModuleList(PlainConv(channels, channels, 3) for _ in in_channels)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        merged = [conv(x) for conv, x in zip(self.lateral_convs, maps, strict=True)]
        for level in range(len(merged) - 1, 0, -1):
            size = merged[level - 1].shape[2:]
            merged[level - 1] = merged[level - 1] + F.interpolate(merged[level], size=size, mode="nearest")
        return [conv(x) for conv, x in zip(self.fpn_convs, merged, strict=True)]


class Head(nn.Module):
    """What all heads share: dropout of whole channels, then a 1x1 convolution to K classes, at the key `conv_seg`."""

    def __init__(self, channels: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)

    def classify(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) -> logits (B, K, H, W)."""
        return self.conv_seg(self.dropout(x))


class SemanticFPNHead(Head):
    """Sum of a pyramid's levels, each brought to stride 4 by convolutions and doublings (arXiv 1901.02446, figure 3).

    Four maps (B, in_channels, H_i, W_i) -> logits (B, K, H_0, W_0).
    """

    def __init__(self, in_channels: int, channels: int, num_classes: int, dropout: float = 0.1) -> None:
        super().__init__(channels, num_classes, dropout)
        self.scale_heads = nn.ModuleList(self._scale_head(in_channels, channels, doublings) for doublings in range(4))

    @staticmethod
    def _scale_head(in_channels: int, channels: int, doublings: int) -> nn.Sequential:
        layers: list[nn.Module] = [ConvNormAct(in_channels, channels, 3)]
        for number in range(doublings):
            layers += [ConvNormAct(channels, channels, 3)] if number else []
            layers.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
        return nn.Sequential(*layers)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        total, *others = (head(x) for head, x in zip(self.scale_heads, maps, strict=True))
        for x in others:
            total = total + resize(x, total.shape[2:])
        return self.classify(total)


class UPerHead(Head):
    """UPerNet (arXiv 1807.10221, section 3): pyramid pooling of the last map, then a top-down pyramid, all fused.

    Four maps (B, C_i, H_i, W_i) -> logits (B, K, H_0, W_0).
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        channels: int,
        num_classes: int,
        pools: Sequence[int] = (1, 2, 3, 6),
        dropout: float = 0.1,
    ) -> None:
        super().__init__(channels, num_classes, dropout)
        *lower, last = in_channels
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(side), ConvNormAct(last, channels, 1)) for side in pools
        )
        self.bottleneck = ConvNormAct(last + len(pools) * channels, channels, 3)
        self.lateral_convs = nn.ModuleList(ConvNormAct(width, channels, 1) for width in lower)
        self.fpn_convs = nn.ModuleList(ConvNormAct(channels, channels, 3) for _ in lower)
        self.fpn_bottleneck = ConvNormAct(len(in_channels) * channels, channels, 3)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        *lower, last = maps
        pooled = [resize(pool(last), last.shape[2:]) for pool in self.psp_modules]
        merged = [conv(x) for conv, x in zip(self.lateral_convs, lower, strict=True)]
        merged.append(self.bottleneck(torch.cat([last, *pooled], dim=1)))
        for level in range(len(merged) - 1, 0, -1):
            merged[level - 1] = merged[level - 1] + resize(merged[level], merged[level - 1].shape[2:])
        levels = [conv(x) for conv, x in zip(self.fpn_convs, merged, strict=False)] + merged[-1:]
        size = levels[0].shape[2:]
        fused = self.fpn_bottleneck(torch.cat([resize(x, size) for x in levels], dim=1))
        return self.classify(fused)


class FCNHead(Head):
    """The auxiliary head: one 3x3 convolution, then the classes. (B, in_channels, H, W) -> logits (B, K, H, W)."""

    def __init__(self, in_channels: int, channels: int, num_classes: int, dropout: float = 0.1) -> None:
        super().__init__(channels, num_classes, dropout)
        self.convs = nn.Sequential(ConvNormAct(in_channels, channels, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.convs(x))
