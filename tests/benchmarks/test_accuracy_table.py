"""Measured accuracies stand beside the published ones; what was not measured says so."""

import hashlib
from unittest import mock

import pytest
import timm
from released import NANO
from support import ROOT, complaint, save_as_authors

import main
from benchmarks import accuracy_table, markdown
from models.weights.releases import RELEASES
from models.weights.sources import Release

pytestmark = pytest.mark.usefixtures("offline")
RUN = ["--device", "cpu", "--num_workers", "0"]


def cells(text):
    """Rows by model: column to cell."""
    header, _, *body = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    return {row[0]: dict(zip(header, row, strict=True)) for row in body}


@pytest.fixture
def releases(tmp_path, published):
    """Three releases: one with weights, one without, one of a model that is not built here."""
    top1 = {NANO: 77.7, "debiformer_tiny": 81.9, "debiformer_femto": None}
    here = {name: Release(name, "https://drive.google.com/drive/folders/1", percent) for name, percent in top1.items()}
    with mock.patch.dict(RELEASES, here, clear=True):
        yield save_as_authors(tmp_path / "weights" / f"{NANO}.pth", published[0])


def test_accuracy_table_measures_what_is_here_and_names_what_is_missing(releases, small_options, shared_images, capsys):
    argv = [*RUN, "--data_path", str(shared_images), "--release_dir", str(releases.parent)]
    rows = cells(accuracy_table.accuracy_table(argv))
    crop_pct = str(timm.get_pretrained_cfg(NANO).crop_pct)
    options = small_options("--eval", "--resume", str(releases), "--input_size", "64", "--crop_pct", crop_pct)
    options.model_kwargs = {}
    expected = main.run(options)
    assert rows[NANO] == {
        "model": NANO,
        "published top-1 (%)": "77.7",
        "measured top-1 (%)": f"{expected['acc1']:.2f}",
        "images": "20",
        "sha256 of the weights": hashlib.sha256(releases.read_bytes()).hexdigest()[:8],
    }
    assert rows["debiformer_tiny"]["published top-1 (%)"] == "81.9"
    assert rows["debiformer_tiny"]["measured top-1 (%)"] == "not measured: no weights"
    assert rows["debiformer_femto"]["published top-1 (%)"] == "-"
    assert rows["debiformer_femto"]["measured top-1 (%)"] == "not measured: not built here"
    assert "debiformer_tiny: cannot get the released weights" in capsys.readouterr().err


@pytest.mark.parametrize("data", [[], ["--data_path", "/nowhere"]])
def test_accuracy_table_without_data_measures_and_downloads_nothing(releases, data, monkeypatch):
    monkeypatch.setattr(accuracy_table, "find_release", None)
    rows = cells(accuracy_table.accuracy_table([*RUN, *data, "--release_dir", str(releases.parent)]))
    assert rows[NANO]["measured top-1 (%)"] == "not measured: no data"
    assert rows["debiformer_tiny"]["measured top-1 (%)"] == "not measured: no weights and no data"


def test_accuracy_table_takes_no_other_data_for_a_measurement(releases, capsys):
    argv = [*RUN, "--data_set", "DIGITS", "--release_dir", str(releases.parent)]
    rows = cells(accuracy_table.accuracy_table(argv))
    assert rows[NANO]["measured top-1 (%)"] == "not measured: the evaluation was refused"
    assert "checkpoint has 4 classes, debiformer_nano has 10" in capsys.readouterr().err


def test_accuracy_table_is_written_between_its_marks(releases, tmp_path):
    file = tmp_path / "results.md"
    file.write_text(f"# Results\n{accuracy_table.BEGIN}\nold\n{accuracy_table.END}\nend\n")
    accuracy_table.main(["--write", str(file)])
    lines = file.read_text().splitlines()
    assert lines[:2] == ["# Results", accuracy_table.BEGIN]
    assert lines[-2:] == [accuracy_table.END, "end"]
    assert cells("\n".join(lines[2:-2])).keys() == RELEASES.keys()


def test_accuracy_table_leaves_a_file_without_marks_alone(tmp_path):
    file = tmp_path / "other.md"
    file.write_text("# Other\n")
    assert "no place for this table" in complaint(markdown.replace_between, file, "<!-- a -->", "<!-- b -->", "text")
    assert "cannot read" in complaint(
        markdown.replace_between, tmp_path / "none.md", "<!-- a -->", "<!-- b -->", "text"
    )
    assert file.read_text() == "# Other\n"


def test_accuracy_table_of_the_readme_has_a_row_for_every_release():
    content = (ROOT / "README.md").read_text()
    rows = cells(content.partition(accuracy_table.BEGIN)[2].partition(accuracy_table.END)[0].strip())
    assert rows.keys() == RELEASES.keys()
    for name, row in rows.items():
        top1 = RELEASES[name].top1
        assert row["published top-1 (%)"] == ("-" if top1 is None else f"{top1:g}")
        measured = row["measured top-1 (%)"]
        assert measured.startswith("not measured: ") or (0 < float(measured) <= 100 and int(row["images"]))
