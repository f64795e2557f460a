"""Fusing for inference merges layers and changes nothing but rounding."""

import copy

import pytest
import timm
import torch
from golden.compare import CLASSIFIERS, relative_error
from golden.fill import fill, images
from timm.utils import reparameterize_model

import models
from models.layers import DepthwiseConv, Downsampling, ResidualDepthwiseConv
from models.pyramid import FeaturePyramid

NAMES = ["debiformer_nano", *CLASSIFIERS]


def create(name, **kwargs):
    """A model in float64 with non-trivial weights and normalisation statistics."""
    return fill(timm.create_model(name, **kwargs))


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_fused_outputs_are_the_same(name):
    model, x = create(name), images(2, *timm.get_pretrained_cfg(name).input_size[1:])
    assert relative_error(models.fuse(model)(x), model(x)) < 1e-12
    model, x = model.float(), x.float()
    assert relative_error(models.fuse(model)(x), model(x)) < 1e-5


@pytest.mark.parametrize("name", models.MODEL_NAMES)
def test_nothing_is_left_to_fuse(name):
    fused = models.fuse(timm.create_model(name).eval())
    kinds = (Downsampling, ResidualDepthwiseConv)
    assert [n for n, module in fused.named_modules() if isinstance(module, kinds)] == []
    norms = [n for n, module in fused.named_modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert norms == ([] if name == "maxvit_stl" else ["norm"])  # between the last block and pooling


@torch.no_grad()
def test_model_itself_is_left_alone():
    model, x = create("debiformer_nano"), images(1, 64, 64)
    state, out = copy.deepcopy(model.state_dict()), model(x)
    fused = models.fuse(model)
    fused.stages[0][0].pos_embed1.weight.zero_()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(model(x), out)


@torch.no_grad()
def test_backbones_and_pyramids_fuse_too():
    x = images(1, 64, 96)
    for model in (
        create("biformer_stl", features_only=True),
        fill(FeaturePyramid(timm.create_model("debiformer_nano"))),
    ):
        for fused, plain in zip(models.fuse(model)(x), model(x), strict=True):
            assert relative_error(fused, plain) < 1e-12


@torch.no_grad()
def test_timm_fuses_the_same_way():
    model, x = create("debiformer_nano"), images(1, 64, 64)
    assert torch.equal(reparameterize_model(model)(x), models.fuse(model)(x))


@torch.no_grad()
@pytest.mark.parametrize("size", [3, 5])
def test_identity_is_in_the_kernel(size):
    layer = fill(ResidualDepthwiseConv(4, size))
    fused = layer.fuse()
    assert type(fused) is DepthwiseConv
    x = torch.randn(2, 6, 7, 4, dtype=torch.float64)
    torch.testing.assert_close(fused(x), layer(x))
    assert fused.weight.dtype == torch.float64


def test_models_in_training_are_refused():
    with pytest.raises(ValueError, match="call eval"):
        models.fuse(timm.create_model("debiformer_nano").train())
    with pytest.raises(ValueError, match="call eval"):
        Downsampling(torch.nn.Conv2d(3, 4, 2), torch.nn.BatchNorm2d(4)).fuse()
