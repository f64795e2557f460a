"""`python -m benchmarks.runtimes` from end to end, with models that are exported fast."""

import json

import pytest

from benchmarks import runtimes
from runtime.errors import UsageError

SMALL = "mobilenetv3_small_050"
RUNTIMES = tuple(key for key, runtime in runtimes.RUNTIMES.items() if runtime.installed)


@pytest.mark.parametrize("chosen", [("onnxruntime", "pytorch"), pytest.param(RUNTIMES, marks=pytest.mark.slow)])
def test_command_measures_and_writes(chosen, tmp_path):
    options = ("--models", SMALL, "--batch_sizes", "1", "2", "--repeats", "2", "--threads", "1")
    runtimes.main([*options, "--runtimes", *chosen, "--write", "--results", str(tmp_path)])
    rows = json.loads((tmp_path / "runtimes-cpu.json").read_text())["rows"]
    assert [(row["batch"], row["runtime"]) for row in rows] == [(b, r) for b in (1, 2) for r in chosen]
    assert all(len(row["seconds"]) == 2 for row in rows)
    page = (tmp_path / "runtimes-cpu.md").read_text()
    assert page.count("| 1.00 |") == 2 * len(chosen)


def test_speed_is_compared_with_the_last_model_in_the_same_runtime(monkeypatch):
    monkeypatch.setattr(runtimes, "machine_line", lambda machine: "a machine")
    times = {("ours", "a"): [1.0, 3.0, 2.0], ("ours", "b"): [4.0], ("theirs", "a"): [3.0], ("theirs", "b"): [2.0]}
    rows = [{"model": m, "runtime": r, "batch": 8, "seconds": seconds} for (m, r), seconds in times.items()]
    page = runtimes.report({"machine": {}, "rows": rows})
    assert "| ours | a | 8 | 2000.0 | 1.50 |" in page
    assert "| ours | b | 8 | 4000.0 | 0.50 |" in page


def test_what_is_not_there_is_named(monkeypatch):
    with pytest.raises(UsageError, match="timm knows no such model"):
        runtimes.main(["--models", "swin_tini"])
    monkeypatch.setattr(runtimes, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="--runtimes openvino is not installed: pip install openvino"):
        runtimes.main(["--runtimes", "openvino"])
