"""Launches an attention twice under a driver that does nothing; prints the values that each launch passes, as JSON.

A program of its own: in the tests' process Triton interprets. Of blocks that are timed, the last one is the fastest.
"""

import itertools
import json
from unittest import mock

import torch
import triton
from attention_cases import Routed

from benchmarks import launch_path_triton
from models.ops import routed_triton

CASE = Routed(2, (7, 7), (8, 8), (8, 8), 2, 32, 4)


def main() -> None:
    tensors, fixed = CASE.inputs(0)
    q, k, v = (x.bfloat16() for x in tensors[:3])
    launched = []

    def note(_kernel, *arguments):
        values = [list(x.shape) if isinstance(x, torch.Tensor) else x for x in arguments]
        launched.append(values[launch_path_triton.BEFORE_VALUES :])

    times = itertools.count(0, -1)
    with (
        launch_path_triton.launches_do_nothing(),
        mock.patch.object(launch_path_triton._Compiled, "run", note),
        mock.patch.object(triton.testing, "do_bench", lambda call, return_mode: call() or next(times)),
    ):
        for _ in range(2):
            launched.clear()
            routed_triton.forward(q, k, v, fixed[0], CASE.windows, CASE.heads, 0.1)
            print(json.dumps(launched[-1]))


if __name__ == "__main__":
    main()
