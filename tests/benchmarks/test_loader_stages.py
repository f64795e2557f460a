"""`python -m benchmarks.loader` from end to end, on a few images."""

import json

import pytest

from benchmarks import loader
from runtime.errors import UsageError


def test_loader_measures_both_loaders_and_every_stage(tmp_path, capsys):
    argv = ["--images", "4", "--repeats", "1", "--write", "--results", str(tmp_path)]
    loader.main([*argv, "--", "--eval_resize", "torch", "--input_size", "64", "--batch_size", "2"])
    rows = json.loads((tmp_path / "loader-cpu.json").read_text())["rows"]
    assert {"ours", "timm", "decode", "RandomCrop", "RandAugment", "the rest"} <= rows["training"][0].keys()
    assert {"ours", "timm", "decode", "Resize", "CenterCrop", "the rest"} <= rows["evaluation"][0].keys()
    assert {"ours", "timm", "decode", "RandomCrop", "draws", "device"} <= rows[loader.ON_DEVICE][0].keys()
    for (row,) in rows.values():
        stages = [value for name, value in row.items() if name not in loader.NOT_OURS]
        assert row["ours"] == pytest.approx(sum(stages))
    assert (tmp_path / "loader-cpu.md").read_text() == capsys.readouterr().out


def test_loader_measures_folders_of_classified_images_alone():
    with pytest.raises(UsageError, match="leave out --task and --data_set"):
        loader.main(["--images", "1", "--", "--data_set", "DIGITS"])


def test_listing_is_measured_from_the_files_to_the_workers(tmp_path, capsys):
    sizes = ["--files", "2000", "--processes", "2", "--workers", "1"]
    loader.main(["--measure", "listing", *sizes, "--write", "--results", str(tmp_path)])
    found = json.loads((tmp_path / "listing-cpu.json").read_text())["listing"]
    assert found["files"] == 2000
    assert 0 < found["list in a worker, MB"] < found["worker in all, MB"]
    assert (tmp_path / "listing-cpu.md").read_text() == capsys.readouterr().out
