"""`python -m benchmarks.saving` from end to end, on a small model."""

import json

from benchmarks import saving


def test_saving_measures_and_writes(tmp_path, capsys):
    small = ["--model", "debiformer_nano", "--batch_size", "1", "--input_size", "64", "--repeats", "1"]
    saving.main([*small, "--device", "cpu", "--folder", str(tmp_path), "--write", "--results", str(tmp_path)])
    result = json.loads((tmp_path / "saving-cpu.json").read_text())
    (row,) = result["rows"]
    assert all(row[name]["ms"] > 0 for name in (*saving.WAITS, "training_thread"))
    assert row["until_written"] > row["update_while_writing"] > 0
    assert result["megabytes"] > 4 * 1.4  # weights, average, two moments of 1.49 M parameters of 4 bytes
    assert (tmp_path / "saving-cpu.md").read_text() == capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saving-cpu.json", "saving-cpu.md"]
