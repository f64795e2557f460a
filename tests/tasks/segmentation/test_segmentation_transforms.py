"""Images and label maps on their way into training."""

import numpy as np
import pytest
import torch
from PIL import Image

from tasks.segmentation.transforms import TrainTransform


def stripes(width, height, each):
    """An image of dark and bright stripes, and their classes 0 and 1."""
    labels = np.broadcast_to(np.arange(width) // each % 2, (height, width)).astype(np.uint8)
    return {"image": Image.fromarray(labels * 255).convert("RGB"), "labels": Image.fromarray(labels)}


def test_labels_stay_with_their_pixels():
    transform = TrainTransform(crop=64, bounds=(120, 60))
    transform.distort = torch.nn.Identity()
    whole = set()
    for seed in range(12):
        torch.manual_seed(seed)
        sample = transform(stripes(150, 75, 50))
        image, labels = sample["image"], sample["labels"]
        assert (image.shape, labels.shape) == ((3, 64, 64), (64, 64))
        shown = labels != 255
        bright = image.float().mean(0) > 128
        assert (bright == labels.bool())[shown].float().mean() > 0.95
        assert torch.equal(image[:, ~shown].unique(dim=1), torch.tensor([[124], [116], [104]])[:, : (~shown).any()])
        whole.add(shown.all().item())
    assert whole == {True, False}  # crops, and images smaller than one


@pytest.mark.parametrize(("most", "least_mixed"), [(0.75, 27), (1.0, 0)])
def test_crops_of_mostly_one_class_are_drawn_again(most, least_mixed):
    transform, mixed = TrainTransform(crop=20, bounds=(400, 40), ratio=(1, 1), most=most), 0
    for seed in range(30):
        torch.manual_seed(seed)
        labels = transform(stripes(400, 40, 40))["labels"]
        mixed += labels.flatten().bincount().max() < 0.75 * labels.numel()
    assert mixed >= least_mixed
    assert least_mixed or mixed < 27


def test_image_of_one_class_is_cropped_all_the_same():
    labels = TrainTransform(crop=20, bounds=(40, 40), ratio=(1, 1))(stripes(40, 40, 40))["labels"]
    assert torch.equal(labels, torch.zeros(20, 20).long())
