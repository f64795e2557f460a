"""Images and objects in COCO's format."""

import json

import pytest
from dense_cases import HEADS, SMALL
from PIL import Image

from tasks.detection.data import CocoImages, find_split
from tasks.detection.task import Detection
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
