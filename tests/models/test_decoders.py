"""The models as backbones of other libraries' decoders."""

from collections import OrderedDict

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from golden.fill import images
from torchvision.ops import FeaturePyramidNetwork

import models  # noqa: F401

NAMES = ["debiformer_nano", "biformer_tiny", "biformer_stl", "biformer_stl_nchw", "maxvit_stl"]


def create(name):
    """The four maps of a model in evaluation mode, its weights always the same."""
    torch.manual_seed(0)
    return timm.create_model(name, features_only=True).eval()


@pytest.mark.parametrize("decoder", [smp.Unet, smp.FPN, smp.UPerNet], ids=lambda decoder: decoder.__name__)
@pytest.mark.parametrize("name", NAMES)
def test_segmentation_decoders_take_every_family_by_its_timm_name(name, decoder):
    model = decoder(f"tu-{name}", encoder_weights=None, classes=3).eval()
    backbone = create(name)
    model.encoder.model.load_state_dict(backbone.state_dict())

    x = images(1, 64, 96).float()
    given = []
    model.decoder.register_forward_pre_hook(lambda _, args: given.extend(args[0]))
    logits = model(x)
    assert logits.shape == (1, 3, 64, 96)

    maps = [features for features in given if features.shape[1] > 0][1:]  # the image comes first
    assert [m.shape[-1] for m in maps] == [24, 12, 6, 3]
    for actual, expected in zip(maps, backbone(x), strict=True):
        torch.testing.assert_close(actual, expected)

    logits.square().mean().backward()
    untouched = [n for n, p in model.encoder.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert untouched == []


@pytest.mark.parametrize("name", NAMES)
def test_torchvision_feature_pyramid(name):
    backbone, x = create(name), images(2, 96, 64).float()
    pyramid = FeaturePyramidNetwork(backbone.feature_info.channels(), out_channels=16)
    maps = pyramid(OrderedDict(zip(backbone.feature_info.module_name(), backbone(x), strict=True)))
    assert list(maps) == [f"stages.{i}" for i in range(4)]
    assert [tuple(m.shape) for m in maps.values()] == [
        (2, 16, 96 // s, 64 // s) for s in backbone.feature_info.reduction()
    ]

    sum(m.square().mean() for m in maps.values()).backward()
    assert [n for n, p in backbone.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
