"""`python -m benchmarks.ops`: its counts, and the command from end to end."""

import json

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import ops as bench
from runtime.errors import UsageError

CPU = torch.device("cpu")
ROUTED = bench.Attention(
    *("routed_attention", (2, 4, 3, 32), (2, 4, 5, 32), ((2, 4, 3),)), num_heads=2, scale=1, windows=(4, 1)
)
DEFORMABLE = bench.Attention(
    *("deformable_attention", (2, 6, 5, 32), (2, 3, 2, 32)), extra=((4, 11, 9), (2, 3, 2, 2, 2)), num_heads=4, scale=1
)


def test_counts_of_routed_attention_by_hand():
    # 24 queries read 3 windows of 5 keys each: 2 x 24 x 15 x 32 multiply-accumulates.
    assert ROUTED.flops("forward") == 2 * 2 * 24 * 15 * 32 == 46080
    q, k, idx = 24 * 32 * 4, 40 * 32 * 4, 24 * 8
    assert ROUTED.bytes("forward", itemsize=4) == q + k + k + idx + q == 16576
    gradients = q + q + k + k  # of the output, of q, k and v
    assert ROUTED.bytes("forward + backward", itemsize=4) == 16576 + (q + k + k + idx) + gradients


def test_counts_of_deformable_attention_by_hand():
    # 60 tokens read 6 agents each.
    assert DEFORMABLE.flops("forward") == 2 * 2 * 60 * 6 * 32 == 46080
    q, k, table = 60 * 32 * 2, 12 * 32 * 2, 4 * 99 * 2
    positions = 2 * 3 * 2 * 2 * 2 * 4  # always float32
    assert DEFORMABLE.bytes("forward", itemsize=2) == 2 * q + 2 * k + table + positions
    inputs = q + 2 * k + table + positions
    assert DEFORMABLE.bytes("forward + backward", itemsize=2) == (inputs + q) + inputs + q + inputs


@pytest.mark.parametrize("attention", [ROUTED, DEFORMABLE], ids=lambda a: a.name)
@pytest.mark.parametrize("direction", bench.DIRECTIONS)
def test_counts_are_those_of_the_operators(attention, direction):
    run = attention.build(direction, "torch", CPU, torch.float32)
    with FlopCounterMode(display=False) as counter:
        run()
    assert counter.get_total_flops() == attention.flops(direction)


@pytest.mark.parametrize("attention", [ROUTED, DEFORMABLE], ids=lambda a: a.name)
def test_every_input_that_learns_gets_a_gradient(attention):
    gradients = attention.build("forward + backward", "torch", CPU, torch.float32)()
    _, learnt = attention.inputs(CPU, torch.float32)
    assert [g.shape for g in gradients] == [x.shape for x in learnt]
    assert len(learnt) == (3 if attention is ROUTED else 5)


def test_shapes_are_those_that_the_model_runs():
    with torch.device("meta"):
        found = bench.attentions_of(timm.create_model("debiformer_tiny"), torch.empty(8, 3, 224, 224))
    assert [attention.name for attention in found[:3]] == ["routed_attention"] * 2 + ["deformable_attention"]
    tokens, agents, read = found[:3]  # stage 1: 7x7 windows of 8x8 tokens, one of which is read; 7x7 agents
    assert (tokens.q, tokens.k, tokens.keys_per_query) == ((8, 56, 56, 64), (8, 56, 56, 64), 64)
    assert (agents.q, agents.k, agents.keys_per_query) == ((8, 7, 7, 64), (8, 56, 56, 64), 4 * 64)
    assert (read.q, read.k, read.keys_per_query) == ((8, 56, 56, 64), (8, 7, 7, 64), 49)
    assert read.extra == ((2, 111, 111), (8, 7, 7, 1, 2))
    assert len(found) == 3 * 3 + 1  # blocks of a stage are alike; the last has agents only, which read the whole map


def test_equal_shapes_of_several_models_are_measured_once():
    names = ("debiformer_tiny", "debiformer_small")
    found = bench.all_attentions(names, batch_size=1, dense=True)
    assert [where for where in found.values() if where == list(names)]
    assert len([where for where in found.values() if where == ["debiformer_small dense"]]) >= 10


def test_command_measures_and_writes(tmp_path, capsys):
    options = ("--models", "debiformer_nano", "--no_dense", "--batch_size", "1", "--repeats", "1", "--threads", "1")
    bench.main([*options, "--device", "cpu", "--write", "--results", str(tmp_path)])
    result = json.loads((tmp_path / "ops-cpu.json").read_text())
    assert {row["backend"] for row in result["rows"]} == {"torch", "reference"}
    assert {row["direction"] for row in result["rows"]} == set(bench.DIRECTIONS)
    for row in result["rows"]:
        roofs = {"bandwidth": row["bytes"] / result["copy_bandwidth"], "matrix": row["flops"] / result["matrix_rate"]}
        assert row["binds"] == max(roofs, key=roofs.get)
        assert row["share"] == pytest.approx(max(roofs.values()) / row["seconds"][0])
    page = (tmp_path / "ops-cpu.md").read_text()
    assert all(" | ".join(bench.cells(row)) in page for row in result["rows"])
    assert capsys.readouterr().out


def test_another_projects_model_is_refused():
    with pytest.raises(UsageError, match="not a model of this project"):
        bench.main(["--models", "convnext_tiny"])
