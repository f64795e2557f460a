"""python -m visualize: what it writes, and one line for every mistake."""

import argparse
import html.parser
import os
import re

import numpy as np
import pytest
import timm
import torch
from awkward_images import ACCEPTED, REFUSED, gradient
from PIL import Image
from support import command, complaint

import models  # noqa: F401
from models.weights import WeightsError
from runtime.errors import UsageError, exit_on_error
from visualize.__main__ import main
from visualize.report import UNTRAINED, Section, file_picture, report_html
from visualize.subject import load_subject


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A checkpoint as a run leaves it, of a small model."""
    path = tmp_path_factory.mktemp("weights") / "best.pth"
    kwargs = {"embed_dims": [16, 32, 48, 64], "depths": [1, 1, 2, 1]}
    model = timm.create_model("debiformer_nano", num_classes=3, img_size=32, **kwargs)
    args = {"model": "debiformer_nano", "input_size": 32, "model_kwargs": kwargs, "crop_pct": 1.0}
    torch.save({"model": model.state_dict(), "args": args, "classes": ["cat", "dog", "<owl>"]}, path)
    return path


@pytest.fixture
def photo(tmp_path):
    Image.fromarray(gradient()).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


class References(html.parser.HTMLParser):
    """Everything a page would load or link to."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found += [value for name, value in attributes if name in ("src", "href", "srcset", "data", "action")]


def test_what_is_written_for_one_image(trained, photo, tmp_path, capsys):
    main([str(photo), "--checkpoint", str(trained), "--query", "5,9", "20,20", "--output", str(tmp_path / "out")])
    folder = tmp_path / "out" / "photo"
    kinds = ("picture", "windows", "token_attention", "contributions", "agents", "agent_reads", "composed")
    assert sorted(os.listdir(folder)) == sorted(
        [f"{kind}_{point}.png" for kind in (*kinds, "contributions_2", "overview") for point in ("5_9", "20_20")]
        + ["layers.gif", "report.html"]
    )
    for path in folder.glob("*.png"):
        assert np.asarray(Image.open(path).convert("RGB")).std() > 5, path
    with Image.open(folder / "layers.gif") as animation:
        assert animation.n_frames == 10  # two attention layers in each of the five blocks
    assert "UNTRAINED" not in capsys.readouterr().err

    report = (folder / "report.html").read_text()
    assert len(re.findall("<figure>", report)) == 2 * 8 + 1
    assert all(reference.startswith(("data:", "#photo")) for reference in References(report).found)
    assert "http" not in report.replace('http-equiv="', "")
    assert "prefers-color-scheme: dark" in report
    assert "width=device-width" in report
    assert "&lt;owl&gt;" in report
    assert "<owl>" not in report
    assert UNTRAINED not in report


def test_untrained_weights_are_announced_everywhere(photo, tmp_path, capsys):
    main([str(photo), "--model", "debiformer_nano", "--output", str(tmp_path / "out")])
    assert "UNTRAINED" in capsys.readouterr().err
    assert f"<strong>{UNTRAINED}</strong>" in (tmp_path / "out" / "photo" / "report.html").read_text()


def test_checkpoint_is_shown_what_its_evaluation_saw(trained, tmp_path):
    content = torch.load(trained)
    for data_set, crop_pct, expected in (("IMNET", None, 0.875), ("CIFAR", None, 1.0), ("IMNET", 0.9, 0.9)):
        args = {**content["args"], "data_set": data_set, "crop_pct": crop_pct}
        torch.save({**content, "args": args}, tmp_path / "best.pth")
        subject = load_subject(checkpoint=tmp_path / "best.pth")
        assert (subject.pixels.crop_pct, subject.input_size, subject.name) == (expected, 32, "debiformer_nano")
    assert load_subject("debiformer_tiny").pixels.crop_pct == 0.875


def test_query_moves_the_picture_of_its_window(trained, photo, tmp_path):
    main([str(photo), "--checkpoint", str(trained), "--grid", "2", "--output", str(tmp_path)])
    pictures = {path.name: path.read_bytes() for path in (tmp_path / "photo").glob("windows_*.png")}
    assert sorted(pictures) == ["windows_24_24.png", "windows_24_8.png", "windows_8_24.png", "windows_8_8.png"]
    assert len(set(pictures.values())) == 4


def test_biformer_shows_windows_and_token_attention(photo, tmp_path):
    main([str(photo), "--model", "biformer_tiny", "--stage", "2", "--head", "3", "--output", str(tmp_path)])
    names = {path.name.rsplit("_", 2)[0] for path in (tmp_path / "photo").glob("*.png")}
    assert names == {"picture", "windows", "token_attention", "contributions", "overview"}
    main([str(photo), "--model", "biformer_tiny", "--stage", "4", "--output", str(tmp_path / "full")])
    names = {path.name.rsplit("_", 2)[0] for path in (tmp_path / "full" / "photo").glob("*.png")}
    assert names == {"picture", "token_attention", "contributions", "overview"}


def test_folder_is_shown_but_for_what_cannot_be_read(trained, tmp_path):
    for name, write in ACCEPTED.items():
        write(tmp_path / name)
    (tmp_path / "deep.gif").write_bytes((tmp_path / "palette.gif").read_bytes())
    REFUSED["torn.png"][0](tmp_path / "torn.png")
    with pytest.raises(UsageError, match=r"1 of 6 files could not be read: torn\.png is no image"):
        main([str(tmp_path), "--checkpoint", str(trained), "--output", str(tmp_path / "out")])
    shown = {path.parent.name for path in (tmp_path / "out").glob("*/report.html")}
    assert shown == {"float", "print", "palette", "deep.png", "deep.gif"}


def test_evidence_of_a_trained_model(trained, photo, tmp_path):
    pytest.importorskip("pytorch_grad_cam", reason="grad-cam is an extra")
    pytest.importorskip("captum", reason="captum is an extra")
    main([str(photo), "--checkpoint", str(trained), "--evidence", "--output", str(tmp_path)])
    assert {"grad_cam.png", "integrated_gradients.png"} <= set(os.listdir(tmp_path / "photo"))


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--query", "32,0"], "32,0 lies outside of the 32x32 picture"),
        (["--query=-1,0"], "-1,0 lies outside"),
        (["--query", "centre"], "expected X,Y"),
        (["--stage", "5"], "no stage 5"),
        (["--stage", "3", "--block", "2"], "no block 2; use 0..1"),
        (["--head", "9"], "no head 9; use 0..2"),
        (["--grid", "99"], "1..32"),
        (["--grid", "0"], "1..32"),
        (["--grid", "2", "--query", "1,1"], "exclude each other"),
        (["--model", "debiformer_tiny"], "is of debiformer_nano, not of debiformer_tiny"),
        (["--load_release"], "not allowed with"),
        (["--colour", "red"], "unrecognized arguments: --colour"),
    ],
)
def test_mistakes_get_a_sentence(trained, photo, tmp_path, capsys, argv, words):
    argv = [str(photo), "--checkpoint", str(trained), "--output", str(tmp_path / "out"), *argv]
    with pytest.raises(SystemExit) as end:
        exit_on_error("python -m visualize", lambda: main(argv))
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("python -m visualize: error: ")
    assert words in line


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--model", "debiformer_huge"], "did you mean debiformer"),
        (["--model", "resnet18"], "resnet18 has no routing"),
        (["--checkpoint", "none.pth"], "none.pth does not exist"),
        (["--load_release"], "release"),
    ],
)
def test_models_that_cannot_be_shown(photo, tmp_path, argv, words):
    assert words in complaint(main, [str(photo), "--output", str(tmp_path / "out"), *argv])


def test_foreign_state_dict_is_refused(photo, tmp_path):
    model = timm.create_model("biformer_tiny", depths=(1, 1, 1, 1))
    torch.save(model.state_dict(), tmp_path / "other.pth")
    with pytest.raises(WeightsError, match="is of another model"):
        main([str(photo), "--model", "debiformer_tiny", "--checkpoint", str(tmp_path / "other.pth"), "--output", "x"])


@pytest.mark.parametrize("name", REFUSED)
def test_unusable_images_end_the_command_with_one_line(trained, tmp_path, capsys, name):
    path = REFUSED[name][0](tmp_path / name)
    with pytest.raises(SystemExit) as end:
        exit_on_error(
            "visualize", lambda: main([str(path), "--checkpoint", str(trained), "--output", str(tmp_path / "out")])
        )
    assert end.value.code == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"visualize: error: {name} ")
    assert printed.err.count("\n") == 1


def test_command_runs_in_a_shell(trained, photo, tmp_path):
    printed = command("-m", "visualize", photo, "--checkpoint", trained, "--output", tmp_path / "out")
    assert printed.returncode == 0, printed.stderr
    assert printed.stdout == f"{tmp_path}/out/photo/report.html\n"
    printed = command("-m", "visualize", photo, "--stage", "third", "--output", tmp_path / "out")
    assert printed.returncode == 2
    assert printed.stderr == "python -m visualize: error: argument --stage: invalid int value: 'third'\n"


def test_reports_escape_what_they_are_given():
    nasty = '"><script>alert(1)</script>'
    report = report_html(
        nasty, nasty, [(nasty, 0.5)], [Section(nasty, [file_picture(nasty, nasty, b"x")])], trained=False
    )
    assert "<script" not in report


def test_options_as_authors_save_them(tmp_path):
    """An argparse Namespace, with their name of the model; what is none of the options is not taken for one."""
    model = timm.create_model("debiformer_nano", num_classes=3)
    args = argparse.Namespace(model="debi_nano", input_size="large", model_kwargs=["n_win"], crop_pct=None)
    torch.save({"model": model.state_dict(), "args": args}, tmp_path / "authors.pth")
    subject = load_subject("debiformer_nano", tmp_path / "authors.pth")
    assert (subject.input_size, subject.classes) == (64, ["class 0", "class 1", "class 2"])


def test_output_that_cannot_be_written(photo):
    with pytest.raises(UsageError, match=r"cannot write to .*photo\.png/out.*; choose another --output"):
        main([str(photo), "--model", "debiformer_nano", "--output", str(photo / "out")])
