"""Python time from our operators to their launches, under a driver that does nothing: no GPU is needed.

Operators run on CPU tensors of two images. What they ask of Triton goes as far as Triton's own launcher, where a GPU's
driver would take over; nothing is compiled or launched. What they ask of PyTorch (new tensors, sums of partial
gradients) is computed on the CPU, so the figure is rather too high. It is this machine's, unlike those of the compiler.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch.utils._pytree import tree_map
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from models.ops.launch_triton import INTERPRETED
from models.ops.operators import operators
from runtime.errors import UsageError

from .trace import Call, is_spec, trace

IMAGES = 2
BEFORE_VALUES = 9
"""Arguments of Triton's launcher before the kernel's own: grid, stream, what is known of the code, hooks."""


class _Driver:
    """Stands in for a GPU's driver."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


class _Compiled:
    """Stands in for a compiled kernel."""

    function = packed_metadata = None

    def launch_metadata(self, *_: Any) -> None: ...

    def run(self, *_: Any) -> None: ...

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        # As Triton's does.
        return lambda *values: self.run(*grid, *(None,) * (BEFORE_VALUES - 3), *values)


def _compile_nothing(function: JITFunction, key: Any, _signature: Any, device: int, *_: Any) -> _Compiled:
    function.device_caches[device][0][key] = kernel = _Compiled()
    return kernel


@contextlib.contextmanager
def launches_do_nothing() -> Iterator[None]:
    """Within the block Triton launches on CPU tensors, and nothing happens. UsageError if Triton interprets."""
    if INTERPRETED.value:
        raise UsageError("Triton interprets in this process: unset TRITON_INTERPRET")
    before = driver._active  # the attribute would ask for a GPU
    driver.set_active(_Driver())
    try:
        with mock.patch.object(JITFunction, "_do_compile", _compile_nothing):
            yield
    finally:
        driver._active = before


def _seconds(call: Call, with_grad: bool) -> float:
    """CPU time of one call: the least of several times."""

    def tensor(spec: Any) -> Any:
        if not is_spec(spec):
            return spec
        x = torch.empty_strided(*spec[:2], dtype=spec[2]).zero_()
        return x.requires_grad_(with_grad and spec[2].is_floating_point)

    operator = operators[call.operator]
    arguments = tree_map(tensor, list(call.arguments), is_leaf=is_spec)
    found = []
    with torch.set_grad_enabled(with_grad):
        for repeat in range(8):
            start = time.thread_time()
            for _ in range(5):
                operator(*arguments)
            if repeat:  # the first one compiles
                found.append((time.thread_time() - start) / 5)
    return min(found)


def python_seconds(model: str, task: str, size: int, dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """Per operator how often a step calls it, and the CPU time of all its calls."""
    by_call: dict[str, tuple[Call, int]] = {}
    for call in trace(model, task, IMAGES, size, dtype):
        if call.ours:
            key = repr((call.name, call.arguments))
            by_call[key] = call, by_call.get(key, (call, 0))[1] + 1
    found: dict[str, dict[str, float]] = {}
    with launches_do_nothing():
        for call, times in by_call.values():
            name = call.operator
            with_grad = task == "training" and not name.endswith("_backward")
            row = found.setdefault(name, {"times": 0, "seconds": 0.0})
            row["times"] += times
            row["seconds"] += times * _seconds(call, with_grad)
    return found


def sums(rows: dict[str, dict[str, float]]) -> Sequence[float]:
    """Seconds of all operators, and of the attentions."""
    return (
        sum(row["seconds"] for row in rows.values()),
        sum(row["seconds"] for name, row in rows.items() if "attention" in name),
    )
