"""How long a step would take on a GPU, modelled from what its kernels move and compute.

Every kernel takes at least a launch's time, and as long as its bytes or its arithmetic need at the rate that kernels of
its kind usually reach. Of two models on one GPU the ratio is good to about a quarter; the times themselves are rough.
"""

from collections.abc import Iterable
from math import prod
from typing import Protocol

from .trace import Call, size_in_bytes

LAUNCH = 2e-6
"""Seconds that a kernel takes, however small."""
CACHED, CACHE_SPEED = 6e7, 1.7
"""Bytes up to which a map is still in the GPU's cache, and how much faster than memory that is."""
OURS = 0.65
"""The part of a floor's speed that our kernels are taken to reach."""
PRODUCTS, CONVOLUTIONS, ATTENTION = 0.7, 0.35, 0.35
"""The part of the matrix rate that products, dense convolutions and fused attention reach."""
DEPTHWISE = {3: 0.55, 5: 0.45}
"""The part of the bandwidth that depthwise convolutions reach, by kernel size; larger ones a third."""
NORM = {"native_layer_norm": 1300, "native_layer_norm_backward": 1800}
"""Instructions of a row: PyTorch gives each one a block of 128 threads."""


class Rates(Protocol):
    """Of a GPU, per second: bytes, operations of matrix products in half precision, instructions of warps."""

    bandwidth: float
    matrix: float

    @property
    def issue(self) -> float: ...


def seconds_of(call: Call, gpu: Rates) -> float:
    """Modelled seconds of one of PyTorch's operators."""
    kind = call.operator
    moved = _moving(call.bytes, gpu)
    if kind in ("mm", "addmm", "bmm"):
        seconds = max(moved, 2 * prod(call.outputs[0][0]) * call.inputs[-2][0][-1] / (PRODUCTS * gpu.matrix))
    elif kind.startswith("convolution"):
        seconds = _convolving(call, gpu, backward=kind.endswith("backward"))
    elif kind in NORM:
        rows = prod(call.inputs[0][0][:-1])
        seconds = max(moved, rows * NORM[kind] / gpu.issue)
    elif "scaled_dot_product" in kind:  # a mask is the same for many heads and images
        shape = call.inputs[0][0]
        tensors = [x for x in (*call.inputs, *call.outputs) if x[0] == shape]
        operations = (10 if kind.endswith("backward") else 4) * prod(shape) * shape[-2]
        seconds = max(_moving(sum(map(size_in_bytes, tensors)), gpu), operations / (ATTENTION * gpu.matrix))
    else:
        seconds = moved
    return max(seconds, call.kernels * LAUNCH)


def _moving(count: int, gpu: Rates) -> float:
    return count / (gpu.bandwidth * (CACHE_SPEED if count < CACHED else 1.0))


def _convolving(call: Call, gpu: Rates, backward: bool) -> float:
    weight, out = (call.inputs[2], call.inputs[0]) if backward else (call.inputs[1], call.outputs[0])
    passes = 2 if backward else 1  # the gradient of the map, and that of the weight
    if weight[0][1] == 1:
        part = DEPTHWISE.get(weight[0][2], 0.33)
        seconds = passes * _moving(call.bytes, gpu) / part
    else:
        operations = passes * 2 * prod(out[0]) * prod(weight[0][1:])
        seconds = max(passes * _moving(call.bytes, gpu), operations / (CONVOLUTIONS * gpu.matrix))
    adds_bias = not backward and len(call.inputs) == 3
    return seconds + adds_bias * _moving(2 * size_in_bytes(call.outputs[0]), gpu)


def step_seconds(calls: Iterable[Call], floors: Iterable[tuple[int, float]], gpu: Rates) -> float:
    """Modelled seconds of a step. floors: how often each of our launches runs, and its floor in seconds."""
    others = sum(seconds_of(call, gpu) for call in calls if not call.ours)
    return others + sum(times * max(seconds / OURS, LAUNCH) for times, seconds in floors)
