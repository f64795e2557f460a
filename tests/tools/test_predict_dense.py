"""What detectors and segmenters see, printed and drawn."""

import re
from dataclasses import asdict

import numpy as np
import pytest
import torch
from dense_cases import HEADS, SMALL
from PIL import Image
from support import complaint

from models.weights import load_checkpoint
from tasks import find_task
from tasks.loading import open_image
from tasks.options import parse_args
from tools import make_shapes, predict
from tools.loading import load_model


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    root = tmp_path_factory.mktemp("shapes")
    make_shapes.write(root, train=2, val=2, size=64)
    return root


@pytest.fixture(scope="session")
def saved(shapes, tmp_path_factory):
    """Per head: the run's task, a model with random weights, and the file that holds it as a run leaves it."""
    folder = tmp_path_factory.mktemp("dense")

    def save(head):
        torch.manual_seed(0)
        task = find_task(HEADS[head][1])(parse_args([*SMALL, *HEADS[head], "--head", head, "--data_path", str(shapes)]))
        task.sources()
        model = task.build_model().eval()
        if head == "retinanet":  # by its first bias it is sure of nothing
            torch.nn.init.normal_(model.head.classification_head.cls_logits.bias, -1, 1)
        path = folder / f"{head}.pth"
        torch.save({"model": model.state_dict(), "args": asdict(task.opts), "classes": list(task.classes)}, path)
        return task, model, path

    return {head: save(head) for head in HEADS}


@pytest.fixture
def photo(shapes):
    return str(shapes / "val" / "0000.png")


def lines_of(capsys, *argv):
    predict.main(list(map(str, argv)))
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("head", ["retinanet", "mask_rcnn"])
def test_objects_are_those_that_evaluation_finds(saved, photo, tmp_path, capsys, head):
    task, model, path = saved[head]
    _, val = task.sources()
    batch = task.preprocess(task.collate([task.transform(train=False)(val[0])]), train=False)
    evaluator = task.evaluator(split=False)
    with torch.no_grad():
        evaluator.update(task.forward(model, batch), batch)
    found = [entry for entry in evaluator.found if entry["score"] >= 0.1]
    assert found

    name, *lines, drawn = lines_of(capsys, photo, "--checkpoint", path, "--output", tmp_path, "--least", "0.1")
    assert (name, drawn) == (photo, f"  drawn: {tmp_path}/0000.png")
    for entry, line in zip(found, lines, strict=True):
        score, label, *box = line.split()
        x, y, width, height = entry["bbox"]
        assert float(score.rstrip("%")) == pytest.approx(100 * entry["score"], abs=0.06)
        assert label == make_shapes.SHAPES[entry["category_id"] - 1]
        assert list(map(float, box)) == pytest.approx([x, y, x + width, y + height], abs=0.51)
    picture, original = np.asarray(Image.open(tmp_path / "0000.png")), np.asarray(Image.open(photo))
    assert picture.shape == original.shape
    assert (picture != original).any()


def test_image_without_objects_is_drawn_as_it_is(saved, photo, tmp_path, capsys):
    lines = lines_of(capsys, photo, "--checkpoint", saved["mask_rcnn"][2], "--output", tmp_path, "--least", "1")
    assert lines[1:] == ["  no objects", f"  drawn: {tmp_path}/0000.png"]
    assert (np.asarray(Image.open(tmp_path / "0000.png")) == np.asarray(Image.open(photo))).all()


@pytest.mark.parametrize("head", ["semantic_fpn", "upernet"])
def test_classes_are_those_of_the_pixels(saved, photo, tmp_path, capsys, head):
    task, model, path = saved[head]
    _, val = task.sources()
    batch = task.preprocess(task.collate([task.transform(train=False)(val[0])]), train=False)
    with torch.no_grad():
        numbers = task.forward(model, batch)[0].argmax(0)
    shares = {name: float((numbers == number).float().mean()) for number, name in enumerate(task.classes)}

    _, *lines, _ = lines_of(capsys, photo, "--checkpoint", path, "--output", tmp_path)
    found = [re.fullmatch(r" +([\d.]+)%  (\w+)", line).groups() for line in lines]
    assert [float(share) for share, _ in found] == sorted((float(share) for share, _ in found), reverse=True)
    assert {name: float(share) for share, name in found} == {
        name: pytest.approx(100 * share, abs=0.06) for name, share in shares.items() if share
    }
    picture, original = np.asarray(Image.open(tmp_path / "0000.png")), np.asarray(Image.open(photo))
    height, width = original.shape[:2]
    assert picture.shape[1] == width
    assert picture.shape[0] > height, "the legend is below"
    for number in numbers.unique():
        change = picture[:height][numbers == number].astype(int) - 0.4 * original[numbers == number]
        assert np.ptp(change, axis=0).max() <= 2, "one colour over each class"


@pytest.mark.parametrize("head", ["semantic_fpn", "retinanet"])
@pytest.mark.parametrize("size", [(1, 1), (70, 3), (33, 91)])
def test_images_of_any_size_are_drawn(saved, head, size):
    loaded = load_model(checkpoint=str(saved[head][2]), any_task=True)
    picture = loaded.task_on("cpu").predict(loaded.model, Image.new("RGB", size, "teal"), least=0).picture
    assert picture.width == size[0]
    assert picture.height >= size[1]


def test_images_of_one_name_are_drawn_into_files_of_their_own(saved, shapes, photo, tmp_path, capsys):
    other = shapes / "images" / "train" / "0000.png"
    lines = lines_of(capsys, photo, other, "--checkpoint", saved["retinanet"][2], "--output", tmp_path, "--least", "1")
    assert [line for line in lines if "drawn" in line] == [
        f"  drawn: {tmp_path}/0000.png",
        f"  drawn: {tmp_path}/0000_2.png",
    ]
    assert Image.open(tmp_path / "0000_2.png").size == open_image(str(other)).size


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--output", "{folder}"], "0000.png is one of the images; choose another --output"),
        (["--output", "{photo}/in"], "choose another --output"),
        (["--least", "2"], "--least must be from 0 to 1"),
        (["--model", "debiformer_tiny"], "debiformer_tiny has [48, 16, 1, 1]"),
    ],
)
def test_what_cannot_be_drawn_is_told_in_a_line(saved, shapes, extra, words):
    folder = shapes / "images" / "val"
    photo = str(folder / "0000.png")
    filled = [word.format(folder=folder, photo=photo) for word in extra]
    assert words in complaint(predict.main, [photo, "--checkpoint", str(saved["semantic_fpn"][2]), *filled])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"args": {"task": "detectoin"}}, "did you mean detection"),
        ({"classes": []}, "does not say which classes it knows"),
        ({"args": {"longest": "wide"}}, "is damaged"),
        ({"args": {"longest": 0}}, "--longest must be at least 1"),
        ({"args": {"head": "upernet"}}, "is of another model"),
        ({"args": {"model": None}}, "pass --model"),
    ],
)
def test_checkpoint_that_is_odd_is_told_in_a_line(saved, photo, tmp_path, change, words):
    content = load_checkpoint(saved["semantic_fpn"][2])
    args = {**content["args"], **change.get("args", {})}
    torch.save({**content, **change, "args": args}, tmp_path / "odd.pth")
    assert words in complaint(predict.main, [photo, "--checkpoint", str(tmp_path / "odd.pth")])


def test_tools_for_classifiers_refuse_the_others(saved):
    words = complaint(load_model, None, str(saved["retinanet"][2]))
    assert "is of --task detection; this tool takes classifiers alone" in words
