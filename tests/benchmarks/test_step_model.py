"""A step's time, modelled from the shapes of its operators."""

import pytest
import torch

from benchmarks.floors import GPUS
from benchmarks.step_model import CACHED, CONVOLUTIONS, LAUNCH, OURS, PRODUCTS, seconds_of, step_seconds
from benchmarks.trace import Call, trace

H100 = GPUS[90]


def spec(*shape):
    return shape, tuple(torch.empty(shape, device="meta").stride()), torch.bfloat16


def call(name, inputs, output, kernels=1):
    return Call(f"aten::{name}", (), inputs, [output], kernels)


def test_seconds_are_those_of_what_binds():
    large = call("mm", [spec(8192, 8192), spec(8192, 8192)], spec(8192, 8192))
    assert seconds_of(large, H100) == pytest.approx(2 * 8192**3 / (PRODUCTS * H100.matrix))
    moved = call("add.Tensor", [spec(2**28)], spec(2**28))
    assert moved.bytes > CACHED
    assert seconds_of(moved, H100) == pytest.approx(2**30 / H100.bandwidth)
    assert seconds_of(call("sum.dim_IntList", [spec(8)], spec(1), kernels=3), H100) == pytest.approx(3 * LAUNCH)
    dense = [spec(64, 512, 56, 56), spec(512, 512, 3, 3)]
    forward = seconds_of(call("convolution", dense, spec(64, 512, 56, 56)), H100)
    assert forward == pytest.approx(2 * 64 * 512 * 56 * 56 * 512 * 9 / (CONVOLUTIONS * H100.matrix))
    backward = call("convolution_backward", [dense[0], *dense], dense[1])
    assert seconds_of(backward, H100) == pytest.approx(2 * forward)


def test_step_is_the_sum_of_our_floors_and_of_pytorchs_operators():
    calls = trace("debiformer_nano", "inference", 2, 64)
    others = sum(seconds_of(one, H100) for one in calls if not one.ours)
    assert others > 0
    assert step_seconds(calls, [(2, 1e-3), (3, 0.0)], H100) == pytest.approx(others + 2e-3 / OURS + 3 * LAUNCH)


def test_peers_attention_is_one_fused_kernel():
    names = [one.name for one in trace("swin_tiny_patch4_window7_224", "inference", 1)]
    assert sum("scaled_dot_product" in name for name in names) == 12
    assert not any("softmax" in name for name in names)
