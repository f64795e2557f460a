"""What `make quickstart-dense` relies on: its recipes, its data, and the options that make it short."""

import pytest
import torch
from dense_cases import SMALL
from PIL import Image

from tasks.detection.task import Detection
from tasks.options import load_recipe, parse_args
from tasks.segmentation.transforms import TrainTransform
from tools import make_shapes

RECIPES = {"segmentation": "debiformer_nano_semantic_fpn_shapes", "detection": "debiformer_nano_mask_rcnn_shapes"}


def test_shapes_are_the_same_each_time(tmp_path):
    contents = []
    for root in (tmp_path / "one", tmp_path / "two"):
        make_shapes.write(root, train=2, val=1, size=96)
        files = sorted(path for path in root.rglob("*") if path.is_file())
        contents.append([(path.relative_to(root), path.read_bytes()) for path in files])
    assert contents[0] == contents[1]


@pytest.mark.parametrize("recipe", RECIPES.values())
def test_quickstarts_recipes_train_with_their_own_batch_and_data(recipe):
    options = load_recipe(recipe)
    assert options.batch_size == options.recipe_batch
    assert options.data_path == "data/shapes"


@pytest.mark.parametrize("head", ["mask_rcnn", "retinanet"])
def test_narrow_detector_is_narrow_throughout(tmp_path, head):
    make_shapes.write(tmp_path, train=1, val=1, size=64)
    argv = ["--task", "detection", "--head", head, "--head_channels", "16", "--data_path", str(tmp_path)]
    task = Detection(parse_args([*SMALL, *argv]))
    train, _ = task.sources()
    model = task.build_model().train()
    heads = [value for name, value in model.named_parameters() if not name.startswith("backbone.body.")]
    assert max(len(value) for value in heads) == (64 if head == "mask_rcnn" else 36)
    batch = task.preprocess(task.collate([task.transform(train=True)(train[0])]), train=True)
    assert task.loss(task.forward(model, batch), batch)["loss"].isfinite()


def test_roi_samples_bounds_what_the_heads_learn_from(tmp_path):
    make_shapes.write(tmp_path, train=1, val=1, size=64)
    argv = ["--task", "detection", "--head_channels", "16", "--roi_samples", "8", "--data_path", str(tmp_path)]
    task = Detection(parse_args([*SMALL, *argv]))
    train, _ = task.sources()
    model, rows = task.build_model().train(), []
    model.roi_heads.box_predictor.register_forward_hook(lambda module, inputs, outputs: rows.append(len(inputs[0])))
    batch = task.preprocess(task.collate([task.transform(train=True)(train[0])] * 2), train=True)
    task.forward(model, batch)
    assert rows == [16]


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
def test_resize_ratio_decides_the_size_of_what_is_cropped(factor):
    size = (40, 40)
    sample = {"image": Image.new("RGB", size), "labels": Image.new("L", size)}
    labels = TrainTransform(crop=80, bounds=(40, 40), ratio=(factor, factor))(sample)["labels"]
    assert (labels != 255).sum() == (40 * factor) ** 2
    assert torch.equal((labels == 0).any(0).sum(), torch.tensor(int(40 * factor)))


def test_resize_ratio_from_large_to_small_is_refused(capsys):
    with pytest.raises(SystemExit):
        parse_args(["--task", "segmentation", "--resize_ratio", "2", "0.5"])
    assert "resize_ratio" in capsys.readouterr().err
