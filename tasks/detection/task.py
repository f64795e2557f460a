"""Object detection as the engine sees it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from runtime.agreement import decide
from runtime.distributed import DistInfo
from runtime.errors import UsageError, note
from runtime.options import option
from tasks.base import Batch, Evaluator, Prediction, Sample
from tasks.dense import DenseOptions, DenseTask
from tasks.drawing import draw_objects

from .boxes import rescaled
from .data import CocoImages, find_split, mask_tools
from .evaluator import CocoEvaluator
from .mask_rcnn import paste_masks
from .model import mask_rcnn, retinanet
from .rtdetrv2 import library, rtdetrv2
from .transforms import Transform

HEADS = {"mask_rcnn": mask_rcnn, "retinanet": retinanet, "rtdetrv2": rtdetrv2}


@dataclass
class DetectionOptions:
    """Detection (`--task detection`)"""

    data_path: str = option("", "folder with train2017/, val2017/ and annotations/instances_*.json, as COCO's")
    head: str = option("mask_rcnn", "the detector around the backbone", choices=tuple(HEADS))
    head_channels: int = option(256, "channels of the pyramid and of the heads", at_least=1)
    roi_samples: int = option(512, "proposals per image that Mask R-CNN's heads learn from", at_least=4)
    longest: int = option(1333, "images are resized to fit `longest` x `shortest`, either way round", at_least=1)
    shortest: int = option(800, "see `longest`", at_least=1)
    groups: str = option(
        "shape",
        "which images share an update in training: `shape`: wide ones or others, for less padding; `none`: any",
        choices=("shape", "none"),
    )


class Detection(DenseTask):
    """Objects' boxes, and with Mask R-CNN their masks, judged by COCO's average precision of boxes.

    Batches have "images", a list of (3, H, W), "targets", a list of dicts (see `mask_rcnn.Target`), "image_ids", and
    the images' (height, width) as loaded, "original_sizes", and as resized, "sizes".
    """

    options = lasting = (DenseOptions, DetectionOptions)
    metric = "AP_box"
    title = "AP_box"

    @property
    def masks(self) -> bool:
        return self.opts.head == "mask_rcnn"

    @property
    def first_label(self) -> int:
        """The model's label of the first class: 0 is Mask R-CNN's background."""
        return 1 if self.masks else 0

    @property
    def figures(self) -> dict[str, str]:
        names = ("AP_box", "AP_box50", *(("AP_mask", "AP_mask50") if self.masks else ()))
        return {name: name for name in names}

    def check(self) -> None:
        super().check()
        mask_tools()
        if self.opts.head == "rtdetrv2":
            library()

    def sources(self, trained: Sequence[str] = ()) -> tuple[Dataset | None, Dataset]:
        root, masks = self.data_folder(), self.masks

        def find() -> list[CocoImages]:
            splits = ("val",) if self.opts.eval else ("train", "val")
            return [CocoImages(*find_split(root, split), masks, self.opts.max_image_pixels) for split in splits]

        found = decide(find, self.info)
        self.val, train = found[-1], None if self.opts.eval else found[0]
        if train is not None and train.classes != self.val.classes:
            raise UsageError(f"{train.file} and {self.val.file} have different categories")
        if self.info.is_main:
            for line in filter(None, (source.said_of_left_out() for source in found)):
                note(line)
        self.classes, self.num_classes = self.val.classes, len(self.val.classes)
        return train, self.val

    def transform(self, train: bool) -> Callable[[Sample], Sample]:
        return Transform(self.opts.longest, self.opts.shortest, flip=0.5 if train else 0.0)

    def groups(self, train: CocoImages) -> Tensor | None:
        return train.wide if self.opts.groups == "shape" else None

    def order(self) -> dict[str, Any]:
        return {"groups": self.opts.groups}

    def collate(self, samples: list[Sample]) -> Batch:
        keys = ("boxes", "labels", "masks") if self.masks else ("boxes", "labels")
        return {
            "images": [sample["image"] for sample in samples],
            "targets": [{key: sample[key] for key in keys} for sample in samples],
            "image_ids": [sample["image_id"] for sample in samples],
            "original_sizes": [sample["original_size"] for sample in samples],
            "sizes": [tuple(sample["image"].shape[1:]) for sample in samples],
        }

    def build_model(self) -> nn.Module:
        sampled = {"sampled": self.opts.roi_samples} if self.masks else {}
        head = partial(HEADS[self.opts.head], channels=self.opts.head_channels, **sampled)
        return self.finished(head(*self.build_body(), self.num_classes))

    def preprocess(self, batch: Batch, train: bool) -> Batch:
        targets = [{**target, "labels": target["labels"] - 1 + self.first_label} for target in batch["targets"]]
        return {**batch, "images": [self.normalize(image) for image in batch["images"]], "targets": targets}

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        """Return losses by name in training, and detections on the resized images in evaluation."""
        return model(batch["images"], batch["targets"] if model.training else None)

    def loss(self, outputs: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        return {"loss": sum(outputs.values()), **outputs}

    def evaluator(self, split: bool) -> Evaluator:
        return CocoEvaluator(
            self.val.truth, self.val.category_ids, self.first_label, self.masks, self.info if split else DistInfo()
        )

    def report(self, metrics: dict[str, float]) -> list[str]:
        kinds = ("AP_box", "AP_mask") if self.masks else ("AP_box",)
        return [
            f"* {kind} {metrics[kind]:.2f} at 0.5: {metrics[f'{kind}50']:.2f} at 0.75: {metrics[f'{kind}75']:.2f} "
            f"on {metrics['images']} images"
            for kind in kinds
        ]

    @torch.no_grad()
    def predict(self, model: nn.Module, image: Image.Image, least: float = 0.3) -> Prediction:
        """Say each object's score, class and box (x1, y1, x2, y2), best first, and draw them over the image."""
        size = (image.height, image.width)
        nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long(), "image_id": 0, "original_size": size}
        batch = self.batch_of(image, **nothing, masks=torch.zeros(0, *size).byte())
        (found,) = self.forward(model, batch)
        found = {name: value[found["scores"] >= least] for name, value in found.items()}
        boxes = rescaled(found["boxes"], batch["sizes"][0], size).cpu()
        masks = paste_masks(found["masks"].cpu(), boxes, size) if self.masks else None
        numbers, scores = (found["labels"] - self.first_label).tolist(), found["scores"].tolist()
        lines = [
            f"{score:6.1%}  {self.classes[number]}  {' '.join(f'{edge:.0f}' for edge in box)}"
            for number, score, box in zip(numbers, scores, boxes.tolist(), strict=True)
        ]
        words = [f"{self.classes[number]} {score:.0%}" for number, score in zip(numbers, scores, strict=True)]
        return Prediction(lines or ["no objects"], draw_objects(image, boxes, numbers, words, masks))
