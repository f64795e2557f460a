"""The comparison of teachers: what is trained, what is not trained again, and what the page says."""

import json
import re
import statistics

import pytest
from support import ROOT, complaint

import main
from benchmarks import teachers
from benchmarks.measure import RESULTS
from tools import make_clutter

SMALL = {"model_kwargs": {"embed_dims": [16, 32, 48, 64], "depths": [1, 1, 1, 1]}}
TINY = teachers.Study("Tiny", 100, 1, 1, {"data_set": "IMNET", "scale": [0.5, 1.0], "hflip": 0.5})


@pytest.fixture
def place(monkeypatch, tmp_path):
    monkeypatch.setattr(teachers, "STUDENT", {**teachers.STUDENT, **SMALL})
    make_clutter.write(tmp_path / "data", train=100, val=10, size=64)
    return tmp_path


def test_teacher_and_its_students_are_trained_once(place, monkeypatch):
    accuracy = teachers.prepare(TINY, place)
    options = {variant: teachers.options_of(TINY, place, variant, 1) for variant in teachers.NAMES}
    found = {variant: teachers.train(place / variant, values) for variant, values in options.items()}
    assert all(0 <= top1 <= 100 for top1 in (accuracy, *found.values()))
    losses = {variant: json.loads((place / variant / "log.txt").read_text())["train_loss"] for variant in found}
    assert min(losses["tokens"], losses["features"]) > losses["plain"] + 0.3  # what the teacher says counts, too

    monkeypatch.setattr(main, "run", None)
    assert teachers.prepare(TINY, place) == accuracy
    assert found == {variant: teachers.train(place / variant, values) for variant, values in options.items()}
    assert "holds a run with other options" in complaint(
        teachers.train, place / "plain", {**options["plain"], "lr": 1.0}
    )


def test_students_differ_in_their_teacher_alone(place):
    plain, tokens, features = (teachers.options_of(TINY, place, variant, 2) for variant in teachers.NAMES)
    common = {name for name in plain if not name.startswith(("mixup", "cutmix"))}
    for other in (tokens, features):
        assert {name: plain[name] for name in common} == {name: other[name] for name in common}
    assert tokens["tl_mix"] is False
    assert plain["mixup"] == plain["cutmix"] == 0


def test_page_compares_gains_with_the_spread():
    students = {"plain": [40.0, 42.0, 44.0], "tokens": [42.0, 42.5, 43.0], "features": [50.0, 51.0, 52.0]}
    text = teachers.report({"clutter": {"teacher": 80.0, "students": {"debiformer_nano": students}}})
    assert "| plain | 40.0, 42.0, 44.0 | 42.0 ± 2.0 |  |" in text
    assert "| features | 50.0, 51.0, 52.0 | 51.0 ± 1.0 | +9.0 ± 1.0 |" in text
    assert "token labels: +0.5 points, not more than the spread of 2.0" in text
    assert "features: +9.0 points, more than the spread of 2.0" in text


# -- the set


def test_same_numbers_give_the_same_files_and_all_forms(tmp_path):
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        make_clutter.write(tmp_path / name, train=20, val=10, size=40, seed=seed)
    files = {name: sorted((tmp_path / name).rglob("*.png")) for name in ("one", "two", "three")}
    contents = {name: [path.read_bytes() for path in paths] for name, paths in files.items()}
    assert contents["one"] == contents["two"]
    assert not set(contents["one"]) & set(contents["three"])
    assert len(set(contents["one"])) == 30
    assert {path.parent.name for path in files["one"]} == set(make_clutter.FORMS)


def test_forms_are_told_apart_by_their_outline_alone():
    masks = [make_clutter.filled(64, [32 + 24 * part for part in make_clutter.outlines(f)]) for f in make_clutter.FORMS]
    assert all(300 < mask.sum() < 2000 for mask in masks)
    overlaps = [(a & b).sum() / (a | b).sum() for n, a in enumerate(masks) for b in masks[:n]]
    assert max(overlaps) < 0.9


def test_document_tells_what_was_measured():
    page = (ROOT / "docs/DISTILLATION.md").read_text()
    sets = json.loads((RESULTS / "teachers-cpu.json").read_text())["sets"]
    rows = re.findall(r"^\| (forms in clutter|digits), .* teacher ([\d.]+) \| (\w+) \| (.*) \|$", page, re.M)
    measured = []
    for title, name in (("forms in clutter", "clutter"), ("digits", "digits")):
        for student, variants in sets[name]["students"].items():
            cells = [f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}" for values in variants.values()]
            measured.append((title, f"{sets[name]['teacher']:.1f}", student, " | ".join(cells)))
    assert rows == measured
