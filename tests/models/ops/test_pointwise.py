"""Linear layers of maps: under autocast their parameters get gradients in float32, from copies made at once."""

import contextlib

import pytest
import timm
import torch
import torch.nn.functional as F
from attention_cases import DEVICES

from benchmarks.trace import trace
from models import ops
from models.layers import MapLinear, PointwiseConv
from models.ops.backend import use_backend
from models.ops.maps import _copies

TYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
on_devices = pytest.mark.parametrize("device", DEVICES)


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


INPUTS = normal(2, 5, 7, 24), normal(40, 24, seed=1) / 5, normal(40, seed=2)
OUTSIDE = normal(2, 5, 7, 40, seed=3)


def layer(function, dtype, device, weights=INPUTS[1:], block=contextlib.nullcontext):
    """Output and gradients under autocast; the map is in half precision, parameters are in float32."""
    x = INPUTS[0].to(device, dtype).requires_grad_()
    weights = [w.to(device, torch.float32).requires_grad_() for w in weights]
    with torch.autocast(device, dtype), block(weights):
        out = function(x, *weights) if len(weights) == 2 else function(x, *weights, None)
    return [out.detach(), *torch.autograd.grad(out, [x, *weights], OUTSIDE.to(out))]


@on_devices
@TYPES
@pytest.mark.parametrize("weights", [INPUTS[1:], INPUTS[1:2]], ids=["bias", "without-bias"])
def test_under_autocast_a_layer_errs_at_most_as_much_as_pytorchs(dtype, device, weights):
    with use_backend("triton"):
        actual = layer(ops.pointwise, dtype, device, weights)
    pytorch = layer(F.linear, dtype, device, weights)
    low = [x.to(dtype).double().requires_grad_() for x in (INPUTS[0], *weights)]
    out = F.linear(*low)
    truth = [out.detach(), *torch.autograd.grad(out, low, OUTSIDE.to(dtype).double())]
    for a, p, e in zip(actual, pytorch, truth, strict=True):
        assert (a.shape, a.dtype) == (p.shape, p.dtype)
        allowed = 1.1 * float((p.cpu().double() - e).norm()) + 1e-6 * float(e.norm())
        assert float((a.cpu().double() - e).norm()) <= allowed


@on_devices
@TYPES
def test_copies_made_at_once_change_no_bit(dtype, device):
    with use_backend("triton"):
        alone = layer(ops.pointwise, dtype, device)
        copied = layer(ops.pointwise, dtype, device, block=ops.copied_for_autocast)
    assert all(torch.equal(a, b) for a, b in zip(alone, copied, strict=True))


@pytest.mark.parametrize("weights", [INPUTS[1:], INPUTS[1:2]], ids=["bias", "without-bias"])
def test_in_float32_a_layer_is_pytorchs(weights):
    inputs = [x.float().requires_grad_() for x in (INPUTS[0], *weights)]
    results = []
    for out in (ops.pointwise(*inputs, *[None] * (3 - len(inputs))), F.linear(*inputs)):
        results.append([out, *torch.autograd.grad(out, inputs, OUTSIDE.to(out))])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


def test_frozen_weights_get_no_gradients():
    x, weight = INPUTS[0].float().requires_grad_(), INPUTS[1].float()
    ops.pointwise(x, weight, None).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand_as(x))


def test_kernel_of_a_convolution_is_a_weight():
    x, weight, bias = (x.float() for x in INPUTS)
    with use_backend("triton"), torch.autocast("cpu", torch.bfloat16):
        expected = ops.pointwise(x, weight, bias)
        kernel = weight[..., None, None].requires_grad_()
        actual = ops.pointwise(x, kernel, bias)
        assert torch.equal(actual, expected)
        assert torch.autograd.grad(actual.sum(), kernel)[0].shape == kernel.shape


def test_models_linear_layers_get_their_weights_once_a_stage_and_give_gradients_in_float32():
    model = timm.create_model("debiformer_nano")
    layers = [layer for layer in model.modules() if isinstance(layer, MapLinear | PointwiseConv)]
    layers = [layer for layer in layers if len(layer.weight) > 1]  # projections to one number: agents' positions
    calls = trace("debiformer_nano", "training", 2, 64)
    assert sum(call.name == "aten::_foreach_copy_" for call in calls) == 4
    cast = {call.inputs[0][0] for call in calls if call.name == "aten::_to_copy"}
    assert not cast & {shape for layer in layers for shape in (layer.weight.shape, layer.weight.flatten(1).shape)}
    products = [call for call in calls if call.name == "aten::mm.dtype"]
    assert len(products) == len(layers)
    assert {call.outputs[0][2] for call in products} == {torch.float32}


def test_error_leaves_no_copies():
    weight = torch.randn(8, 8)
    block = ops.copied_for_autocast([weight])
    with use_backend("triton"), torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError), block:
        ops.pointwise(torch.randn(1, 2, 2, 5), weight, None)
    assert not _copies
