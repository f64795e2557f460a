"""Detectors of torchvision."""

import debiformer  # noqa: F401
import pytest
import timm
import torch
from conftest import train
from torch import nn
from torchmetrics.detection import MeanAveragePrecision
from torchvision.models.detection import MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.ops import FeaturePyramidNetwork

NAMES = ("0", "1", "2", "3")


def stages_of(model):
    """A model as a sequence of its stages, as BackboneWithFPN wants it."""
    return nn.Sequential(*map(nn.Sequential, model.downsample_layers, model.stages))


class Extracted(nn.Module):
    """A feature pyramid on what torch.fx finds."""

    out_channels = 32

    def __init__(self, model, widths):
        super().__init__()
        self.body = create_feature_extractor(model, {f"stages.{name}": name for name in NAMES})
        self.fpn = FeaturePyramidNetwork(widths, 32)

    def forward(self, x):
        return self.fpn(self.body(x))


def with_fpn(model, widths):
    return BackboneWithFPN(stages_of(model), dict(zip(NAMES, NAMES, strict=True)), widths, 32)


@torch.no_grad()
@pytest.mark.parametrize("name", ["debiformer_nano", "biformer_tiny", "biformer_stl", "maxvit_stl"])
def test_both_ways_to_the_maps_give_what_features_only_gives(name):
    model = timm.create_model(name).eval()
    features = timm.create_model(name, features_only=True).eval()
    features.model.load_state_dict(model.state_dict(), strict=False)
    x = torch.randn(1, 3, 96, 64)
    for backbone in (with_fpn(model, features.feature_info.channels()), Extracted(model, [8] * 4)):
        maps = backbone.body(x)
        assert isinstance(maps, dict)
        for found, expected in zip(maps.values(), features(x), strict=True):
            torch.testing.assert_close(found, expected)


def anchors(levels):
    return AnchorGenerator(tuple((4 * 4 * 2**level,) for level in range(levels)), ((0.5, 1.0, 2.0),) * levels)


FEW = {"rpn_post_nms_top_n_train": 50, "rpn_post_nms_top_n_test": 10, "box_batch_size_per_image": 16}


@pytest.mark.parametrize(
    ("detector", "backbone", "extra"),
    [
        (MaskRCNN, with_fpn, FEW),  # which has five maps
        (RetinaNet, with_fpn, {"anchor_generator": anchors(5)}),
        (RetinaNet, Extracted, {"anchor_generator": anchors(4)}),
    ],
)
def test_detector_trains_and_is_evaluated(scenes, detector, backbone, extra):
    model = timm.create_model("debiformer_nano", num_classes=0)
    body = backbone(model, [info["num_chs"] for info in model.feature_info])
    pixels = {"min_size": 64, "max_size": 96, "image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    model = detector(body, num_classes=3, **pixels, **extra)
    labels = torch.tensor([1, 2])
    targets = [
        {"boxes": box, "labels": labels, "masks": (region == labels[:, None, None]).byte()}
        for box, region in zip(scenes.boxes, scenes.regions, strict=True)
    ]
    images = list(scenes.images)
    train(model, lambda: sum(model(images, targets).values()))
    with torch.no_grad():
        found = model(images)
    metric = MeanAveragePrecision(backend="faster_coco_eval")
    metric.update(found, targets)
    assert 0 <= metric.compute()["map"] <= 1
