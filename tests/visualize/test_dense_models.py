"""python -m visualize with checkpoints of detectors and segmenters."""

import os
from dataclasses import asdict

import pytest
import torch
from awkward_images import gradient
from dense_cases import HEADS, SMALL
from PIL import Image
from support import complaint

from tasks import find_task
from tasks.options import parse_args
from tools import make_shapes
from visualize import session
from visualize.__main__ import main
from visualize.subject import load_subject


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """Per head the file of a model with random weights, as a run leaves it."""
    root = tmp_path_factory.mktemp("dense")
    make_shapes.write(root, train=1, val=1, size=64)

    def save(head, *argv):
        options = parse_args([*SMALL, *HEADS[head], "--head", head, "--data_path", str(root), *argv])
        task = find_task(options.task)(options)
        task.sources()
        content = {"model": task.build_model().state_dict(), "args": asdict(options), "classes": list(task.classes)}
        torch.save(content, root / f"{head}.pth")
        return root / f"{head}.pth"

    return {head: save(head) for head in ("semantic_fpn", "mask_rcnn")}


@pytest.fixture
def photo(tmp_path):
    Image.fromarray(gradient()).save(tmp_path / "photo.png")
    return str(tmp_path / "photo.png")


@pytest.mark.parametrize("head", ["semantic_fpn", "mask_rcnn"])
def test_attention_and_prediction_of_a_dense_model_are_drawn(saved, photo, tmp_path, head):
    main([photo, "--checkpoint", str(saved[head]), "--stage", "1", "--query", "5,9", "--output", str(tmp_path / "out")])
    folder = tmp_path / "out" / "photo"
    kinds = ("picture", "windows", "token_attention", "contributions", "agents", "agent_reads", "composed", "overview")
    names = [f"{kind}_5_9.png" for kind in (*kinds, "contributions_2")]
    assert sorted(os.listdir(folder)) == sorted([*names, "layers.gif", "prediction.png", "report.html"])
    report = (folder / "report.html").read_text()
    assert f"debiformer_nano as --task {HEADS[head][1]}" in report
    assert report.index("What the model sees") < report.index("Routed windows")
    with Image.open(folder / "layers.gif") as animation:
        assert animation.n_frames == 8  # two attention layers in each of the four blocks


@pytest.mark.parametrize("size", [(97, 33), (33, 64), (300, 8)])
def test_images_are_shown_in_their_own_proportions(saved, size, tmp_path):
    Image.new("RGB", size, "teal").save(tmp_path / "image.png")
    main([str(tmp_path / "image.png"), "--checkpoint", str(saved["semantic_fpn"]), "--output", str(tmp_path)])
    view = load_subject(checkpoint=saved["semantic_fpn"]).view(Image.new("RGB", size))
    width, height = Image.open(tmp_path / "image" / "layers.gif").size
    assert width / height == pytest.approx(view.width / view.height, rel=0.1)
    assert max(view.size) <= 128
    assert min(view.size) <= 32


def test_attention_is_that_of_the_whole_model(saved):
    subject, photo = load_subject(checkpoint=saved["semantic_fpn"]), Image.fromarray(gradient())
    found = subject.capture(subject.view(photo))
    expected = {}
    for name, module in subject.whole.named_modules():
        if name.endswith("attn2"):
            module.register_forward_pre_hook(
                lambda module, args, name=name: expected.update({name: module.attention_maps(*args)})
            )
    subject.seen(subject.view(photo))
    assert len(expected) == 4
    for name, again in expected.items():
        (layer,) = (layer for layer in found.layers if name.endswith(layer.name.removeprefix("part.")))
        maps = (one.token_attention(0, 0).detach() for one in (layer.maps, again))
        torch.testing.assert_close(*maps)


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--evidence"], "--evidence is for classifiers"),
        (["--model", "biformer_tiny"], "is of debiformer_nano, not of biformer_tiny"),
        (["--query", "500,1"], "lies outside of the"),
    ],
)
def test_what_a_dense_model_cannot_show_is_told_in_a_line(saved, photo, tmp_path, extra, words):
    argv = [photo, "--checkpoint", str(saved["semantic_fpn"]), "--output", str(tmp_path / "out"), *extra]
    assert words in complaint(main, argv)


def test_page_refuses_what_is_no_classifier(saved):
    choice = session.Choice("debiformer_nano", str(saved["mask_rcnn"]))
    assert "is no classifier's" in complaint(session.subject_of, choice)
