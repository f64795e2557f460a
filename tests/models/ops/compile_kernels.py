"""Compiles every Triton kernel for compute capability 9.0, without a GPU; prints bytes of shared memory and spilled.

A program of its own: in the tests' process Triton interprets.
"""

import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from models.ops import deformable_triton, routed_triton, rpe_table_triton

KERNELS = [
    *((routed_triton, name) for name in ("_forward", "_backward_q", "_backward_kv")),
    *((deformable_triton, name) for name in ("_forward", "_backward_q", "_backward_agents")),
]
TYPES = {
    **dict.fromkeys(["lse_ptr", "delta_ptr", "table_ptr", "positions_ptr", "dpositions_ptr", "dtable_ptr"], "*fp32"),
    **{"idx_ptr": "*i64", "first_ptr": "*i64", "readers_ptr": "*i32", "mask_ptr": "*i1"},
    **dict.fromkeys(["scale", "step_y", "step_x", "inverse_y", "inverse_x"], "fp32"),
}


def build(kernel, dtype: str, constants: dict, warps: int = 4, stages: int = 1) -> None:
    signature = {
        name: "constexpr" if name in constants else TYPES.get(name, f"*{dtype}" if name.endswith("_ptr") else "i32")
        for name in kernel.arg_names
    }
    source = ASTSource(kernel, signature, constexprs=constants)
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, "num_stages": stages})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as binary:
        binary.write(built.asm["cubin"])
        binary.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        report = subprocess.run([tool, "-res-usage", binary.name], capture_output=True, text=True, check=True).stdout
    print(kernel.__name__, dtype, built.metadata.shared, re.search(r"STACK:(\d+)", report).group(1))


def main() -> None:
    for module, name in KERNELS:
        run = getattr(module, f"_run{name}")
        for dtype, bytes_each in (("bf16", 2), ("fp32", 4)):
            constants = {"HEAD_DIM": 32, "BLOCK_D": 32, "PRECISION": "tf32", "SIZE_M": 64, "SIZE_N": 64}
            if module is routed_triton:
                constants |= {"HAS_MASK": True}
            config = run.reproducible({**constants, "q_ptr": _Element(bytes_each)})
            build(run.function, dtype, constants | config.kwargs, config.num_warps, config.num_stages)
    build(routed_triton._invert, "bf16", {"BLOCK": 1024})
    build(rpe_table_triton._backward, "bf16", {"TAPS_Y": 2, "TAPS_X": 2, "ROWS": 8, "COLUMNS": 64})


class _Element:
    def __init__(self, size: int) -> None:
        self.element_size = lambda: size


if __name__ == "__main__":
    main()
