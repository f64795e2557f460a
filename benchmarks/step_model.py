"""How long a step would take on a GPU, modelled from what its kernels move and compute.

Every kernel takes at least a launch's time, and as long as its bytes or its arithmetic need at the rate that kernels of
its kind usually reach. Of two models on one GPU the ratio is good to about a quarter; the times themselves are rough.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import prod
from typing import Protocol

from .trace import Call, size_in_bytes

LAUNCH = 2e-6
"""Seconds that a kernel takes, however small."""
CACHED, CACHE_SPEED = 6e7, 1.7
"""Bytes up to which a map is still in the GPU's cache, and how much faster than memory that is."""
OURS = 0.65
"""The part of a floor's speed that our kernels are taken to reach."""
MATRIX_PRODUCTS = ("mm", "addmm", "bmm")
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


def seconds_of(call: Call, gpu: Rates, with_bias: bool = True) -> float:
    """Modelled seconds of one of PyTorch's operators. with_bias: whether a convolution adds its bias in a kernel."""
    kind = call.operator
    moved = _moving(call.bytes, gpu)
    if kind in MATRIX_PRODUCTS:
        seconds = max(moved, 2 * prod(call.outputs[0][0]) * call.inputs[-2][0][-1] / (PRODUCTS * gpu.matrix))
    elif kind.startswith("convolution"):
        seconds = _convolving(call, gpu, kind.endswith("backward"), with_bias)
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


def _convolving(call: Call, gpu: Rates, backward: bool, with_bias: bool) -> float:
    weight, out = (call.inputs[2], call.inputs[0]) if backward else (call.inputs[1], call.outputs[0])
    passes = 2 if backward else 1  # the gradient of the map, and that of the weight
    if weight[0][1] == 1:
        part = DEPTHWISE.get(weight[0][2], 0.33)
        seconds = passes * _moving(call.bytes, gpu) / part
    else:
        operations = passes * 2 * prod(out[0]) * prod(weight[0][1:])
        seconds = max(passes * _moving(call.bytes, gpu), operations / (CONVOLUTIONS * gpu.matrix))
    adds_bias = with_bias and not backward and len(call.inputs) == 3
    return seconds + adds_bias * _moving(2 * size_in_bytes(call.outputs[0]), gpu)


def ours_seconds(floors: Iterable[tuple[int, float]]) -> float:
    """Modelled seconds of our launches. floors: how often each runs, and its floor in seconds."""
    return sum(times * max(seconds / OURS, LAUNCH) for times, seconds in floors)


def eager_seconds(calls: Iterable[Call], floors: Iterable[tuple[int, float]], gpu: Rates) -> float:
    """Modelled seconds of a step. floors: as in `ours_seconds`."""
    return sum(seconds_of(call, gpu) for call in calls if not call.ours) + ours_seconds(floors)


@dataclass
class _Fused:
    """One kernel of a compiled step. reads, writes: bytes by where they lie, (storage, offset); not all are written."""

    reads: dict[tuple[int, int], int] = field(default_factory=dict)
    writes: dict[tuple[int, int], int] = field(default_factory=dict)


def compiled_seconds(calls: Iterable[Call], floors: Iterable[tuple[int, float]], gpu: Rates) -> float:
    """Modelled seconds of a compiled step of inference. floors: as in `ours_seconds`.

    The compiler is taken to fuse without fail: all that neither multiplies matrices nor is ours is one kernel with what
    it reads from and is read by, unless a call that is none of it lies between.
    """
    kernels: dict[int, _Fused] = {}  # by the storage that each writes
    depths: dict[int, int] = {}  # of a storage: calls that are not fused, on the longest way to it
    outside: set[int] = set()  # storages that are read by others than the kernel which makes them, and so are written
    seconds = ours_seconds(floors)
    for call in calls:
        depth = max((depths.get(storage, 0) for storage, _ in call.read), default=0)
        if call.ours or not call.read or not _is_fused(call):
            outside.update(storage for storage, _ in call.read)
            depths.update((storage, depth + 1) for storage, _ in call.written)
            seconds += 0.0 if call.ours else seconds_of(call, gpu, with_bias=not call.read)
            continue
        kernel = _Fused()
        for place, spec in zip(call.read, call.inputs, strict=True):
            storage = place[0]
            if storage in kernels and depths[storage] == depth:
                kernel = _join(kernels, kernel, kernels[storage])
            else:
                kernel.reads[place] = size_in_bytes(spec)
                outside.add(storage)
        for place, spec in zip(call.written, call.outputs, strict=True):
            kernel.writes[place] = size_in_bytes(spec)
            kernels[place[0]], depths[place[0]] = kernel, depth
    for kernel in {id(kernel): kernel for kernel in kernels.values()}.values():
        moved = sum(kernel.reads.values()) + sum(size for (s, _), size in kernel.writes.items() if s in outside)
        seconds += max(_moving(moved, gpu), LAUNCH)
    return seconds


def _is_fused(call: Call) -> bool:
    kind = call.operator
    alone = kind.startswith("convolution") or "scaled_dot_product" in kind
    return not alone and kind not in (*MATRIX_PRODUCTS, "topk")


def _join(kernels: dict[int, _Fused], one: _Fused, other: _Fused) -> _Fused:
    """Make two kernels one."""
    if one is not other:
        other.reads.update(one.reads)
        other.writes.update(one.writes)
        kernels.update((storage, other) for storage, _ in one.writes)
    return other
