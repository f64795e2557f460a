"""RT-DETRv2: what goes into transformers' parts and what comes out."""

import sys
from types import SimpleNamespace

import pytest
import torch
from dense_cases import HEADS, SMALL
from support import complaint

import main
from tasks.detection.task import Detection
from tasks.options import parse_args
from tools import make_shapes


@pytest.fixture
def task(tmp_path):
    make_shapes.write(tmp_path, train=2, val=1, size=96)
    where = ["--head", "rtdetrv2", "--data_path", str(tmp_path)]
    task = Detection(parse_args([*SMALL, *HEADS["rtdetrv2"], *where]))
    task.train, _ = task.sources()
    torch.manual_seed(0)
    return task


def batch_of(task, objects=None):
    """Both images, with so many objects each; None: all."""
    samples = [task.transform(train=True)(task.train[index]) for index in range(2)]
    cut = [{**sample, **{key: sample[key][:objects] for key in ("boxes", "labels")}} for sample in samples]
    return task.preprocess(task.collate(cut), train=True)


def test_without_transformers_a_run_ends_with_one_line(task, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)  # as where it is not installed
    expected = "--head rtdetrv2 needs transformers: pip install -r requirements-clients.txt"
    assert complaint(main.run, task.opts) == expected


def test_every_weight_gets_a_gradient_with_and_without_objects(task):
    """Or several processes would wait for it, and for losses of the same names."""
    model = task.build_model().train()
    for objects in (None, 0):
        batch = batch_of(task, objects)
        losses = task.loss(task.forward(model, batch), batch)
        assert losses.keys() == {"loss", "loss_vfl", "loss_bbox", "loss_giou"}
        model.zero_grad()
        losses["loss"].backward()
        trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        assert [name for name, grad in trained.items() if grad is None or not grad.isfinite().all()] == []


def test_model_that_diverges_says_so_by_its_loss(task):
    model = task.build_model().train()
    with torch.no_grad():
        model.detr.decoder.bbox_embed[0].layers[0].bias.fill_(torch.nan)
    batch = batch_of(task)
    assert task.loss(task.forward(model, batch), batch)["loss"].isnan()


@torch.no_grad()
def test_boxes_are_parts_of_the_padded_batch_and_are_read_back_from_it(task):
    model = task.build_model().train()
    sizes, objects = [(40, 90), (60, 33)], [([18.0, 8.0, 54.0, 24.0], 2), ([3.0, 12.0, 33.0, 60.0], 0)]
    targets = [{"boxes": torch.tensor([box]), "labels": torch.tensor([label])} for box, label in objects]
    given, criterion = [], model.criterion
    model.criterion = lambda *args, **kwargs: given.append(args[1]) or criterion(*args, **kwargs)
    model([torch.zeros(3, *size) for size in sizes], targets)
    (labels,) = given
    assert [label["class_labels"].tolist() for label in labels] == [[2], [0]]
    frame = torch.tensor([96, 64, 96, 64])  # width, height
    expected = torch.tensor([[36, 16, 36, 16], [18, 36, 30, 48]]) / frame
    torch.testing.assert_close(torch.cat([label["boxes"] for label in labels]), expected)

    logits, boxes = torch.full((2, 1, 4, 3), -9.0), torch.rand(2, 1, 4, 4)
    logits[0, 0, 1, 2] = logits[1, 0, 3, 0] = 9
    boxes[0, 0, 1], boxes[1, 0, 3] = expected
    found = SimpleNamespace(intermediate_logits=logits, intermediate_reference_points=boxes)
    for result, target, size in zip(model._detections(found, frame, sizes), targets, sizes, strict=True):
        torch.testing.assert_close(result["boxes"][0], target["boxes"][0])
        assert result["labels"][0] == target["labels"][0]
        assert result["scores"][0] > 0.99 > result["scores"][1] >= result["scores"][-1]
        assert (result["boxes"] >= 0).all()
        assert (result["boxes"] <= torch.tensor(size[::-1] * 2)).all()
