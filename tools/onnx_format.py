"""A classifier as one ONNX file.

This project's models are exported module by module and chained. The sides of a map are then simple terms of those of
one module's input; as terms of the image's, through all stages, torch's symbolic shapes would take hours over them.
"""

import contextlib
import io
import warnings
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from models.backbone import Backbone
from models.fusion import fuse
from models.layers import QKV

if TYPE_CHECKING:
    import onnx_ir

WINDOWS_TRACED = (17, 25)
"""Sides of the map that a module is traced with, in windows: in a trace no side of anything may be one, or equal
another by accident, as it would be taken to be so always."""


class Classifier(nn.Module):
    """What follows a model's last stage: (B, C, H, W) -> logits (B, classes)."""

    def __init__(self, model: Backbone) -> None:
        super().__init__()
        self.norm, self.pool, self.head = model.norm, model.global_pool, model.head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.norm(x)))


def for_export(model: Backbone) -> Backbone:
    """A copy in evaluation mode with the same outputs: fused, and queries, keys and values from layers of their own."""
    model = fuse(model)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, QKV):
                setattr(module, name, child.apart())
    return model


def in_sequence(model: Backbone) -> Iterator[nn.Module]:
    """The modules that a model in evaluation mode runs, each on what the one before it returned."""
    for downsample, blocks in zip(model.downsample_layers, model.stages, strict=True):
        yield from chain([downsample], blocks)
    yield Classifier(model)


def write(model: nn.Module, size: int, path: Path) -> None:
    """Write `images` (batch, 3, height, width) -> `logits` (batch, classes), for any batch size.

    And for any height and width, where the model is this project's; others' take images of size x size pixels.
    torch.onnx.OnnxExporterError if torch cannot export the model.
    """
    with exporting():
        if isinstance(model, Backbone):
            modules = with_examples(for_export(model))
            program = chained(exported(module, example, varied=(0, 2, 3)) for module, example in modules)
        else:
            program = exported(model, torch.zeros(2, 3, size, size), varied=(0,))
    save(program, ("height", "width") if isinstance(model, Backbone) else (size, size), path)


@contextlib.contextmanager
def exporting() -> Iterator[None]:
    """Within the block, torch.onnx says nothing, and finds no fused attention, which would leave strides in a graph."""
    quiet = contextlib.redirect_stdout(io.StringIO())
    with sdpa_kernel(SDPBackend.MATH), quiet, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def save(program: "onnx_ir.Model", sides: tuple[str | int, str | int], path: Path) -> None:
    """Write a program of one input and one output: `images` (batch, channels, *sides) -> `logits` (batch, ...)."""
    import onnx_ir
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass, RemoveUnusedNodesPass

    images, logits = program.graph.inputs[0], program.graph.outputs[0]
    images.name, logits.name = "images", "logits"
    images.shape = onnx_ir.Shape(["batch", images.shape[1], *sides])
    logits.shape = onnx_ir.Shape(["batch", *logits.shape[1:]])
    ClearMetadataAndDocStringPass()(program)  # where each node was in whose source files
    RemoveUnusedNodesPass()(program)  # and constants, which ONNX Runtime would warn of
    onnx_ir.save(program, path)


def chained(programs: Iterable["onnx_ir.Model"]) -> "onnx_ir.Model":
    """One program that runs these one after the other; each has one input and one output."""
    import onnx_ir

    programs = iter(programs)
    whole = next(programs)
    _rename(whole.graph, "0")
    for number, program in enumerate(programs, start=1):
        graph = program.graph
        _rename(graph, str(number))
        onnx_ir.convenience.replace_all_uses_with(graph.inputs[0], whole.graph.outputs[0])
        nodes, initializers = list(graph), list(graph.initializers.values())
        output = graph.outputs[0]
        graph.outputs.clear()
        graph.remove(nodes)
        graph.initializers.clear()
        whole.graph.extend(nodes)
        for value in initializers:
            whole.graph.register_initializer(value)
        whole.graph.outputs[0] = output
    return whole


def _rename(graph: "onnx_ir.Graph", prefix: str) -> None:
    """Give everything names of its own; forget shapes, whose symbols mean something else in other programs."""
    nodes = list(graph.all_nodes())  # those of branches, too
    for value in [*graph.inputs, *graph.initializers.values(), *(value for node in graph for value in node.outputs)]:
        value.name = f"{prefix}.{value.name}"
    for value in (value for node in nodes for value in node.outputs):
        if value is not graph.outputs[0]:
            value.shape = None
    for node in nodes:
        node.name = f"{prefix}.{node.name}"


def with_examples(model: Backbone) -> Iterator[tuple[nn.Module, Tensor]]:
    """The modules `in_sequence`, each with an input to trace it with."""
    x = torch.zeros(2, model.in_chans, 64, 64)
    for module in in_sequence(model):
        height, width = (windows * model.n_win + 1 for windows in WINDOWS_TRACED)
        yield module, x.new_zeros(*x.shape[:2], height, width)
        x = module(x)


def exported(module: nn.Module, example: Tensor, varied: Sequence[int]) -> "onnx_ir.Model":
    """A module as a program, for any length of the `varied` axes of its input."""
    shapes = dict.fromkeys(varied, torch.export.Dim.DYNAMIC)
    return torch.onnx.export(module, (example,), dynamo=True, verbose=False, dynamic_shapes=(shapes,)).model
