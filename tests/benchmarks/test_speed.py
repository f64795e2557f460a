"""`python -m benchmarks.speed` from end to end, on a small model."""

import json

import pytest
import timm
import torch
from support import ROOT, command

from benchmarks import report, speed
from benchmarks.measure import read_result
from benchmarks.plots import TOP1
from runtime.errors import UsageError

NANO = (*("--models", "debiformer_nano"), *("--batch_size", "2", "--repeats", "1", "--threads", "1", "--device", "cpu"))


@pytest.fixture
def run(tmp_path, capsys):
    """Runs the command with --write; returns what it printed and the folder."""

    def run(*argv):
        speed.main([*NANO, *argv, "--write", "--results", str(tmp_path), "--images", str(tmp_path)])
        return capsys.readouterr().out, tmp_path

    return run


@pytest.mark.slow
def test_speed_measures_and_writes_everything(run):
    out, folder = run("--modes", "eager", "fused", "--backends", "torch", "reference", "--input_size", "64")
    result = json.loads((folder / "speed-cpu.json").read_text())
    steps = [(row["task"], row["mode"], row["backend"]) for row in result["rows"]]
    assert steps == [
        (task, mode, backend)
        for task, mode in (("inference", "eager"), ("inference", "fused"), ("training", "eager"))
        for backend in ("torch", "reference")
    ]
    for row in result["rows"]:
        assert row["peak_memory"] > 0
        (seconds,) = row["seconds"]
        assert row["images_per_second"] == pytest.approx(2 / seconds)
        assert row["mfu"] == pytest.approx(row["flops"] / seconds / result["matrix_rate"])
    assert set(result["large_maps"]) == {"bra_layer", "dense"}
    assert set(result["floors"]) == {"debiformer_nano"}
    page = (folder / "speed-cpu.md").read_text()
    assert page in out + "\n"
    for row in result["rows"]:
        assert f"| {report.label(row)} | {row['task']} | {row['mode']} |" in page


def test_resolution_sweep_measures_time_and_memory(run):
    _, folder = run("--sweep", "resolution", "--input_size", "64", "96", "--tasks", "inference")
    rows = json.loads((folder / "resolution-cpu.json").read_text())["rows"]
    assert [row["input_size"] for row in rows] == [64, 96]
    assert rows[1]["flops"] > 2 * rows[0]["flops"]
    assert (folder / "resolution-cpu.png").read_bytes().startswith(b"\x89PNG")


def test_topk_sweep_measures_time_and_memory(run):
    _, folder = run("--sweep", "topk", "--topk", "1", "4", "--tasks", "inference", "--input_size", "64", "--no_memory")
    rows = json.loads((folder / "topk-cpu.json").read_text())["rows"]
    assert [(row["model_kwargs"]["agent_topk"], row["backend"]) for row in rows] == [
        ([k, k, k, 4], backend) for k in (1, 4) for backend in ("torch", "reference")
    ]
    assert rows[-1]["flops"] > rows[0]["flops"]
    assert (folder / "topk-cpu.png").exists()


def test_deterministic_sweep_measures_both_modes(run):
    _, folder = run("--sweep", "deterministic", "--tasks", "training", "--input_size", "64", "--no_memory")
    rows = json.loads((folder / "deterministic-cpu.json").read_text())["rows"]
    assert [(row["mode"], row["backend"]) for row in rows] == [("eager", "torch"), ("deterministic", "torch")]
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("computes", [True, False])
def test_plan_has_the_models_of_the_targets_in_bf16_where_the_processor_computes_in_it(computes, monkeypatch):
    monkeypatch.setattr(speed, "computes_bf16", lambda: computes)
    cases = speed.plan(speed.make_parser().parse_args([]), torch.device("cpu"))
    found = [(case.task, case.model, case.backend, case.mode) for case in cases if case.dtype == "bf16"]
    models = [(report.OURS, "torch", "eager"), (report.PEER, None, "eager")]
    assert found == [(task, *model) for task in ("inference", "training") for model in models] * computes


def test_results_of_another_processor_stand_beside(run):
    _, folder = run("--sweep", "topk", "--topk", "1", "--tasks", "inference", "--no_memory", "--processor", "abacus")
    assert (folder / "topk-cpu-abacus.md").exists()
    assert not (folder / "topk-cpu.md").exists()


def test_accuracy_plot_knows_every_model_of_its_sweep():
    assert set(speed.SIZE_MATES) <= set(TOP1)
    assert all(timm.is_model(name) for name in speed.SIZE_MATES)


@pytest.mark.slow
def test_speed_runs_compiled_steps(run):
    _, folder = run("--modes", "compiled", "--backends", "torch", "--input_size", "64", "--no_memory", "--no_floor")
    rows = json.loads((folder / "speed-cpu.json").read_text())["rows"]
    assert [(row["task"], row["mode"]) for row in rows] == [("inference", "compiled"), ("training", "compiled")]


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["--models", "debiformer_tyny"], "did you mean debiformer_tiny"),
        (["--batch_size", "0"], "--batch_size must be at least 1"),
        (["--repeats", "-1"], "--repeats must be at least 1"),
        (["--threads", "0"], "--threads must be at least 1"),
        (["--input_size", "8"], "--input_size must be at least 32"),
        (["--device", "abacus"], "not a device"),
        (["--sweep", "topk", "--topk", "5"], "has 4 windows"),
        (["--sweep", "topk", "--models", "convnext_tiny"], "is no DeBiFormer"),
        (["--sweep", "topk", "--models", "debiformer_nano", "debiformer_tiny"], "takes one model"),
    ],
)
def test_speed_names_mistakes(argv, complaint):
    with pytest.raises(UsageError, match=complaint):
        speed.main([*NANO, *argv])


def test_resolve_backends_says_why_one_cannot_run():
    ended = command("-m", "benchmarks.speed", *NANO, "--backends", "triton", TRITON_INTERPRET="0")
    assert ended.returncode == 2
    assert "'triton' cannot run" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_summary_of_the_committed_results_is_in_the_readme():
    text = (ROOT / "README.md").read_text().partition(report.BEGIN)[2].partition(report.END)[0]
    assert text.strip() == report.summary({device: read_result("speed", device) for device in report.KINDS})
    assert "not measured yet" in text or read_result("speed", "cuda")


# -- targets ------------------------------------------------------------------------------------------------------


def row(model, task, mode, speed, memory=None, backend=None, dtype="fp32"):
    return {
        **{"model": model, "task": task, "mode": mode, "backend": backend, "dtype": dtype, "batch_size": 8},
        **{"images_per_second": speed, "peak_memory": memory},
    }


def targets(**changes):
    result = {
        "machine": {"device": "cpu"},
        "rows": [
            row(report.OURS, "inference", "eager", 32.0, backend="torch"),
            row(report.OURS, "inference", "eager", 48.0, backend="torch", dtype="bf16"),
            row(report.PEER, "inference", "eager", 20.0),
            row(report.OURS, "training", "eager", 11.0, 500, backend="torch"),
            row(report.PEER, "training", "eager", 10.0, 1000),
            row(report.OURS, "training", "compiled", 11.0, backend="torch"),
        ],
        "floors": {report.OURS: {"as_run": 0.3, "as_linear": 0.25, "as_convolution": 0.21, "fastest": 0.2}},
        "large_maps": {"bra_layer": 2 * 10**9},
        **changes,
    }
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in report.target_table(result).splitlines()[2:]]
    return {what: cells for what, *cells in rows}


def test_target_table_judges_by_what_was_measured():
    cells = targets()
    assert cells["debiformer_tiny ÷ swin_tiny, inference, eager"] == ["≥ 1.6", "1.60", "yes"]
    assert cells["debiformer_tiny ÷ swin_tiny, training, eager"] == ["≥ 1.4", "1.10", "**no**"]
    assert cells["debiformer_tiny, training, compiled ÷ eager"] == ["≥ 1", "1.00", "yes"]
    assert cells["debiformer_tiny, inference, bf16 ÷ fp32"] == ["≥ 1", "1.50", "yes"]
    assert cells["peak training memory ÷ swin_tiny's"] == ["≤ 1", "0.50", "yes"]
    # 8 images take 8/32 s, the layers alone 0.2 s.
    assert cells["share of the layers, each the fastest known way, eager"] == ["≥ 0.6", "0.80", "yes"]
    bra = next(cells for what, cells in targets().items() if what.startswith("BRA layer"))
    assert bra == ["≤ 1 GB", "2.00 GB", "**no**"]


def test_target_table_does_not_judge_what_was_not_measured():
    assert targets()["the same, both compiled"] == ["≥ 1.5", "not measured", ""]
    assert {cells[1] for cells in targets(rows=[], large_maps={}).values()} == {"not measured"}


def test_target_table_has_targets_for_each_kind_of_machine():
    rows = [
        row(report.OURS, "inference", "eager", speed, backend=name)
        for name, speed in (("reference", 10), ("triton", 35))
    ]
    cells = targets(machine={"device": "cuda"}, rows=rows)
    assert cells["triton ÷ reference, inference"] == ["≥ 3", "3.50", "yes"]
    assert not any("share" in what for what in cells)
    assert not any("triton" in what for what in targets())
