"""What is timed is what is said to be timed."""

import os

import pytest
import timm
import torch
from torch import nn

from benchmarks.memory import peak_memory
from benchmarks.model_table import count_macs
from benchmarks.workloads import (
    Case,
    _OnBackend,
    build_step,
    create,
    forward_flops,
    is_ours,
    layer_floor,
    step_flops,
    ways_of,
)
from models import MODEL_NAMES
from models.layers import DepthwiseConv, MapLinear, PointwiseConv
from models.ops.backend import ENVIRONMENT, use_backend

CPU = torch.device("cpu")
NANO = Case("debiformer_nano", 2, input_size=64)


@pytest.mark.parametrize("task", ["inference", "training"])
@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_build_step_runs(task, backend, dtype):
    step = build_step(Case("debiformer_nano", 2, task, backend, dtype, input_size=64), CPU)
    step()
    step()


def test_build_step_times_a_fused_model_fused(monkeypatch):
    fused = []
    monkeypatch.setattr("models.fuse", lambda model: fused.append(model) or model)
    build_step(NANO, CPU)()
    assert fused == []
    build_step(Case("debiformer_nano", 2, input_size=64, mode="fused"), CPU)()
    assert len(fused) == 1


def test_build_step_of_training_changes_the_weights(monkeypatch):
    model = timm.create_model("debiformer_nano")
    monkeypatch.setattr("benchmarks.workloads.create", lambda case: model)
    step = build_step(Case("debiformer_nano", 2, "training", input_size=64), CPU)
    before = model.head.weight.detach().clone()
    step()
    assert not torch.equal(before, model.head.weight)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_create_makes_peers_for_the_size_measured():
    with torch.device("meta"):
        swin = create(Case("swin_tiny_patch4_window7_224", 1, input_size=448))
        assert swin(torch.empty(1, 3, 448, 448)).shape == (1, 1000)


def test_step_flops_counts_what_a_step_does():
    macs = count_macs(timm.create_model("debiformer_nano"))
    assert forward_flops(NANO) == 2 * macs
    assert step_flops(NANO) == 2 * 2 * macs
    assert step_flops(Case("debiformer_nano", 2, "training", input_size=64)) == 3 * 2 * 2 * macs
    larger = forward_flops(Case("convnext_tiny", 1, input_size=448))
    assert larger == pytest.approx(4 * forward_flops(Case("convnext_tiny", 1)), rel=1e-3)


def test_is_ours_holds_for_models_with_this_attention_only():
    assert [name for name in MODEL_NAMES if not is_ours(name)] == ["maxvit_stl"] * ("maxvit_stl" in MODEL_NAMES)
    assert not is_ours("swin_tiny_patch4_window7_224")


def test_build_step_leaves_the_environment_as_before(monkeypatch):
    monkeypatch.setenv(ENVIRONMENT, "torch")
    with use_backend("reference"):
        assert os.environ[ENVIRONMENT] == "reference"
    assert os.environ[ENVIRONMENT] == "torch"
    monkeypatch.delenv(ENVIRONMENT)
    with use_backend("reference"):
        pass
    assert ENVIRONMENT not in os.environ


def test_build_step_compiles_every_backend_for_itself():
    """Graphs hold the backend as a constant, so that of one must not run for another."""
    graphs = []

    def keep(graph, _inputs):
        names = {str(node.target) for node in graph.graph.nodes}
        graphs.append({name for name in names if "debiformer.routed" in name})
        return graph

    model = timm.create_model("debiformer_nano").eval()
    torch.compiler.reset()
    with torch.no_grad():
        for backend in ("torch", "reference"):
            with use_backend(backend):
                torch.compile(_OnBackend(model, backend), backend=keep, fullgraph=True)(torch.randn(1, 3, 64, 64))
    fused, plain = graphs
    assert fused
    assert not plain


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(4, 6), (2, 5, 4)),
        (MapLinear(4, 6), (2, 3, 3, 4)),
        (PointwiseConv(4, 6, bias=False), (2, 3, 3, 4)),
        (nn.Conv2d(4, 6, 1), (2, 4, 3, 3)),
    ],
)
def test_ways_of_a_layer_compute_what_it_computes(layer, shape):
    x = torch.randn(shape)
    expected = layer(x)
    if type(layer) is nn.Conv2d:
        expected = expected.permute(0, 2, 3, 1)
    ways = ways_of(layer, x)
    torch.testing.assert_close(ways["as_linear"](), expected)
    rows = ways["as_convolution"]().permute(0, 2, 3, 1)
    torch.testing.assert_close(rows.reshape(expected.shape), expected)


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 6, 3), nn.Conv2d(4, 6, 1, stride=2), DepthwiseConv(4, 3)])
def test_other_convolutions_have_one_way(layer):
    assert ways_of(layer, torch.randn(2, 4, 5, 5)) == {}


def test_layer_floor_times_every_layer_in_every_way(monkeypatch):
    timed = []
    seconds_of = {"as_run": 3.0, "as_linear": 2.0, "as_convolution": 1.0}

    def seconds(tasks, *_):
        timed.append(set(tasks))
        return {name: [seconds_of[name]] for name in tasks}

    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 1), nn.Flatten(), nn.LazyLinear(7))
    model(torch.randn(1, 3, 8, 8))
    monkeypatch.setattr("benchmarks.workloads.create", lambda case: model)
    monkeypatch.setattr("benchmarks.workloads.interleaved_seconds", seconds)
    floor = layer_floor(Case("any", 1, input_size=8), CPU, repeats=1)
    assert floor == {"as_run": 9.0, "as_linear": 7.0, "as_convolution": 5.0, "fastest": 5.0}
    assert timed == [{"as_run"}, set(seconds_of), set(seconds_of)]


def test_peak_memory_of_training_is_above_that_of_inference():
    training = peak_memory(Case("debiformer_nano", 16, "training", input_size=64), CPU)
    assert training > peak_memory(Case("debiformer_nano", 16, input_size=64), CPU) > 0
