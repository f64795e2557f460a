"""Average precision by faster-coco-eval, over the detections of all processes."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from runtime.agreement import gather
from runtime.distributed import DistInfo
from tasks.base import Batch, Evaluator

from .boxes import rescaled
from .data import mask_tools
from .mask_rcnn import paste_masks

STATS = (
    *("AP_{}", "AP_{}50", "AP_{}75", "AP_{}_small", "AP_{}_medium", "AP_{}_large"),
    *("AR_{}1", "AR_{}10", "AR_{}100", "AR_{}_small", "AR_{}_medium", "AR_{}_large"),
)
"""COCO's twelve figures: precision over overlaps 0.5 to 0.95, at 0.5, at 0.75, and by the objects' sizes; recall with
one, ten and 100 detections per image, and by sizes."""


class CocoEvaluator(Evaluator):
    """Collects detections in COCO's format.

    Args:
        truth: gives the annotations, in COCO's format, to judge boxes (False) or masks (True) by.
        category_ids: their categories, in the order of the labels.
        first_label: the label of the first.
        masks: also evaluate masks.
        info: the processes whose images all count together.
    """

    def __init__(
        self,
        truth: Callable[[bool], dict[str, Any]],
        category_ids: list[int],
        first_label: int,
        masks: bool,
        info: DistInfo,
    ) -> None:
        self.truth, self.masks, self.info = truth, masks, info
        self.category_of = dict(enumerate(category_ids, start=first_label))
        self.found: list[dict[str, Any]] = []
        self.images: list[int] = []

    def update(self, outputs: list[dict[str, Tensor]], batch: Batch) -> None:
        for result, image_id, size, resized in zip(
            outputs, batch["image_ids"], batch["original_sizes"], batch["sizes"], strict=True
        ):
            self.images.append(image_id)
            self.found += self._entries(result, image_id, size, resized)

    def _entries(
        self, result: dict[str, Tensor], image_id: int, size: tuple[int, int], resized: tuple[int, int]
    ) -> list[dict[str, Any]]:
        boxes = rescaled(result["boxes"], resized, size)
        corners = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1).tolist()
        entries = [
            {"image_id": image_id, "category_id": self.category_of[label], "bbox": box, "score": score}
            for box, score, label in zip(corners, result["scores"].tolist(), result["labels"].tolist(), strict=True)
        ]
        if self.masks:
            tools = mask_tools()
            pasted = paste_masks(result["masks"], boxes, size).cpu().numpy()
            for entry, mask in zip(entries, pasted, strict=True):
                entry["segmentation"] = tools.encode(np.asfortranarray(mask.astype(np.uint8)))
        return entries

    def compute(self) -> dict[str, float]:
        parts = gather((self.images, self.found), self.info)
        images = sorted(image for seen, _ in parts for image in seen)
        # In one order, however many processes there were: equal scores are ranked by their place.
        found = sorted((entry for _, entries in parts for entry in entries), key=lambda entry: entry["image_id"])
        figures = {"images": len(images)}
        for kind, word in {"bbox": "box", **({"segm": "mask"} if self.masks else {})}.items():
            stats = zip(STATS, self._stats(found, images, kind), strict=True)
            figures |= {name.format(word): 100 * float(value) for name, value in stats if value >= 0}
        return figures

    def _stats(self, found: list[dict[str, Any]], images: list[int], kind: str) -> list[float]:
        from faster_coco_eval import COCO, COCOeval_faster

        truth = COCO(self.truth(kind == "segm"))
        evaluation = COCOeval_faster(truth, truth.loadRes(found), kind)
        evaluation.params.imgIds = images
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        return evaluation.stats[: len(STATS)]  # -1 where there is no such object
