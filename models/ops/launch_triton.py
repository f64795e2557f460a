"""What the Triton kernels share: how they are launched, and the steps that all of them take.

A kernel's configuration (block sizes, warps, pipeline stages) is chosen by Triton's autotuner on the GPU itself, once
per size class and machine. Block sizes decide the order of summation; so under torch.use_deterministic_algorithms a
rule chooses instead, and in the interpreter the smallest blocks, for then loops go round.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
"""Read when Triton is imported: jit decorates for the interpreter or for the compiler from then on."""


class Kernel:
    """A jitted kernel and its configurations, largest blocks first; call it with a grid and its arguments by name.

    The size class are the constants SIZE_M and SIZE_N, which bound BLOCK_M and BLOCK_N, and those named in `key`.
    """

    def __init__(self, function: Any, configs: Sequence[triton.Config], key: Sequence[str]) -> None:
        self.function, self.configs = function, list(configs)
        if not INTERPRETED.value:
            prune = {"early_config_prune": lambda _configs, arguments, **constants: self.fitting(arguments | constants)}
            key = ["SIZE_M", "SIZE_N", *key]
            self.tuned = triton.autotune(self.configs, key, prune_configs_by=prune, cache_results=True)(function)

    def fitting(self, arguments: dict[str, Any]) -> list[triton.Config]:
        """Configurations whose blocks are not larger than the problem; the last if none is."""
        size_m, size_n = arguments["SIZE_M"], arguments["SIZE_N"]
        blocks = (config.kwargs for config in self.configs)
        fit = [block["BLOCK_M"] <= size_m and block["BLOCK_N"] <= size_n for block in blocks]
        return [config for config, fits in zip(self.configs, fit, strict=True) if fits] or self.configs[-1:]

    def reproducible(self, arguments: dict[str, Any]) -> triton.Config:
        """The largest configuration whose pipelined tiles leave room in the shared memory of any recent GPU."""
        row = arguments["BLOCK_D"] * arguments["q_ptr"].element_size()
        *larger, smallest = self.fitting(arguments)
        for config in larger:
            if row * config.num_stages * (config.kwargs["BLOCK_M"] + config.kwargs["BLOCK_N"]) <= 48 * 1024:
                return config
        return smallest

    def __call__(self, grid: Callable[[dict[str, int]], tuple[int, ...]], **arguments: Any) -> None:
        if INTERPRETED.value:
            self.function[grid](**arguments, **self.configs[-1].all_kwargs())
        elif torch.are_deterministic_algorithms_enabled():
            self.function[grid](**arguments, **self.reproducible(arguments).all_kwargs())
        else:
            self.tuned[grid](**arguments)


def configs(*blocks: tuple[int, int, int, int]) -> list[triton.Config]:
    """Configurations from (BLOCK_M, BLOCK_N, warps, stages)."""
    return [
        triton.Config({"BLOCK_M": m, "BLOCK_N": n}, num_warps=warps, num_stages=stages)
        for m, n, warps, stages in blocks
    ]


def padded(size: int) -> int:
    """The next power of two, 16 at least: block sides are powers of two, and those of a matrix product at least 16."""
    return max(16, triton.next_power_of_2(size))


def precision(dtype: torch.dtype) -> str:
    """How tl.dot multiplies float32; half precision is not concerned."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def as_rows(x: Tensor) -> Tensor:
    """(B, n, t, C) as it lies, if one stride leads through all B*n and channels are adjacent; else a copy."""
    lies_in_rows = x.stride(3) == 1 and (x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1))
    return x if lies_in_rows else x.contiguous()


@triton.jit
def load_rows(ptr, offsets, rows_valid, channels, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """A tile (rows, BLOCK_D): channels of the rows that begin at `offsets`, zeros where there are none."""
    pointers = ptr + offsets[:, None] + channels[None, :]
    if HEAD_DIM == BLOCK_D:
        return tl.load(pointers, mask=rows_valid[:, None], other=0.0)
    return tl.load(pointers, mask=rows_valid[:, None] & (channels < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def rounded(x, type: tl.constexpr):
    """float32 numbers in another type, rounded to nearest."""
    if INTERPRETED and type == tl.bfloat16:  # the interpreter cuts bits off: carry the rounding into those it keeps
        bits = x.to(tl.int32, bitcast=True)
        x = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
    return x.to(type)


@triton.jit
def store_rows(ptr, offsets, rows_valid, channels, tile, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Writes what `load_rows` reads, in the type of `ptr`."""
    pointers = ptr + offsets[:, None] + channels[None, :]
    tile = rounded(tile, ptr.dtype.element_ty)
    if HEAD_DIM == BLOCK_D:
        tl.store(pointers, tile, mask=rows_valid[:, None])
    else:
        tl.store(pointers, tile, mask=rows_valid[:, None] & (channels < HEAD_DIM)[None, :])


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """Matrix product of two tiles, in float32."""
    if INTERPRETED:  # the interpreter multiplies bfloat16 by its bits
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def softmax_step(logits, largest, total):
    """One step of the online softmax over base-2 logits (M, N).

    Returns the new largest logit and sum per row, the weights (M, N), and the factor that shrinks earlier sums. While
    a row has met only -inf, its weights are zeros.
    """
    new = tl.maximum(largest, tl.max(logits, 1))
    anchor = tl.where(new == float("-inf"), 0.0, new)
    weights = tl.exp2(logits - anchor[:, None])
    shrink = tl.exp2(largest - anchor)
    return new, total * shrink + tl.sum(weights, 1), weights, shrink
