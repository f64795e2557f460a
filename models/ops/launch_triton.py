"""How the Triton kernels are launched.

A launch takes its block sizes, warps and pipeline stages from `launches.json`, by kernel and size class, and by a rule
for classes that the table lacks: so every process and every run takes the same, and sums in the same order. With
DEBIFORMER_AUTOTUNE=FILE in the environment, the first launch of a class that FILE lacks instead times every choice on
the GPU and adds the fastest to FILE, a table like `launches.json`: in a run of one process, for others would choose
otherwise. DEBIFORMER_LAUNCHES=FILE then reads it, before `launches.json`.
"""

import functools
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .tiles_triton import INTERPRETED

TABLE = Path(__file__).with_name("launches.json")
OF_A_CLASS = ("HEAD_DIM", "KERNEL", "WITH_DQ", "GELU")
"""Constants by which kernels are tuned, where they have them."""


class Block(NamedTuple):
    """One way to launch a kernel: sides of its tiles, warps, pipeline stages."""

    m: int
    n: int
    warps: int
    stages: int


class Launch(NamedTuple):
    """What `observers` are told of a launch."""

    kernel: "Kernel"
    size: tuple[int, int]
    programs: Callable[[Block], int]
    arguments: dict[str, Any]


observers: list[Callable[[Launch], None]] = []
"""Called before every launch. Launches with meta tensors are only observed."""


class Kernel:
    """A jitted kernel and the ways to launch it, the preferred one first.

    fits: whether a block may be taken for (size, arguments); by default blocks are not larger than the problem.
    float32: the ways for float32, whose tiles take twice the registers.
    trips: how often the kernel's loop goes round, by arguments and block; for `benchmarks.floors`.
    """

    def __init__(
        self,
        function: Any,
        blocks: Sequence[tuple[int, int, int, int]],
        trips: Callable[[dict[str, Any], Block], float],
        fits: Callable[[Block, tuple[int, int], dict[str, Any]], bool] | None = None,
        float32: Sequence[tuple[int, int, int, int]] | None = None,
    ) -> None:
        self.function, self.blocks, self.trips = function, [Block(*block) for block in blocks], trips
        self.name = f"{function.__module__.rpartition('.')[2].removesuffix('_triton')}.{function.__name__.strip('_')}"
        self.fits = fits or (lambda block, size, _arguments: block.m <= size[0] and block.n <= size[1])
        self.float32 = self.blocks if float32 is None else [Block(*block) for block in float32]
        self.chosen: dict[tuple, Block] = {}
        self.compiled: dict[tuple, Any] = {}

    def fitting(self, size: tuple[int, int], arguments: dict[str, Any]) -> list[Block]:
        """Blocks that may be taken; the last if none fits."""
        blocks = self.float32 if self.type_of(arguments) == torch.float32 else self.blocks
        return [block for block in blocks if self.fits(block, size, arguments)] or blocks[-1:]

    @staticmethod
    def type_of(arguments: dict[str, Any]) -> torch.dtype:
        """The type of the first tensor."""
        return next(x.dtype for x in arguments.values() if isinstance(x, Tensor))

    def size_class(self, size: tuple[int, int], arguments: dict[str, Any]) -> str:
        """The name in the table of launches that are tuned together."""
        constants = [f"{key}={arguments[key]}" for key in OF_A_CLASS if key in arguments]
        return " ".join([*map(str, size), f"{8 * self.type_of(arguments).itemsize} bits", *constants])

    def choose(self, size: tuple[int, int], arguments: dict[str, Any]) -> Block:
        """The block of the table, or the first that fits."""
        fitting = self.fitting(size, arguments)
        entry = launch_table().get(self.name, {}).get(self.size_class(size, arguments))
        return Block(*entry) if entry and Block(*entry) in fitting else fitting[0]

    def __call__(self, programs: Callable[[Block], int], size: tuple[int, int], **arguments: Any) -> None:
        """Launch `programs(block)` programs. size: of the problem, `padded`, which bounds the blocks."""
        for observe in observers:
            observe(Launch(self, size, programs, arguments))
        first = next(x for x in arguments.values() if isinstance(x, Tensor))
        if first.is_meta:
            return
        if INTERPRETED.value:  # the smallest blocks, for then loops go round
            return self.run(self.fitting(size, arguments)[-1], programs, arguments)
        key = (size, first.dtype, *map(arguments.get, OF_A_CLASS))
        block = self.chosen.get(key)
        if block is None:
            tunes = os.environ.get("DEBIFORMER_AUTOTUNE")
            block = self.tune(tunes, size, programs, arguments) if tunes else self.choose(size, arguments)
            self.chosen[key] = block
        self.run(block, programs, arguments)

    def run(self, block: Block, programs: Callable[[Block], int], arguments: dict[str, Any]) -> None:
        """Launch by one block. Finds compiled code by the arguments' values, in half the time that Triton takes."""
        arguments = {**arguments, "BLOCK_M": block.m, "BLOCK_N": block.n}
        values = [arguments[name] for name in self.function.arg_names]
        kinds = [(x.dtype, x.device, x.data_ptr() % 16) if isinstance(x, Tensor) else x for x in values]
        key = (block, *kinds)
        compiled = self.compiled.get(key)
        if compiled is not None:
            return compiled[(programs(block), 1, 1)](*values)
        launch = self.function[(programs(block),)]
        compiled = launch(**arguments, num_warps=block.warps, num_stages=block.stages)
        if not INTERPRETED.value:
            self.compiled[key] = compiled

    def tune(
        self, path: str, size: tuple[int, int], programs: Callable[[Block], int], arguments: dict[str, Any]
    ) -> Block:
        """The block in the table at `path`; if there is none, every block that fits is timed, and the fastest added."""

        def milliseconds(block: Block) -> float:
            return triton.testing.do_bench(lambda: self.run(block, programs, arguments), return_mode="median")

        file, name = Path(path), self.size_class(size, arguments)
        table = read_table(file)
        known = table.setdefault(self.name, {})
        if name not in known:
            known[name] = list(min(self.fitting(size, arguments), key=milliseconds))
            write_table(table, file)
        return Block(*known[name])


@functools.cache
def launch_table() -> dict[str, dict[str, list[int]]]:
    """Kernel -> size class -> block."""
    table = read_table(TABLE)
    path = os.environ.get("DEBIFORMER_LAUNCHES")
    for kernel, entries in read_table(Path(path)).items() if path else ():
        table[kernel] = {**table.get(kernel, {}), **entries}
    return table


def read_table(path: Path) -> dict[str, dict[str, list[int]]]:
    """The table in a file, empty if there is none."""
    return json.loads(path.read_text()) if path.exists() else {}


def write_table(table: dict[str, dict[str, list[int]]], path: Path) -> None:
    """One line per entry, written at once."""
    kernels = []
    for kernel, entries in sorted(table.items()):
        lines = ",\n".join(f"  {json.dumps(size)}: {json.dumps(block)}" for size, block in sorted(entries.items()))
        kernels.append(f" {json.dumps(kernel)}: {{\n{lines}\n }}")
    new = path.with_name(f"{path.name}.{os.getpid()}")
    new.write_text("{\n" + ",\n".join(kernels) + "\n}\n")
    new.replace(path)


def padded(size: int) -> int:
    """The next power of two, 16 at least: block sides are powers of two, and those of a matrix product at least 16."""
    return max(16, 1 << (size - 1).bit_length())


def cdiv(size: int, part: int) -> int:
    """Parts that cover a size; `triton.cdiv` takes 60 times as long."""
    return -(-size // part)


def precision(dtype: torch.dtype) -> str:
    """How tl.dot multiplies float32; half precision is not concerned."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def as_tokens(x: Tensor) -> Tensor:
    """(B, H, W, C) as it lies, if one stride leads from token to token and channels are adjacent; else a copy."""
    lies_in_rows = x.stride(3) == 1 and (x.shape[1] == 1 or x.stride(1) == x.shape[2] * x.stride(2))
    return x if lies_in_rows else x.contiguous()


def strides(**maps: Tensor) -> dict[str, int]:
    """NAME_image and NAME_token of maps (B, H, W, C)."""
    return {
        **{f"{name}_image": x.stride(0) for name, x in maps.items()},
        **{f"{name}_token": x.stride(2) for name, x in maps.items()},
    }
