"""Classification as the engine sees it."""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from timm.data import ImageNetInfo, Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from models.labels import in_words, labels_of
from models.pixels import normalize
from models.weights import count_classes, load_to_finetune
from runtime.errors import UsageError
from runtime.model import build_model, check_model_name, classifiers_of
from runtime.samplers import REPEATS
from runtime.storage import read_patiently
from tasks.base import Batch, Evaluator, Prediction, Sample, Task

from .augmentation import DrawnTransform, augment, grouped
from .distillation import add_answers
from .eval_sets import TITLES, open_eval_set
from .evaluator import TopK
from .listing import decide_listed
from .losses import DenseLoss, build_loss
from .options import (
    AugmentationOptions,
    DataOptions,
    DistillationOptions,
    MixingOptions,
    check_data,
    check_distillation,
    check_mixing,
    lessons_of,
    mixing,
)
from .sources import LISTED, Samples, choose_classes, class_numbers, open_sources
from .teacher import build_teacher
from .transforms import ImageTransform, eval_transform, pixels_for, train_transform

PIXEL_OPTIONS = ("input_size", "crop_pct", "interpolation", "mean", "std")


class Classification(Task):
    """One class per image, judged by top-1 accuracy. Batches have "targets": (B,) int64, or shares (B, C)."""

    options = (DataOptions, AugmentationOptions, MixingOptions, DistillationOptions)
    checks = (check_mixing, check_data, check_distillation)
    metric = "acc1"
    title = "accuracy"
    figures: ClassVar[dict[str, str]] = {"acc1": "top-1", "acc5": "top-5"}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.pixels = pixels_for(self.opts)
        self.repeats = REPEATS if self.opts.repeated_aug else 1
        self.named = False
        self._subset: list[int] | None = None

    def check(self) -> None:
        if self.opts.eval:
            return
        if lessons_of(self.opts):
            check_model_name(self.opts.teacher_model, "--teacher_model")
        self.transform(train=True)

    # -- data

    def sources(self, trained: Sequence[str] = ()) -> tuple[Dataset | None, Dataset]:
        train, test = self._open(list(trained))
        self.held_out = getattr(test, "held_out", [])
        found = getattr(test if train is None else train, "classes", [])
        self.named, self.classes = bool(found), choose_classes(self.opts, found, list(trained))
        self.num_classes = self.opts.num_classes or len(self.classes)
        if self.num_classes == 0:
            raise UsageError(
                f"--data_set {self.opts.data_set} does not say how many classes it has; pass --num_classes"
            )
        if self.num_classes < len(self.classes):
            raise UsageError(
                f"--num_classes {self.num_classes} is fewer than the {len(self.classes)} classes of the data"
            )
        return None if train is None else self._numbered(train), self._numbered(test)

    def _open(self, trained: list[str]) -> tuple[Dataset | None, Dataset]:
        opts = self.opts
        if opts.eval_set != "val":
            (source,) = decide_listed(lambda: (open_eval_set(opts),), self.info)
            if trained and trained != source.classes:
                raise UsageError(f"--eval_set {opts.eval_set} has ImageNet's 1000 classes, {opts.resume} others")
            self._subset = source.class_subset
            return None, source
        if opts.data_set not in LISTED:
            train, test = open_sources(opts)
        else:
            place = f"--data_path {opts.data_path}"
            choose = partial(read_patiently, lambda: open_sources(opts, self.held_out), place)
            train, test = decide_listed(choose, self.info)
        return None if opts.eval else train, test

    def _numbered(self, source: Dataset) -> Dataset:
        numbers = class_numbers(source, self.classes, self.opts)
        if isinstance(source, IterableDataset):
            source.numbers = numbers
            return source
        return Samples(source, numbers)

    def transform(self, train: bool) -> Callable[[Sample], Sample]:
        if not train:
            return ImageTransform(eval_transform(self.opts))
        transform = train_transform(self.opts)
        if self.opts.augment_on == "device":
            return DrawnTransform(transform, self.opts.aa, self.opts.input_size)
        return ImageTransform(transform)

    def collate(self, samples: list[Sample]) -> Batch:
        drawn = {}
        if "steps" in samples[0]:
            flips, steps = ([sample[name] for sample in samples] for name in ("flip", "steps"))
            drawn = {"drawn": grouped(flips, steps)}
            samples = [{name: sample[name] for name in sample if name not in ("flip", "steps")} for sample in samples]
        batch = super().collate(samples)
        return {"images": batch.pop("images"), "targets": batch.pop("target"), **batch, **drawn}

    def order(self) -> dict[str, Any]:
        return {"data_set": self.opts.data_set, "repeated_aug": self.opts.repeated_aug}

    # -- model

    def build_model(self) -> nn.Module:
        model = build_model(self.opts, self.num_classes)
        if not self.opts.eval:
            criterion = self.criterion  # a teacher that cannot be had is told before training begins
            if isinstance(criterion, DenseLoss):
                add_answers(model, criterion.image.teacher, self.num_classes)
        return model

    def load_pretrained(self, model: nn.Module, weights: dict[str, Tensor], trained: Sequence[str], path: Path) -> list:
        if trained and self.classes and list(trained) != list(self.classes):
            weights = without_classifier(model, weights)
        auxiliary = getattr(model, "auxiliary", None)
        if auxiliary is None:
            return load_to_finetune(model, weights, path)
        del model.auxiliary
        fresh = load_to_finetune(model, weights, path)
        model.auxiliary = auxiliary
        return [*fresh, "auxiliary"]

    # -- training and evaluation

    def preprocess(self, batch: Batch, train: bool) -> Batch:
        images, targets = batch["images"], batch["targets"]
        if "drawn" in batch:
            images = augment(images, batch["drawn"])
        images = normalize(images, self.pixels)
        if train:
            if self._erase is not None:
                images = self._erase(images)
            if self._mixup is not None:
                images, targets = self._mixup(images, targets)
        return {"images": images, "targets": targets}

    @cached_property
    def _erase(self) -> RandomErasing | None:
        """What erases a part of some images (arXiv 1708.04896); None if it is off."""
        opts = self.opts
        if opts.reprob == 0:
            return None
        return RandomErasing(opts.reprob, mode=opts.remode, max_count=opts.recount, device=self.device)

    @cached_property
    def _mixup(self) -> Mixup | None:
        """What mixes batches and smooths their labels; None if mixing is off."""
        opts = self.opts
        if not mixing(opts):
            return None
        return Mixup(
            mixup_alpha=opts.mixup,
            cutmix_alpha=opts.cutmix,
            cutmix_minmax=opts.cutmix_minmax,
            prob=opts.mixup_prob,
            switch_prob=opts.mixup_switch_prob,
            mode=opts.mixup_mode,
            label_smoothing=opts.smoothing,
            num_classes=self.num_classes,
        )

    @cached_property
    def criterion(self) -> nn.Module:
        """The loss, called as criterion(images, outputs, targets), with its teacher if there is one."""
        classes = self.classes if self.named else ()
        teacher = build_teacher(self.opts, self.num_classes, self.pixels, self.device, classes)
        return build_loss(self.opts, teacher)

    def loss(self, outputs: Any, batch: Batch) -> dict[str, Tensor]:
        found = self.criterion(batch["images"], outputs, batch["targets"])
        return found if isinstance(found, dict) else {"loss": found}

    def evaluator(self, split: bool) -> Evaluator:
        return TopK(self.device, self.info if split else None, self._subset)

    def report(self, metrics: dict[str, float]) -> list[str]:
        """The two lines that the published scripts print."""
        prefix = "" if self.opts.eval_set == "val" else f"{TITLES[self.opts.eval_set]}: "
        images, accuracy = metrics["images"], metrics["acc1"]
        return [
            f"{prefix}* Acc@1 {accuracy:.3f} Acc@5 {metrics['acc5']:.3f} loss {metrics['loss']:.3f}",
            f"{prefix}Accuracy of the network on the {images} test images: {accuracy:.1f}%",
        ]

    def notes(self, trained: dict[str, Any], classes: Sequence[str]) -> list[str]:
        lines = []
        names = [name for name in PIXEL_OPTIONS if name in trained and trained[name] != getattr(self.opts, name)]
        if names:
            there, here = (" ".join(f"--{n} {of[n]}" for n in names) for of in (trained, vars(self.opts)))
            lines.append(f"trained with {there}, evaluated with {here}")
        known = bool(classes) or list(self.classes) == ImageNetInfo().label_names()
        if self.named != known and (self.named or classes):
            nameless = self.opts.resume if self.named else f"--data_set {self.opts.data_set}"
            lines.append(f"{nameless} does not name its classes: they go by number")
        return lines

    # -- a trained model in use

    def recall(self, checkpoint: Mapping[str, Any], weights: Mapping[str, Tensor], path: str | Path) -> None:
        self.num_classes = count_classes(weights, self.opts.model, path)
        self.classes = labels_of(checkpoint, self.num_classes)

    @torch.no_grad()
    def likeliest(self, model: nn.Module, image: Image.Image, most: int = 5) -> list[tuple[str, float]]:
        """Return the `most` likely classes, best first, with their probabilities in 0..1; synsets by what they mean.

        Raises:
            UsageError: the model cannot take images of --input_size.
        """
        pixels = self.transform(train=False)({"image": image})["image"]
        try:
            logits = model(normalize(pixels[None].to(self.device), self.pixels))
        except (AssertionError, RuntimeError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            raise UsageError(f"--input_size {self.opts.input_size}: {reason}") from error
        top = logits[0].float().softmax(-1).topk(min(most, logits.shape[-1]))
        names = in_words(self.classes[index] for index in top.indices.tolist())
        return list(zip(names, top.values.tolist(), strict=True))

    def predict(self, model: nn.Module, image: Image.Image, least: float = 0.3) -> Prediction:
        """Say the five likeliest classes."""
        return Prediction([f"{probability:6.1%}  {name}" for name, probability in self.likeliest(model, image)])


def without_classifier(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights that do not belong to the classifier, which was trained on other classes."""
    return {name: value for name, value in weights.items() if not name.startswith(classifiers_of(model))}
