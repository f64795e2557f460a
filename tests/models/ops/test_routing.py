"""Routing of a map's windows: the kernels against PyTorch's means, products and top-k."""

import pytest
import torch
from attention_cases import DEVICES, DTYPES
from torch.library import opcheck

from models import ops
from models.ops import routed
from models.ops.backend import use_backend

on_devices = pytest.mark.parametrize("device", DEVICES)
CASES = {
    "larger-windows": ((2, 3), (3, 4), (3, 4), 24, 4),
    "queries-of-one-token": ((7, 7), (1, 1), (2, 2), 16, 16),
    "all-windows": ((2, 2), (2, 1), (1, 5), 70, 4),
    "more-than-there-are": ((1, 3), (2, 2), (2, 2), 16, 9),
}
all_cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def maps(case, dtype=torch.float64, device="cpu"):
    """Queries, keys and the rest; they are parts of one wider map, as in the models."""
    (rows, columns), *windows, channels, topk = case
    draw = torch.Generator().manual_seed(0)
    wide = [
        torch.randn(2, rows * h, columns * w, 3 * channels, generator=draw, dtype=torch.float64) for h, w in windows
    ]
    q, k = (x.to(device, dtype)[..., i * channels : (i + 1) * channels] for i, x in enumerate(wide))
    return q, k, (rows, columns), topk, channels**-0.5


@on_devices
@all_cases
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_choose_the_windows_of_highest_affinity(case, dtype, device):
    q, k, n_win, topk, scale = maps(case, dtype, device)
    with use_backend("triton"):
        logits, idx = ops.route_maps(q, k, n_win, topk, scale)
    with use_backend("torch"):
        expected = ops.route_maps(q, k, n_win, topk, scale)
        truth, _ = ops.route_maps(q.cpu().double(), k.cpu().double(), n_win, n_win[0] * n_win[1], scale)
    assert (logits.shape, logits.dtype) == (expected[0].shape, expected[0].dtype)
    assert (idx.shape, idx.dtype) == (expected[1].shape, torch.int64)
    if dtype == torch.float32:
        assert torch.equal(idx, expected[1])
    assert all(len(set(row)) == len(row) for row in idx.flatten(0, 1).tolist())
    torch.testing.assert_close(
        logits.cpu().double(), truth[..., : idx.shape[-1]], rtol=0, atol=8 * torch.finfo(dtype).eps
    )


@on_devices
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 0.0])
def test_no_value_makes_a_window_that_is_not_there_or_is_there_twice(value, device):
    q, k, n_win, topk, scale = maps(CASES["queries-of-one-token"], torch.float32, device)
    k[0, :7], q[1] = value, value
    with use_backend("triton"):
        _, idx = ops.route_maps(q, k, n_win, topk, scale)
    assert idx.min() >= 0
    assert idx.max() < 49
    assert all(len(set(row)) == len(row) for row in idx.flatten(0, 1).tolist())


@on_devices
def test_routing_is_an_operator_without_gradients(device):
    q, k, n_win, topk, scale = maps(CASES["larger-windows"], torch.float32, device)
    opcheck(routed._route.registered, (q, k, *n_win, topk, scale))
    with use_backend("triton"):
        assert not any(x.requires_grad for x in ops.route_maps(q.requires_grad_(), k, n_win, topk, scale))


def test_many_windows_are_routed_by_pytorch():
    q, k = (torch.randn(1, 17, 16, 4, generator=torch.Generator().manual_seed(i)) for i in range(2))
    with use_backend("triton"):
        actual = ops.route_maps(q, k, (17, 16), 5, 1.0)
    with use_backend("torch"):
        expected = ops.route_maps(q, k, (17, 16), 5, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
