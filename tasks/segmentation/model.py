"""A backbone with a decoder: images in, class logits at the images' size out."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .heads import FPN, FCNHead, SemanticFPNHead, UPerHead, resize

AUXILIARY_WEIGHT = 0.4
EPSILON = torch.finfo(torch.float32).eps
"""Added to the loss's denominator by the published code."""


class Segmenter(nn.Module):
    """A backbone of four maps, an optional neck, a decoder and an auxiliary head on the third map.

    Input (B, 3, H, W); output logits (B, K, H, W), or in training those of the decoder and of the auxiliary head.
    """

    def __init__(
        self, backbone: nn.Module, head: nn.Module, auxiliary: nn.Module, neck: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.backbone, self.decode_head, self.auxiliary_head = backbone, head, auxiliary
        self.neck = nn.Identity() if neck is None else neck

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        size = images.shape[2:]
        maps = self.neck(self.backbone(images))
        logits = resize(self.decode_head(maps), size)
        return (logits, resize(self.auxiliary_head(maps[2]), size)) if self.training else logits


def semantic_fpn(backbone: nn.Module, widths: list[int], num_classes: int, channels: int = 256) -> Segmenter:
    """Semantic FPN: a pyramid of `channels`, a head of half as many; the auxiliary head reads the pyramid."""
    neck = FPN(widths, channels)
    head = SemanticFPNHead(channels, channels // 2, num_classes)
    return Segmenter(backbone, head, FCNHead(channels, channels, num_classes), neck)


def upernet(backbone: nn.Module, widths: list[int], num_classes: int, channels: int = 512) -> Segmenter:
    """UPerNet with `channels` everywhere, and an auxiliary head of half as many."""
    head = UPerHead(widths, channels, num_classes)
    return Segmenter(backbone, head, FCNHead(widths[2], channels // 2, num_classes))


def pixel_cross_entropy(logits: Tensor, labels: Tensor, ignored: int = 255) -> Tensor:
    """Mean cross-entropy over all pixels, ignored ones included in the denominator, as published.

    Args:
        logits: (B, K, H, W). labels: (B, H, W) int64, 0..K-1 or `ignored`.
    """
    total = F.cross_entropy(logits, labels, ignore_index=ignored, reduction="sum")
    return total / (labels.numel() + EPSILON)
