"""What a compiled Triton kernel costs, read from its machine code: no GPU is needed.

Compiles a recorded launch for a named architecture with the specialisation that its arguments have, and counts.
"""

import functools
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from models.ops.launch_triton import Block, Kernel

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
TYPES = {
    **{torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.float64: "*fp64"},
    **{torch.int64: "*i64", torch.int32: "*i32", torch.bool: "*i1"},
}
REGISTERS, WARPS, PROGRAMS = 65536, 64, 32
"""Of a multiprocessor, at most."""


@dataclass(frozen=True)
class Code:
    """Machine code of one kernel.

    straight, loop: instructions of a warp outside and inside loops; straight_flops, loop_flops: operations of their
    matrix instructions. spilled: bytes per thread. warps: of a program.
    """

    straight: int
    loop: int
    straight_flops: int
    loop_flops: int
    registers: int
    spilled: int
    shared: int
    warps: int

    def instructions(self, trips: float) -> float:
        """Of one program, all warps."""
        return (self.straight + self.loop * trips) * self.warps

    def flops(self, trips: float) -> float:
        """Of the matrix instructions of one program."""
        return (self.straight_flops + self.loop_flops * trips) * self.warps

    def resident_warps(self, shared_memory: int) -> int:
        """Warps of such programs that a multiprocessor holds."""
        registers = -(-self.registers * 32 // 256) * 256 * self.warps
        programs = min(REGISTERS // registers, shared_memory // (self.shared + 1024), WARPS // self.warps, PROGRAMS)
        return programs * self.warps


def specialise(function: Any, arguments: dict[str, Any]) -> tuple[dict, dict, dict]:
    """Signature, constants and attributes as Triton's launcher would derive them."""
    signature, constants, attributes = {}, {}, {}
    for number, parameter in enumerate(function.params):
        name, value = parameter.name, arguments[parameter.name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = TYPES[value.dtype]
            if value.storage_offset() * value.element_size() % 16 == 0:
                attributes[(number,)] = [["tt.divisibility", 16]]
        elif isinstance(value, bool):
            signature[name] = "i1"
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(number,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    return signature, constants, attributes


def compile_launch(kernel: Kernel, block: Block, arguments: dict[str, Any], architecture: int) -> Code:
    """The code of one launch; equal launches are compiled once."""
    arguments = {**arguments, "BLOCK_M": block.m, "BLOCK_N": block.n}
    signature, constants, attributes = specialise(kernel.function, arguments)
    key = tuple(map(repr, (signature, constants, attributes)))
    _pending[key] = (signature, constants, attributes)
    return _compile(kernel, block.warps, block.stages, architecture, key)


_pending: dict[tuple[str, ...], tuple[dict, dict, dict]] = {}


@functools.cache
def _compile(kernel: Kernel, warps: int, stages: int, architecture: int, key: tuple[str, ...]) -> Code:
    signature, constants, attributes = _pending[key]
    source = ASTSource(kernel.function, signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": warps, "num_stages": stages}
    built = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as binary:
        binary.write(built.asm["cubin"])
        binary.flush()
        usage, listing = (
            subprocess.run([TOOLS / "cuobjdump", flag, binary.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage).group(1)) for name in ("REG", "STACK"))
    straight, loop, straight_flops, loop_flops = count(listing, warps)
    return Code(straight, loop, straight_flops, loop_flops, registers, stack, built.metadata.shared, warps)


INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?);", re.MULTILINE)
BRANCH = re.compile(r"\bBRA(?:\.\w+)*\s+(?:\S+,\s*)?`?\(?0x([0-9a-f]+)")
PRODUCT = re.compile(r"\b(?:HMMA\.(16)(8)(\d+)|HGMMA\.(\d+)x(\d+)x(\d+))\b")


def count(listing: str, warps: int) -> tuple[int, int, int, int]:
    """Instructions of a warp outside and inside loops, and the same of operations in matrix products."""
    instructions = [(int(address, 16), text) for address, text in INSTRUCTION.findall(listing)]
    number = {address: i for i, (address, _) in enumerate(instructions)}
    inside = [False] * len(instructions)
    for i, (address, text) in enumerate(instructions):
        branch = BRANCH.search(text)
        target = int(branch.group(1), 16) if branch else address
        if target < address and target in number:  # backwards: a loop; the last instruction branches to itself
            first = number[target]
            inside[first : i + 1] = [True] * (i + 1 - first)
    flops = [_flops(text) for _, text in instructions]
    loop, loop_flops = sum(inside), sum(n for n, within in zip(flops, inside, strict=True) if within)
    return len(instructions) - loop, loop, sum(flops) - loop_flops, loop_flops


def _flops(text: str) -> int:
    """Of one matrix instruction, for one warp; four warps share a HGMMA."""
    match = PRODUCT.search(text)
    if not match:
        return 0
    sides = [int(side) for side in match.groups() if side]
    return 2 * sides[0] * sides[1] * sides[2] // (4 if "HGMMA" in text else 1)
