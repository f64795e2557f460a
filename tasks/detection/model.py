"""Detectors: a backbone of four maps, a feature pyramid, and Mask R-CNN's or RetinaNet's heads."""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from .mask_rcnn import RPN, Heads, Target
from .retinanet import P6P7, OneStage


class PyramidBackbone(nn.Module):
    """A backbone of maps, then a feature pyramid of `channels`. body: images -> maps; the last of them are used."""

    def __init__(self, body: nn.Module, widths: list[int], extra: nn.Module, channels: int) -> None:
        super().__init__()
        self.body, self.used, self.out_channels = body, len(widths), channels
        self.fpn = FeaturePyramidNetwork(widths, self.out_channels, extra)

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        maps = self.body(images)[-self.used :]
        levels = self.fpn(OrderedDict((str(number), x) for number, x in enumerate(maps)))
        # Anchors and boxes take the maps' precision, and half of it is too coarse for pixels.
        return OrderedDict((name, x if x.dtype == torch.float64 else x.float()) for name, x in levels.items())


class Batching(nn.Module):
    """Puts normalised images of several sizes in one tensor, padded right and below to a multiple of 32.

    Results stay in the frame of these images.
    """

    def forward(
        self, images: list[Tensor], targets: list[Target] | None = None
    ) -> tuple[ImageList, list[Target] | None]:
        sizes = [tuple(image.shape[1:]) for image in images]
        height, width = (-(-max(sides) // 32) * 32 for sides in zip(*sizes, strict=True))
        padded = [F.pad(image, (0, width - image.shape[2], 0, height - image.shape[1])) for image in images]
        if targets is not None:
            targets = [{**target, "size": torch.tensor(size)} for target, size in zip(targets, sizes, strict=True)]
        return ImageList(torch.stack(padded), sizes), targets

    def postprocess(
        self, result: list[dict[str, Tensor]], image_shapes: list[tuple[int, int]], original: list[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        """Return the results as they are."""
        return result


def on_three_maps(body: nn.Module) -> nn.Module:
    """Return a body of four maps for a detector that takes the last three of them."""
    if hasattr(body, "extra_norms"):
        body.extra_norms[0].requires_grad_(False)  # of the map that is not used: no gradient would ever come
    return body


def mask_rcnn(
    body: nn.Module, widths: list[int], num_classes: int, channels: int = 256, sampled: int = 512
) -> GeneralizedRCNN:
    """Mask R-CNN on four maps of these widths; class numbers from 1. sampled: proposals to learn from, per image."""
    backbone = PyramidBackbone(body, widths, LastLevelMaxPool(), channels)
    return GeneralizedRCNN(backbone, RPN(channels), Heads(num_classes, channels, sampled), Batching())


def retinanet(body: nn.Module, widths: list[int], num_classes: int, channels: int = 256) -> OneStage:
    """RetinaNet on the last three of four maps of these widths; class numbers from 0."""
    backbone = PyramidBackbone(on_three_maps(body), widths[1:], P6P7(widths[-1], channels), channels)
    return OneStage(backbone, num_classes, Batching(), channels)
