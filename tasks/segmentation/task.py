"""Semantic segmentation as the engine sees it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from runtime.agreement import decide
from runtime.distributed import DistInfo, all_reduce_sum
from runtime.errors import UsageError
from runtime.options import option
from tasks.base import Batch, Evaluator, Prediction, Sample
from tasks.dense import DenseOptions, DenseTask
from tasks.drawing import draw_classes

from .data import IndexImages, class_names
from .heads import resize
from .inference import augmented, sliding_window
from .metric import ConfusionMatrix
from .model import AUXILIARY_WEIGHT, pixel_cross_entropy, semantic_fpn, upernet
from .transforms import EvalTransform, TrainTransform

HEADS = {"semantic_fpn": semantic_fpn, "upernet": upernet}
MULTI_SCALE = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)


@dataclass
class SegmentationOptions:
    """Segmentation (`--task segmentation`)"""

    data_path: str = option("", "folder with images/ and annotations/, each with train/ and val/ (or training/, …)")
    num_classes: int | None = option(None, "classes; null: as many as the data names", at_least=1, at_most=255)
    reduce_zero: bool = option(False, "number 0 means ignored and classes count from 1, as in ADE20K")
    head: str = option("semantic_fpn", "what turns the backbone's maps into classes", choices=tuple(HEADS))
    head_channels: int | None = option(
        None, "channels of the head; null: 256 (semantic_fpn) or 512 (upernet)", at_least=2
    )
    crop: int = option(512, "side of training crops, and of windows in evaluation, in pixels", at_least=1)
    resize_ratio: list[float] = option(
        [0.5, 2.0],
        "in training, images are resized by a random factor besides: smallest, largest",
        above=0,
        counts=(2,),
        ascending=True,
    )
    longest: int = option(2048, "images are resized to fit `longest` x `shortest`, either way round", at_least=1)
    shortest: int = option(512, "see `longest`", at_least=1)
    test_mode: str = option("whole", "evaluate images whole, or by windows of --crop", choices=("whole", "slide"))
    test_stride: int | None = option(None, "pixels from window to window; null: two thirds of --crop", at_least=1)
    test_augment: bool = option(False, "in evaluation, average over six scales, and over mirror images")


class Counts(Evaluator):
    """mIoU, mAcc and aAcc. info: the processes whose images all count together; None: this one's alone."""

    def __init__(self, num_classes: int, device: torch.device, info: DistInfo | None = None) -> None:
        self.matrix, self.info = ConfusionMatrix(num_classes, device), info
        self.images = torch.zeros((), dtype=torch.int64, device=device)

    def update(self, outputs: Tensor, batch: Batch) -> None:
        """Take in logits (B, K, H, W) and "labels" (B, H, W)."""
        self.matrix.update(outputs.argmax(1), batch["labels"])
        self.images += len(outputs)

    def compute(self) -> dict[str, float]:
        if self.info is not None:
            all_reduce_sum(self.matrix.counts, self.info)
            all_reduce_sum(self.images, self.info)
        if not self.matrix.counts.any():
            raise UsageError("no pixel of the evaluation's annotations has a class; --reduce_zero may be wrong")
        return {**self.matrix.compute(), "images": int(self.images)}


class Segmentation(DenseTask):
    """A class per pixel, judged by mIoU. Batches have "labels": (B, H, W) int64, 255 where nothing counts.

    Images to evaluate come one by one, resized, with labels at the original size.
    """

    options = lasting = (DenseOptions, SegmentationOptions)
    metric = "mIoU"
    title = "mIoU"
    figures: ClassVar[dict[str, str]] = {"mIoU": "mIoU", "mAcc": "mAcc", "aAcc": "aAcc"}

    def sources(self, trained: Sequence[str] = ()) -> tuple[Dataset | None, Dataset]:
        opts, root = self.opts, self.data_folder()

        def find() -> tuple[Dataset | None, Dataset]:
            classes = class_names(root, opts.num_classes)
            read = partial(
                IndexImages,
                root,
                classes=classes,
                reduce_zero=opts.reduce_zero,
                max_pixels=opts.max_image_pixels,
            )
            return None if opts.eval else read("train"), read("val")

        train, val = decide(find, self.info)
        self.classes, self.num_classes = val.classes, len(val.classes)
        return train, val

    def transform(self, train: bool) -> Callable[[Sample], Sample]:
        bounds, ratio = (self.opts.longest, self.opts.shortest), tuple(self.opts.resize_ratio)
        return TrainTransform(self.opts.crop, bounds, ratio) if train else EvalTransform(*bounds)

    def build_model(self) -> nn.Module:
        channels = {"channels": self.opts.head_channels} if self.opts.head_channels else {}
        return self.finished(HEADS[self.opts.head](*self.build_body(), self.num_classes, **channels))

    def preprocess(self, batch: Batch, train: bool) -> Batch:
        return {**batch, "images": self.normalize(batch["images"])}

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        """Return both heads' logits in training, and class scores (B, K, H, W) at the labels' size in evaluation."""
        images = batch["images"]
        if model.training:
            return model(images)
        opts, size, network = self.opts, batch["labels"].shape[1:], model
        if opts.test_mode == "slide":
            stride = opts.test_stride or max(opts.crop * 2 // 3, 1)
            network = partial(sliding_window, model, crop=(opts.crop,) * 2, stride=(stride,) * 2)
        if opts.test_augment:
            return augmented(network, images, size, MULTI_SCALE, flip=True)
        return resize(network(images), size)

    def loss(self, outputs: tuple[Tensor, Tensor], batch: Batch) -> dict[str, Tensor]:
        decoder, auxiliary = (pixel_cross_entropy(logits, batch["labels"]) for logits in outputs)
        return {
            "loss": decoder + AUXILIARY_WEIGHT * auxiliary,
            "loss_decoder": decoder,
            "loss_auxiliary": auxiliary,
        }

    def evaluator(self, split: bool) -> Evaluator:
        return Counts(self.num_classes, self.device, self.info if split else None)

    def report(self, metrics: dict[str, float]) -> list[str]:
        figures = " ".join(f"{name} {metrics[name]:.2f}" for name in self.figures)
        return [f"* {figures} on {metrics['images']} images"]

    @torch.no_grad()
    def predict(self, model: nn.Module, image: Image.Image, least: float = 0.3) -> Prediction:
        """Say each class's share of the pixels, largest first, and paint the classes over the image."""
        batch = self.batch_of(image, labels=Image.new("L", image.size))
        numbers = self.forward(model, batch)[0].argmax(0).cpu()
        counts = numbers.flatten().bincount(minlength=self.num_classes)
        ranked = [number for number in counts.argsort(descending=True, stable=True).tolist() if counts[number]]
        lines = [f"{counts[number] / numbers.numel():6.1%}  {self.classes[number]}" for number in ranked]
        return Prediction(lines, draw_classes(image, numbers, {number: self.classes[number] for number in ranked}))
