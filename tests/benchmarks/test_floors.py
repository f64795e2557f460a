"""`python -m benchmarks.floors` against its committed figures: one Triton version always compiles the same."""

import json

import pytest
import torch
from support import ROOT, command

from benchmarks import floors
from benchmarks.measure import RESULTS, describe_machine
from models.ops import launch_triton

COMMITTED = json.loads((RESULTS / "floors-debiformer_tiny-sm90-cpu.json").read_text())
HERE, MADE_WITH = (
    {package: machine[package] for package in ("triton", "torch", "timm")}
    for machine in (describe_machine(torch.device("cpu")), COMMITTED["machine"])
)
same_versions = pytest.mark.skipif(HERE != MADE_WITH, reason=f"made with {MADE_WITH}")


def measured(folder, *argv):
    """The result of a run of its own: in this process Triton interprets."""
    argv = "-m", "benchmarks.floors", "--write", "--results", folder, *argv
    done = command(*argv, TRITON_INTERPRET="0", timeout=3000, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "floors-debiformer_tiny-sm90-cpu.json").read_text())["tasks"]


def of_others(task):
    """What PyTorch's operators cost."""
    total = task["summary"]
    return total["bytes_of_others"], total["kernels"] - total["launches"]


@same_versions
def test_some_launches_and_what_others_move_cost_what_is_committed(tmp_path):
    task, committed = measured(tmp_path, "--tasks", "inference", "--kernels", "masked.forward")["inference"], COMMITTED
    expected = [row for row in committed["tasks"]["inference"]["rows"] if row["kernel"] == "masked.forward"]
    assert task["rows"] == expected
    assert len(expected) == 4
    assert of_others(task) == of_others(committed["tasks"]["inference"])


@same_versions
@pytest.mark.slow
def test_every_launch_costs_what_is_committed(tmp_path):
    for task, result in measured(tmp_path).items():
        committed = COMMITTED["tasks"][task]
        assert result["rows"] == committed["rows"]
        assert result["summary"] == committed["summary"]


def test_committed_sums_are_those_of_their_rows_and_within_bounds():
    for task, milliseconds in (("inference", 0.75), ("training", 2.8)):
        total, rows = COMMITTED["tasks"][task]["summary"], COMMITTED["tasks"][task]["rows"]
        seconds = sum(row["times"] * floors.time_of(row) for row in rows if "attention" in row["operator"])
        assert total["attention_seconds"] == pytest.approx(seconds)
        assert 1e3 * seconds <= milliseconds
        assert not any(row["spilled"] for row in rows)


def test_launchers_table_holds_blocks_of_the_committed_figures():
    """So that none of them spills: the figures say how many bytes each one does."""
    seen = {
        (row["kernel"], row["class"], tuple(row["block"])) for t in COMMITTED["tasks"].values() for row in t["rows"]
    }
    table = launch_triton.read_table(launch_triton.TABLE)
    entries = {(kernel, name, tuple(block)) for kernel, known in table.items() for name, block in known.items()}
    assert entries
    assert entries <= seen
