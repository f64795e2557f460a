"""What all benchmarks share."""

import json
import time
from functools import partial

import pytest
import torch

from benchmarks.markdown import replace_between, table
from benchmarks.measure import (
    copy_bandwidth,
    describe_machine,
    interleaved_seconds,
    machine_line,
    matrix_rate,
    read_result,
    write_result,
)
from benchmarks.memory import peak_memory
from runtime.errors import UsageError

CPU = torch.device("cpu")


def test_interleaved_seconds_has_tasks_take_turns():
    called = []
    tasks = {name: lambda name=name: called.append(name) for name in "ab"}
    seconds = interleaved_seconds(tasks, repeats=3, device=CPU, warmup=2)
    assert called == [*"aabb", *"ababab"]
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}


def test_interleaved_seconds_are_those_of_one_call():
    """Also where several are made before the clock is read."""
    called = []

    def task():
        called.append(1)
        time.sleep(0.002)

    (seconds,) = interleaved_seconds({"task": task}, repeats=1, device=CPU, warmup=0, at_least=0.02)["task"]
    assert len(called) > 2
    assert 0.002 <= seconds < 0.02 * len(called)


def test_matrix_rate_and_copy_bandwidth_count_what_was_done(monkeypatch):
    """A second per call: the rates are the counts."""
    monkeypatch.setattr("benchmarks.measure._seconds", lambda task, calls, device: 1.0)
    assert copy_bandwidth(CPU, repeats=1, size=4096) == 2 * 4096
    assert matrix_rate(CPU, torch.float32, repeats=1, side=32) == 2 * 32**3


def test_matrix_rate_computes_the_product_in_both_libraries(monkeypatch):
    found = []
    monkeypatch.setattr(
        "benchmarks.measure.interleaved_seconds",
        lambda tasks, *_: {name: found.append(task()) or [1.0] for name, task in tasks.items()},
    )
    matrix_rate(CPU, torch.float64, repeats=1, side=16)
    matmul, conv = found
    assert conv.numel() == matmul.numel()


def ones(device):
    return partial(torch.ones, 64 * 2**20, dtype=torch.uint8, device=device)


def test_peak_memory_counts_what_is_freed_again():
    assert 64 * 2**20 <= peak_memory(ones, CPU) + 2**20 < 128 * 2**20


def test_table_aligns_its_columns():
    shown = table(("name", "ms"), [("a", "1"), ("b", "2")])
    assert shown == "| name | ms |\n| --- | ---: |\n| a | 1 |\n| b | 2 |"


def test_replace_between_replaces_what_stands_between_marks(tmp_path):
    path = tmp_path / "page.md"
    path.write_text("before\n<!-- a -->\nold\n<!-- b -->\nafter\n")
    replace_between(path, "<!-- a -->", "<!-- b -->", "new")
    assert path.read_text() == "before\n<!-- a -->\nnew\n<!-- b -->\nafter\n"


@pytest.mark.parametrize("text", ["", "<!-- a -->", "<!-- b -->", "<!-- b --><!-- a -->"])
def test_replace_between_leaves_a_file_without_marks_alone(tmp_path, text):
    path = tmp_path / "page.md"
    path.write_text(text)
    with pytest.raises(UsageError, match="no place for this table"):
        replace_between(path, "<!-- a -->", "<!-- b -->", "new")
    assert path.read_text() == text


def test_read_result_reads_what_write_result_wrote(tmp_path):
    result = {"machine": describe_machine(CPU), "rows": [1.5]}
    write_result("speed", result, "# Page", tmp_path / "results")
    assert read_result("speed", "cpu", tmp_path / "results") == result
    assert (tmp_path / "results" / "speed-cpu.md").read_text() == "# Page\n"
    assert read_result("speed", "cuda", tmp_path / "results") is None


def test_describe_machine_tells_what_instructions_it_may_use(monkeypatch):
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    assert "ATEN_CPU_CAPABILITY=avx2" in machine_line(describe_machine(CPU))


def test_describe_machine_tells_what_it_is():
    machine = json.loads(json.dumps(describe_machine(CPU)))
    assert machine["torch"] == torch.__version__
    assert machine["threads"] == torch.get_num_threads()
    assert machine["gpu"] is None
    line = machine_line(machine)
    assert machine["cpu"] in line
    assert machine["date"] in line
    assert "None" not in line
