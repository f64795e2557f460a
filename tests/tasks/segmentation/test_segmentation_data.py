"""Images with index PNGs, from a folder."""

import numpy as np
from PIL import Image

from tasks.segmentation.data import IndexImages, class_names


def test_index_images_are_read_with_their_classes(tmp_path):
    for kind in ("images", "annotations"):
        (tmp_path / kind / "train").mkdir(parents=True)
    Image.new("L", (5, 4), 200).save(tmp_path / "images" / "train" / "a.png")
    labels = np.array([[0, 1, 2, 0, 1]] * 4, np.uint8)
    Image.fromarray(labels).save(tmp_path / "annotations" / "train" / "a.png")
    (tmp_path / "classes.txt").write_text("road\nsky\n")
    sample = IndexImages(tmp_path, "train", class_names(tmp_path, None), reduce_zero=True)[0]
    assert (sample["image"].mode, sample["image"].size) == ("RGB", (5, 4))
    assert np.asarray(sample["labels"]).tolist() == [[255, 0, 1, 255, 0]] * 4
