"""Images and objects in COCO's format."""

import json

from PIL import Image

from tasks.detection.data import CocoImages, find_split


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
