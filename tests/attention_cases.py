"""Attentions of many shapes, and how far a backend is from the truth.

A case is a tuple of sizes; `inputs` draws its tensors, `call` runs it. Cases run in Triton's interpreter where there is
no GPU, and compiled on the GPU where there is one.
"""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from models import ops

DEVICES = [pytest.param("cuda", marks=pytest.mark.gpu) if torch.cuda.is_available() else "cpu"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Routed(NamedTuple):
    """Sizes of a routed attention: rows and columns of windows, of query tokens and of key tokens per window."""

    images: int
    windows: tuple[int, int]
    queries: tuple[int, int]
    keys: tuple[int, int]
    heads: int
    head_dim: int
    topk: int

    def inputs(self, seed: int) -> tuple[list[Tensor], tuple[Tensor]]:
        """float64 q, k, v; idx."""
        draw = torch.Generator().manual_seed(seed)
        sides = [[n * tokens for n, tokens in zip(self.windows, w, strict=True)] for w in (self.queries, self.keys)]
        q, k, v = (
            torch.randn(self.images, *side, self.heads * self.head_dim, generator=draw, dtype=torch.float64)
            for side in (sides[0], sides[1], sides[1])
        )
        windows = self.windows[0] * self.windows[1]
        return [q, k, v], (torch.rand(self.images, windows, windows, generator=draw).topk(self.topk).indices,)

    def call(self, tensors: list[Tensor], fixed: tuple, backend: str, **options: int) -> Tensor:
        scale = self.head_dim**-0.5
        return ops.routed_attention(*tensors, *fixed, self.windows, self.heads, scale, backend=backend, **options)


class Deformable(NamedTuple):
    """Sizes of a deformable attention; `table` is the map (Qh, Qw) the table is made for."""

    images: int
    tokens: tuple[int, int]
    agents: tuple[int, int]
    heads: int
    head_dim: int
    groups: int
    table: tuple[int, int]

    def inputs(self, seed: int) -> tuple[list[Tensor], tuple[()]]:
        """float64 q, k, v, table and positions, some of them at the map's ends."""
        draw = torch.Generator().manual_seed(seed)
        c = self.heads * self.head_dim
        shapes = [(self.images, *side, c) for side in (self.tokens, self.agents, self.agents)]
        shapes.append((self.heads, *(2 * side - 1 for side in self.table)))
        tensors = [torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes]
        positions = torch.rand(self.images, *self.agents, self.groups, 2, generator=draw, dtype=torch.float64)
        return [*tensors, (positions * 2.4 - 1.2).clamp(-1, 1)], ()

    def call(self, tensors: list[Tensor], fixed: tuple, backend: str, **options: int) -> Tensor:
        return ops.deformable_attention(*tensors, self.heads, self.head_dim**-0.5, backend=backend, **options)


ROUTED = [
    pytest.param(Routed(2, (2, 2), (5, 1), (1, 7), 2, 16, 2), id="odd-windows"),
    pytest.param(Routed(1, (3, 3), (1, 1), (2, 2), 2, 24, 9), id="one-query-all-windows"),
    pytest.param(Routed(1, (7, 1), (2, 3), (1, 1), 1, 32, 5), id="one-key"),
    pytest.param(Routed(2, (2, 2), (17, 1), (4, 5), 1, 48, 1), id="one-window"),
    pytest.param(Routed(1, (2, 2), (6, 6), (9, 8), 2, 16, 1), id="one-large-window"),
    pytest.param(Routed(2, (2, 2), (17, 1), (3, 6), 2, 16, 3), id="many-queries"),
    pytest.param(Routed(1, (2, 3), (3, 1), (2, 1), 2, 128, 4), id="wide-heads"),
    pytest.param(Routed(2, (3, 7), (2, 2), (2, 3), 2, 32, 6), id="few-queries"),
    pytest.param(Routed(1, (8, 8), (1, 1), (1, 2), 1, 16, 5), id="one-query-of-64-windows"),
]
DEFORMABLE = [
    pytest.param(Deformable(2, (5, 4), (2, 3), 2, 16, 1, (5, 4)), id="on-cells"),
    pytest.param(Deformable(1, (7, 6), (3, 6), 2, 24, 2, (4, 4)), id="steps-below-a-cell"),
    pytest.param(Deformable(1, (4, 5), (2, 4), 4, 16, 2, (7, 6)), id="steps-above-a-cell"),
    pytest.param(Deformable(3, (1, 21), (1, 12), 1, 48, 1, (3, 1)), id="one-row"),
    pytest.param(Deformable(1, (6, 6), (5, 4), 1, 128, 1, (6, 6)), id="wide-heads"),
]


def on_device(inputs: tuple[list[Tensor], tuple], device: str) -> tuple[list[Tensor], tuple]:
    tensors, fixed = inputs
    return [x.to(device) for x in tensors], tuple(None if x is None else x.to(device) for x in fixed)


def outputs_and_gradients(
    case: Routed | Deformable,
    backend: str,
    dtype: torch.dtype,
    device: str = "cpu",
    computed_in: torch.dtype | None = None,
    **options: int,
) -> list[Tensor]:
    """Output, then gradients of all tensors, of inputs that `dtype` can represent; computed in it or in another type.

    Tables and positions are in float32 at least, as in the models.
    """
    computed_in = computed_in or dtype
    tensors, fixed = on_device(case.inputs(0), device)
    exact, exactly = (torch.promote_types(t, torch.float32) for t in (dtype, computed_in))
    types = [(dtype, computed_in)] * 3 + [(exact, exactly)] * (len(tensors) - 3)
    tensors = [x.to(low).to(high).requires_grad_() for x, (low, high) in zip(tensors, types, strict=True)]
    out = case.call(tensors, fixed, backend, **options)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [out.detach(), *torch.autograd.grad(out, tensors, grad.to(dtype).to(device, computed_in))]


def truth(case: Routed | Deformable, dtype: torch.dtype) -> list[Tensor]:
    """The reference, computed in float64."""
    return outputs_and_gradients(case, "reference", dtype, computed_in=torch.float64)


def error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference."""
    return float((actual.cpu().double() - expected).norm())
