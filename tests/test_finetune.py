"""The README's fine-tuning commands learn 150 photos of three classes from a quickstart, here a shorter one."""

import re
import shlex

import pytest
from support import ROOT

import main
from models.weights import load_checkpoint
from runtime.checkpoint import BEST
from tasks.options import parse_args
from tools import make_photos, predict


def commands():
    """The README's first three commands, as lists of words."""
    text = (ROOT / "README.md").read_text().partition("### Your own images")[2].partition("###")[0]
    example = re.search(r"(?:^    python .*\n)+", text, re.MULTILINE)[0]
    return [shlex.split(line) for line in example.splitlines()]


def test_photos_are_the_same_every_time(tmp_path):
    for folder in ("one", "two"):
        make_photos.write(tmp_path / folder)
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.png"))
    assert len(files) == 150
    assert {path.parts[:2] for path in files} == {("train", name) for name in ("flower", "portrait", "temple")}
    assert all((tmp_path / "one" / path).read_bytes() == (tmp_path / "two" / path).read_bytes() for path in files)


@pytest.mark.slow
def test_worked_example_reaches_95_percent(tmp_path, monkeypatch, capsys):
    photos, tune, say = commands()
    monkeypatch.chdir(tmp_path)
    main.run(parse_args(["--output_dir", "outputs/quickstart", "--epochs", "3", "--num_workers", "0"]))
    make_photos.main(photos[3:])
    run = main.run(parse_args([*tune[2:], "--num_workers", "0"]))
    content = load_checkpoint(tmp_path / "outputs" / "photos" / BEST)
    assert content["classes"] == ["flower", "portrait", "temple"]
    assert len(content["held_out"]) == 30
    assert content["best"]["acc1"] > 95
    assert run["epoch"] == 29
    capsys.readouterr()
    predict.main(say[3:])
    likeliest = re.search(r"\d%  (\w+)$", capsys.readouterr().out, re.MULTILINE)[1]
    assert likeliest == "flower"
