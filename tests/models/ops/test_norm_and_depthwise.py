"""Sums with norms, depthwise convolutions with more, parts, agents: every backend against float64."""

import pytest
import torch
import torch.nn.functional as F
from attention_cases import DEVICES, DTYPES
from torch.autograd import gradcheck
from torch.library import opcheck

from models import ops
from models.ops import deformable, maps
from models.ops.backend import use_backend


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def positions(*shape):
    """In [-1, 1], the ends included."""
    return (1.4 * normal(*shape, 2, seed=8)).clamp(-1, 1)


def convolution(channels, size):
    return normal(channels, 1, size, size, seed=2) / size, normal(channels, seed=3)


FUNCTIONS = {
    "norm": (
        lambda x, w, b: ops.add_norm(x, None, w, b, 1e-6)[1],
        [normal(2, 5, 3, 24), normal(24), normal(24, seed=1)],
    ),
    "add_norm": (
        lambda x, y, w, b: ops.add_norm(x, y, w, b, 1e-6),
        [normal(3, 1, 7, 64), normal(3, 1, 7, 64, seed=1), normal(64), normal(64, seed=2)],
    ),
    "depthwise": (lambda x, w, b: ops.depthwise(x, w, b), [normal(1, 3, 18, 16), *convolution(16, 5)]),
    "without-bias": (lambda x, w: ops.depthwise(x, w, None, x), [normal(2, 5, 6, 20), convolution(20, 3)[0]]),
    "plus-itself": (lambda x, w, b: ops.depthwise(x, w, b, x), [normal(2, 5, 6, 20), *convolution(20, 3)]),
    "gelu": (lambda x, w, b: ops.depthwise(x, w, b, x, gelu=True), [normal(2, 9, 5, 20), *convolution(20, 3)]),
    "plus-another": (
        lambda x, w, b, y: ops.depthwise(x, w, b, y),
        [normal(1, 15, 5, 16), *convolution(16, 5), normal(1, 15, 5, 16, seed=1)],
    ),
    "strided": (
        lambda x, w, b, y: ops.depthwise(x, w, b, y, stride=2),
        [normal(2, 9, 7, 20), *convolution(20, 5), normal(2, 6, 5, 20, seed=1)],
    ),
    "strided-alone": (lambda x, w, b: ops.depthwise(x, w, b, stride=4), [normal(1, 6, 9, 16), *convolution(16, 3)]),
    "strided-groups": (
        lambda x, w: ops.depthwise(x, w, None, stride=8),
        [normal(3, 17, 20, 48), convolution(16, 9)[0]],
    ),
    "groups": (lambda x, w, b: ops.depthwise(x, w, b), [normal(2, 4, 5, 40), *convolution(20, 3)]),
    "residual-beyond": (
        lambda x, w, b, y: ops.depthwise(x, w, b, y),
        [normal(1, 4, 5, 20), *convolution(20, 5), normal(1, 5, 8, 20, seed=1)],
    ),
    "positions": (
        lambda x, w, b, p: ops.positions_of_features(x, w, b, 1e-5, p),
        [normal(2, 3, 5, 2, 24), normal(24), normal(24, seed=1), normal(24, seed=2) / 8],
    ),
    "positions-outside": (
        lambda x, w, b, p: ops.positions_of_features(x, w, b, 1e-5, p),
        [normal(1, 7, 1, 3, 64), normal(64), normal(64, seed=1), normal(64, seed=2)],
    ),
    "split": (lambda x: ops.split(x, (2, 1, 2)), [normal(2, 5, 3, 3 * 20)]),
    "split-values": (lambda x: ops.split(x, (1, 1, 2)), [normal(1, 7, 9, 3 * 64)]),
    "sample": (ops.sample_agents, [normal(2, 9, 7, 32), positions(2, 3, 2, 2)]),
    "sample-many": (ops.sample_agents, [normal(1, 1, 8, 70), positions(1, 1, 70, 1)]),
}
on_devices = pytest.mark.parametrize("device", DEVICES)
all_functions = pytest.mark.parametrize(("function", "inputs"), FUNCTIONS.values(), ids=FUNCTIONS)


def outputs_and_gradients(function, inputs, backend, dtype, device, computed_in=None):
    """Positions are in float32 at least, as in the models."""
    types = [torch.promote_types(dtype, torch.float32) if x.shape[-1] == 2 else dtype for x in inputs]
    computed_in = computed_in or dtype
    inputs = [
        x.to(type).to(torch.promote_types(type, computed_in)).to(device).requires_grad_()
        for x, type in zip(inputs, types, strict=True)
    ]
    with use_backend(backend):
        out = function(*inputs)
        out = out if isinstance(out, tuple) else (out,)
        grads = [normal(*x.shape, seed=9).to(dtype).to(x) for x in out]
        return [*(x.detach() for x in out), *torch.autograd.grad(out, inputs, grads)]


@on_devices
@all_functions
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_err_at_most_twice_as_much_as_pytorch(function, inputs, dtype, device):
    truth = outputs_and_gradients(function, inputs, "torch", dtype, "cpu", computed_in=torch.float64)
    pytorch = outputs_and_gradients(function, inputs, "torch", dtype, device)
    actual = outputs_and_gradients(function, inputs, "triton", dtype, device)
    for number, (a, p, e) in enumerate(zip(actual, pytorch, truth, strict=True)):
        assert (a.shape, a.dtype) == (p.shape, p.dtype)
        allowed = 2 * float((p.cpu().double() - e).norm()) + 0.1 * torch.finfo(dtype).eps * float(e.norm())
        assert float((a.cpu().double() - e).norm()) <= allowed, number


@all_functions
def test_kernels_give_the_same_bits_twice(function, inputs):
    runs = [outputs_and_gradients(function, inputs, "triton", torch.float32, "cpu") for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("name", ["norm", "add_norm", "plus-itself", "gelu", "plus-another"])
def test_gradients_in_double_precision(name):
    function, inputs = FUNCTIONS[name]
    small = [x[..., :2, :2, :4] if x.ndim == 4 and x.shape[1] > 1 else x for x in inputs]
    small = [x[:4].clone() if x.ndim == 1 or (x.shape[1:2] == (1,) and x.shape[-1] in (3, 5)) else x for x in small]
    small = [x[:, :, :2, :4].clone() if x.ndim == 4 and x.shape[-1] > 5 else x for x in small]
    assert gradcheck(function, [x.clone().requires_grad_() for x in small])


def test_depthwise_is_the_convolution_with_what_is_asked_for():
    x, y, (weight, bias) = normal(2, 5, 6, 4), normal(2, 5, 6, 4, seed=1), convolution(4, 3)
    conv = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=1, groups=4).permute(0, 2, 3, 1)
    torch.testing.assert_close(ops.depthwise(x, weight, bias), conv)
    torch.testing.assert_close(ops.depthwise(x, weight, bias, y), y + conv)
    torch.testing.assert_close(ops.depthwise(x, weight, bias, x, gelu=True), F.gelu(x + conv))
    assert ops.depthwise(x, weight, bias, stride=2).shape == (2, 3, 3, 4)
    beyond = ops.depthwise(x, weight, bias, normal(2, 7, 6, 4, seed=1))
    torch.testing.assert_close(beyond, normal(2, 7, 6, 4, seed=1) + F.pad(conv, (0, 0, 0, 0, 0, 2)))
    halves = ops.depthwise(x, weight[:2], bias[:2])
    torch.testing.assert_close(halves[..., 2:], ops.depthwise(x[..., 2:], weight[:2], bias[:2]))


@on_devices
@pytest.mark.parametrize(
    ("operator", "name", "options"),
    [
        (maps._norm, "norm", (1e-6,)),
        (maps._add_norm, "add_norm", (1e-6,)),
        (maps._convolve, "gelu", (torch.empty(0), True, True, 1)),
        (maps._convolve, "plus-another", (False, False, 1)),
        (maps._convolve, "strided", (False, False, 2)),
        (deformable._sample, "sample", ()),
        (deformable._positions, "positions", (1e-5,)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_operators_keep_what_torch_asks_of_them(operator, name, options, device):
    inputs = [x.float().to(device).requires_grad_() for x in FUNCTIONS[name][1]]
    options = [x.to(device) if isinstance(x, torch.Tensor) else x for x in options]
    opcheck(operator.registered, (*inputs, *options))


def test_joined_gradients_keep_what_torch_asks_of_operators():
    grads = [normal(2, 5, 3, 20, seed=number).float() for number in range(4)]
    opcheck(maps._join.registered, (*grads[:3], grads[3], torch.empty(0), torch.empty(0)))


def test_parts_come_as_often_as_they_are_used():
    x = normal(2, 3, 4, 6).float().requires_grad_()
    for backend in ("triton", "torch"):
        with use_backend(backend):
            a, a_again, b, c = ops.split(x, (2, 1, 1))
        assert torch.equal(a, x[..., :2])
        assert torch.equal(a_again, a)
        assert torch.equal(torch.cat([a, b, c], -1), x)
