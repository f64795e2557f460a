"""A step's time, modelled from the shapes of its operators."""

import pytest
import torch

from benchmarks.floors import GPUS
from benchmarks.step_model import (
    CACHED,
    CONVOLUTIONS,
    LAUNCH,
    OURS,
    PRODUCTS,
    compiled_seconds,
    eager_seconds,
    seconds_of,
)
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
    assert eager_seconds(calls, [(2, 1e-3), (3, 0.0)], H100) == pytest.approx(others + 2e-3 / OURS + 3 * LAUNCH)


LARGE = spec(2**29)  # a GiB


def chained(name, read, written):
    """An operator on maps of a GiB, known by where they lie."""
    one = call(name, [LARGE] * len(read), LARGE)
    one.read, one.written = [(storage, 0) for storage in read], [(written, 0)]
    return one


def test_compiled_neighbours_are_one_kernel():
    """Two maps are read and one is written: what only the kernel itself reads is nowhere."""
    chain = [chained("add", [1, 2], 3), chained("gelu", [3], 4), chained("mul", [4, 3], 5), chained("topk", [5], 6)]
    last = seconds_of(chain[-1], H100)
    assert compiled_seconds(chain, [], H100) == pytest.approx(3 * 2**30 / H100.bandwidth + last)
    assert eager_seconds(chain, [], H100) == pytest.approx(8 * 2**30 / H100.bandwidth + last)


def test_what_waits_for_a_product_is_another_kernel():
    """The sum is written for the product, and read again beside what that returns."""
    product = call("mm", [spec(8, 8), spec(8, 8)], spec(8, 8))
    product.read, product.written = [(3, 0), (9, 0)], [(4, 0)]
    calls = [chained("add", [1, 2], 3), product, chained("add", [3, 4], 5), chained("topk", [5], 6)]
    rest = sum(seconds_of(one, H100) for one in (calls[1], calls[3]))
    assert compiled_seconds(calls, [], H100) == pytest.approx((3 + 3) * 2**30 / H100.bandwidth + rest)


def test_compiled_models_lose_passes_and_keep_products():
    for name in ("debiformer_nano", "resnet18"):
        calls = trace(name, "inference", 64, 64)
        kept = [one for one in calls if one.operator in ("mm", "addmm")]
        least = sum(seconds_of(one, H100) for one in kept)
        assert least < compiled_seconds(calls, [], H100) < eager_seconds(calls, [], H100)


def test_peers_attention_is_one_fused_kernel():
    names = [one.name for one in trace("swin_tiny_patch4_window7_224", "inference", 1)]
    assert sum("scaled_dot_product" in name for name in names) == 12
    assert not any("softmax" in name for name in names)
