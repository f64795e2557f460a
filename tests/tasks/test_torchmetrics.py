"""The figures of segmentation and detection, computed by torchmetrics as well."""

import pytest
import torch
from dense_cases import HEADS, SMALL
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex
from torchmetrics.detection import MeanAveragePrecision

from tasks.detection.task import Detection
from tasks.options import parse_args
from tasks.segmentation.metric import ConfusionMatrix
from tools import make_shapes


@pytest.mark.parametrize("classes", [3, 150])
def test_iou_and_accuracies_agree_with_torchmetrics(classes):
    generator = torch.Generator().manual_seed(classes)
    ours = ConfusionMatrix(classes)
    theirs = {
        "mIoU": MulticlassJaccardIndex(classes, ignore_index=255),
        "mAcc": MulticlassAccuracy(classes, average="macro", ignore_index=255),
        "aAcc": MulticlassAccuracy(classes, average="micro", ignore_index=255),
    }
    for _ in range(3):
        labels = torch.randint(0, classes, (2, 64, 64), generator=generator)
        kept = torch.rand(labels.shape, generator=generator) < 0.7
        found = torch.where(kept, labels, torch.randint(0, classes, labels.shape, generator=generator))
        labels[torch.rand(labels.shape, generator=generator) < 0.1] = 255
        ours.update(found, labels)
        for metric in theirs.values():
            metric.update(found, labels)
    figures = ours.compute()
    assert 0 < figures["mIoU"] < 100
    assert figures == pytest.approx({name: 100 * metric.compute().item() for name, metric in theirs.items()}, abs=1e-4)


def test_average_precision_agrees_with_torchmetrics(tmp_path):
    make_shapes.write(tmp_path, train=1, val=12, size=160)
    task = Detection(parse_args([*SMALL, *HEADS["retinanet"], "--head", "retinanet", "--data_path", str(tmp_path)]))
    _, val = task.sources()
    generator = torch.Generator().manual_seed(0)
    ours, theirs = task.evaluator(split=False), MeanAveragePrecision(backend="faster_coco_eval")
    for index in range(len(val)):
        sample = val[index]
        boxes, labels = sample["boxes"], sample["labels"] - 1
        moved = boxes + 4 * torch.randn(boxes.shape, generator=generator)
        moved = torch.cat([moved, boxes[:1] + 40])
        guessed = torch.where(torch.rand(len(labels), generator=generator) < 0.8, labels, (labels + 1) % 3)
        found = {"boxes": moved, "labels": torch.cat([guessed, guessed[:1]])}
        found["scores"] = torch.rand(len(moved), generator=generator)
        size = sample["original_size"]
        ours.update([found], {"image_ids": [sample["image_id"]], "original_sizes": [size], "sizes": [size]})
        theirs.update([found], [{"boxes": boxes, "labels": labels}])
    figures, expected = ours.compute(), theirs.compute()
    assert 5 < figures["AP_box"] < 95
    names = {"AP_box": "map", "AP_box50": "map_50", "AP_box75": "map_75"}
    for name, theirs_name in names.items():
        assert figures[name] == pytest.approx(100 * expected[theirs_name].item(), abs=1e-4)
