"""Compiles the Triton kernels for compute capability 9.0, without a GPU; prints bytes of shared memory and spilled.

A program of its own: in the tests' process Triton interprets. Launches are those of small attentions with the heads of
the models, by the blocks that would be chosen.
"""

import sys

import torch
from attention_cases import Deformable, Routed

from benchmarks.machine_code_triton import compile_launch
from models.ops import (
    deformable_triton,
    launch_triton,
    positions_triton,
    routed_triton,
    routing_triton,
    sampling_triton,
    strided_triton,
)

CASES = [
    Routed(2, (7, 7), (8, 8), (8, 8), 2, 32, 1),
    Routed(2, (7, 7), (4, 4), (4, 4), 2, 32, 4),
    Routed(2, (7, 7), (2, 2), (2, 2), 2, 32, 16),
    Routed(2, (7, 7), (1, 1), (8, 8), 2, 32, 4),
    Deformable(2, (14, 14), (7, 7), 4, 32, 2, (14, 14)),
    Deformable(2, (16, 16), (8, 9), 4, 32, 2, (14, 14)),
]


def run(case, dtype) -> None:
    tensors, fixed = case.inputs(0)
    q, k, v, *others = [x.to("meta", dtype) for x in tensors]
    if isinstance(case, Routed):
        arguments = q, k, v, fixed[0].to("meta")
        options = case.windows, case.heads, 0.1
        routing_triton.choose(q, k, case.windows, case.topk, 0.1)
        out, lse = routed_triton.forward(*arguments, *options)
        routed_triton.backward(out, *arguments, out, lse, *options)
        weight, bias = torch.empty(q.shape[-1], 1, 5, 5, device="meta"), torch.empty(q.shape[-1], device="meta")
        out = strided_triton.forward(k, weight, bias, bias.new_empty(0), 2)
        strided_triton.backward(out, k, weight, bias, 2)
    else:
        arguments = q, k, v, *(x.float() for x in others)
        out, lse = deformable_triton.forward(*arguments, case.heads, 0.1)
        deformable_triton.backward(out, *arguments, out, lse, case.heads, 0.1, 2**20)
        agents = sampling_triton.forward(q, arguments[-1])
        sampling_triton.backward(agents, q, arguments[-1])
        features, parameter = q.unflatten(-1, (2, -1)), torch.empty(q.shape[-1] // 2, device="meta")
        positions = positions_triton.forward(features, *[parameter] * 3, 1e-5)
        positions_triton.backward(positions, features, *[parameter] * 3, 1e-5)


def main() -> None:
    found = []
    launch_triton.observers.append(found.append)
    for dtype in [getattr(torch, name) for name in sys.argv[1:]] or [torch.bfloat16, torch.float32]:
        for case in CASES:
            run(case, dtype)
    done = set()
    for launch in found:
        block = launch.kernel.choose(launch.size, launch.arguments)
        code = compile_launch(launch.kernel, block, launch.arguments, 90)
        row = launch.kernel.name, launch.kernel.size_class(launch.size, launch.arguments), *block
        if row not in done:
            print(launch.kernel.name, code.shared, code.spilled, *row[1:])
        done.add(row)


if __name__ == "__main__":
    main()
