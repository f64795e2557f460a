"""Depthwise convolutions in single precision against float64: gradients in parts, activations at once."""

import pytest
import torch

from models import ops


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def convolution(channels, size):
    return normal(channels, 1, size, size, seed=2) / size, normal(channels, seed=3)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(("size", "stride"), [(5, 1), (5, 2), (9, 1), (9, 4)])
def test_gradients_of_wide_kernels_in_single_precision(size, stride, compiled):
    """On CPUs they are computed a few columns at a time; the map is a part of another, as values are of q, k and v."""

    def results(dtype, call):
        x, w, b = (t.to(dtype).requires_grad_() for t in (normal(2, 11, 10, 36), *convolution(12, size)))
        out = call(x[..., 12:24], w, b, stride=stride)
        return [out.detach(), *torch.autograd.grad(out, (x, w, b), normal(*out.shape, seed=1).to(dtype))]

    call = torch.compile(ops.depthwise, backend="aot_eager", fullgraph=True) if compiled else ops.depthwise
    for actual, expected in zip(results(torch.float32, call), results(torch.float64, ops.depthwise), strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_gelu_behind_a_convolution_in_single_precision():
    x, (weight, bias) = normal(2, 7, 5, 24), convolution(24, 3)
    expected = ops.depthwise(x, weight, bias, x, gelu=True)
    x, weight, bias = x.float(), weight.float(), bias.float()
    actual = ops.depthwise(x, weight, bias, x, gelu=True)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)
    assert ops.depthwise(x[:0], weight, bias, gelu=True).shape == (0, 7, 5, 24)
