"""Images and objects in COCO's format."""

import json

import pytest
import torch
from dense_cases import HEADS, SMALL
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from runtime.distributed import DistInfo
from runtime.errors import UsageError
from tasks.detection.data import CocoImages, find_split
from tasks.detection.evaluator import CocoEvaluator
from tasks.detection.task import Detection
from tasks.detection.transforms import Transform
from tasks.loading import build_data
from tasks.options import parse_args
from tools import make_shapes


def test_coco_images_are_read_with_their_objects(tmp_path):
    for folder in ("train", "annotations"):
        (tmp_path / folder).mkdir()
    Image.new("L", (8, 6), 200).save(tmp_path / "train" / "a.png")
    objects = [{"id": 1, "image_id": 3, "category_id": 7, "bbox": [1, 2, 3, 4], "area": 12, "iscrowd": 0}]
    content = {
        "images": [{"id": 3, "file_name": "a.png", "width": 8, "height": 6}],
        "annotations": objects,
        "categories": [{"id": 7, "name": "owl"}],
    }
    (tmp_path / "annotations" / "instances_train.json").write_text(json.dumps(content))
    images = CocoImages(*find_split(tmp_path, "train"), masks=False)
    assert images.classes == ["owl"]
    sample = images[0]
    assert (sample["image"].mode, sample["image"].size) == ("RGB", (8, 6))
    assert (sample["boxes"].tolist(), sample["labels"].tolist()) == ([[1.0, 2.0, 4.0, 6.0]], [1])


def test_training_sees_images_of_like_proportions_together_and_opens_none_to_know_them(tmp_path, monkeypatch):
    make_shapes.write(tmp_path, train=40, val=1, size=64)
    content = json.loads((tmp_path / "annotations" / "instances_train.json").read_text())
    wide = [image["width"] > image["height"] for image in content["images"]]
    assert 8 < sum(wide) < 32
    monkeypatch.setattr(Image, "open", lambda *args: pytest.fail("an image was opened"))

    def batches(*argv):
        run = parse_args([*SMALL, *HEADS["retinanet"], "--head", "retinanet", "--data_path", str(tmp_path), *argv])
        order = [key.index for key in build_data(Detection(run), run).train.sampler]
        return [{wide[index] for index in order[start : start + 8]} for start in range(0, 40, 8)]

    assert sum(len(kinds) > 1 for kinds in batches("--batch_size", "4", "--accum_steps", "2")) == 1  # the last
    assert sum(len(kinds) > 1 for kinds in batches("--batch_size", "8", "--groups", "none")) > 2


# -- annotations that say anything

NUMBERS = st.one_of(st.integers(-9, 99), st.floats(width=32), st.just(10**400))
JUNK = st.one_of(
    st.none(), st.booleans(), NUMBERS, st.text(max_size=9), st.lists(NUMBERS, max_size=9), st.just({}), st.just([[]])
)
SEGMENTATIONS = st.one_of(
    st.lists(st.lists(NUMBERS | st.text(max_size=2), max_size=9), max_size=3),
    st.builds(lambda counts: {"size": [6, 8], "counts": counts}, JUNK | st.just([10, 20, 18]) | st.just("1203400")),
)
FIELDS = ("image_id", "category_id", "bbox", "area", "iscrowd", "segmentation", "id")


@pytest.fixture(scope="module")
def owls(tmp_path_factory):
    """A function of annotations: the data with one sound object, and these besides."""
    root = tmp_path_factory.mktemp("owls")
    Image.new("L", (8, 6), 200).save(root / "a.png")
    sound = {"id": 1, "image_id": 3, "category_id": 7, "bbox": [1, 2, 3, 4], "area": 12, "iscrowd": 0}
    sound["segmentation"] = [[1, 2, 4, 2, 4, 6, 1, 6]]

    def write(changes, masks=True):
        odd = [change if isinstance(change, int) else {**sound, **change} for change in changes]
        content = {
            "images": [{"id": 3, "file_name": "a.png", "width": 8, "height": 6}],
            "annotations": [sound, *odd],
            "categories": [{"id": 7, "name": "owl"}],
        }
        (root / "owls.json").write_text(json.dumps(content))
        return CocoImages(root, root / "owls.json", masks=masks)

    return write


@settings(max_examples=150, derandomize=True, deadline=None)
@given(
    changes=st.lists(st.dictionaries(st.sampled_from(FIELDS), JUNK | SEGMENTATIONS) | st.integers(0, 9), max_size=4),
    masks=st.booleans(),
)
def test_no_annotation_ends_a_training_or_an_evaluation(owls, changes, masks):
    images = owls(changes, masks)
    sample = Transform(16, 12)(images[0])
    count = len(changes) + 1 - len(images.problems)
    assert len(sample["boxes"]) == count >= 1
    if masks:
        assert sample["masks"].shape == (count, 12, 16)
    evaluator = CocoEvaluator(images.truth, [7], 1, masks, DistInfo())
    found = {"boxes": torch.tensor([[1.0, 2, 4, 6]]), "labels": torch.tensor([1]), "scores": torch.tensor([0.9])}
    shown = {"image_ids": [3], "original_sizes": [(6, 8)], "sizes": [(6, 8)]}
    evaluator.update([{**found, "masks": torch.ones(1, 1, 28, 28)}], shown)
    assert evaluator.compute()["AP_box"] >= 0


@pytest.mark.parametrize(("kind", "field"), [("images", "width"), ("images", "id"), ("categories", "name")])
def test_json_whose_images_or_categories_lack_something_is_named(owls, kind, field):
    images = owls([])
    content = json.loads(images.file.read_text())
    del content[kind][0][field]
    images.file.write_text(json.dumps(content))
    with pytest.raises(UsageError, match=rf"owls.json is not in COCO's format: {kind}\[0\] has no usable {field}"):
        CocoImages(images.folder, images.file, masks=False)
