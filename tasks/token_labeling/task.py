"""Token labelling (Jiang et al., "All Tokens Matter", arXiv 2104.10858) for pyramids, as the engine sees it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from runtime.agreement import decide
from runtime.errors import UsageError
from runtime.model import build_model
from runtime.options import option
from tasks.base import Batch, Sample
from tasks.classification.distillation import feature_distance
from tasks.classification.losses import soft_cross_entropy
from tasks.classification.options import FEATURES, HOW_FAR, TOKENS, AugmentationOptions, DataOptions, check_data
from tasks.classification.sources import name_in, names_in
from tasks.classification.task import Classification
from tasks.classification.transforms import train_transform

from .maps import COMMAND, PublishedMaps, ShardedMaps, open_maps
from .model import add_auxiliary, token_grids
from .transform import MapTransform, crop_maps, dense_map

AGREED, DISAGREED = 0.9, 0.5
"""What share a blended class target gives the map where its likeliest class is the label, and where it is not."""
STRIDE = 32
EVAL_SHARE = 0.5
"""What the tokens' scores count for with --tl_eval_blend, as published."""


@dataclass
class TokenLabelingOptions:
    """Token labelling (`--task token_labeling`)"""

    tl_maps: str = option("", "folder of label maps (`python -m tasks.token_labeling.generate`), or the published ones")
    tl_cls_weight: float = option(1.0, "weight of the loss of the image's class", at_least=0)
    tl_dense_weight: float = option(0.5, "weight of the mean loss of the tokens' classes", at_least=0)
    tl_feature_weight: float = option(
        0.0, "weight of the mean loss of the tokens' features, which the maps must hold", at_least=0
    )
    tl_feature_loss: str = option(
        "cosine", f"how far features are from the teacher's: {HOW_FAR}", choices=("cosine", "smooth_l1")
    )
    tl_target: str = option(
        "map",
        "target of the image's class: the mean of its part of the map; the smoothed label; or a blend, of which the "
        f"map is {AGREED} where its likeliest class is the label, else {DISAGREED}",
        choices=("map", "label", "blend"),
    )
    tl_stage3: bool = option(False, "label the tokens at stride 16, too, with a classifier of their own")
    tl_mix: bool = option(True, "MixToken: swap a box of whole tokens between images, targets with it")
    tl_eval_blend: bool = option(
        False,
        f"evaluate with {EVAL_SHARE} x the tokens' largest scores added; with --eval it needs checkpoint.pth, since "
        "best.pth leaves the tokens' classifiers out",
    )


def check_token_labeling(options: Any) -> None:
    """UsageError if there is nothing to learn from, or a model that would not answer for its tokens."""
    if options.eval:
        return
    if not options.tl_maps:
        raise UsageError("--task token_labeling needs --tl_maps; python -m tasks.token_labeling.generate makes them")
    if not options.tl_cls_weight + options.tl_dense_weight + options.tl_feature_weight:
        raise UsageError("--tl_cls_weight 0 and --tl_dense_weight 0 leave nothing to learn")
    if options.input_size % STRIDE:
        raise UsageError(f"--input_size {options.input_size}: tokens fill an image of a multiple of {STRIDE} pixels")
    if options.augment_on == "device":
        raise UsageError("--augment_on device goes with --task classification alone; leave it out")
    if options.finetune_eval_mode:
        raise UsageError("--finetune_eval_mode goes with --task classification alone; leave it out")


class Mapped(Dataset):
    """Samples with their maps."""

    def __init__(self, source: Dataset, maps: ShardedMaps | PublishedMaps, data_path: str) -> None:
        self.source, self.maps, self.data_path = source, maps, data_path

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        return {**self.source[index], **self.maps.read(index, name_in(self, self.data_path, index))}

    def name_of(self, index: int) -> str:
        return self.source.name_of(index)


class TokenLabeling(Classification):
    """Classification that also learns what a teacher sees at every place. Without mixup: MixToken takes its place."""

    options = (DataOptions, AugmentationOptions, TokenLabelingOptions)
    checks = (check_token_labeling, check_data)
    _mixup = None
    maps: ShardedMaps | PublishedMaps

    def check(self) -> None:
        if not self.opts.eval:
            self.transform(train=True)

    def sources(self, trained: Sequence[str] = ()) -> tuple[Dataset | None, Dataset]:
        train, test = super().sources(trained)
        if train is None:
            return None, test
        opts = self.opts
        if isinstance(train, IterableDataset):
            raise UsageError(f"--data_set {opts.data_set} is a stream, whose images have no maps; use files or TAR")
        names = names_in(train, opts.data_path)
        maps = decide(lambda: open_maps(opts.tl_maps, names, self.classes, self.num_classes), self.info)
        check_parts(opts, maps)
        self.maps = maps
        return Mapped(train, maps, opts.data_path), test

    def transform(self, train: bool) -> Callable[[Sample], Sample]:
        return MapTransform(train_transform(self.opts), self.opts.aa) if train else super().transform(train)

    def collate(self, samples: list[Sample]) -> Batch:
        moved = [number for number, sample in enumerate(samples) if sample.get("moved")]
        return {**super().collate(samples), "moved": moved}

    # -- model

    def build_model(self) -> nn.Module:
        opts, model = self.opts, build_model(self.opts, self.num_classes)
        if not opts.eval or opts.tl_eval_blend:
            add_auxiliary(model, self._widths(), opts.tl_stage3, opts.tl_eval_blend)
            self.grids = token_grids(model, opts.input_size)
        return model

    def _widths(self) -> dict[str, int]:
        """What the auxiliary layers answer, and how much of it."""
        opts, widths = self.opts, {}
        if opts.tl_eval_blend or self.maps.labels:
            widths[TOKENS] = self.num_classes
        if opts.tl_feature_weight and not opts.eval:
            widths[FEATURES] = self.maps.basis.width
        return widths

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        outputs = model(batch["images"])
        if model.training or isinstance(outputs, Tensor):
            return outputs
        return outputs["logits"] + EVAL_SHARE * outputs["tokens"][0].flatten(1, 2).amax(1)

    # -- training

    def preprocess(self, batch: Batch, train: bool) -> Batch:
        """Turn maps into targets per auxiliary layer: "tokens" (B, C, h, w) and "features" (B, d + 1, h, w).

        "targets" become (B, C). The features' last channel is the share of each place that shows the image.
        """
        result = super().preprocess(batch, train)
        if not train:
            return result
        opts, count, images = self.opts, len(result["images"]), result["images"]
        tokens, features = [], []
        if "values" in batch:
            maps = dense_map(batch["values"], batch["indices"], self.num_classes)
            tokens = [crop_maps(maps, batch, grid) for grid in self.grids]
        if opts.tl_feature_weight:
            maps = F.pad(batch["features"].float(), (0, 0, 0, 0, 0, 1), value=1.0)
            features = [crop_maps(maps, batch, grid) for grid in self.grids]
        seen = tokens[0].mean((2, 3)) if tokens else images.new_zeros(count, self.num_classes)
        targets = class_targets(seen, batch["targets"], opts.tl_target, opts.smoothing)
        if opts.tl_mix:
            images, targets, mixed = mix_tokens(images, targets, [*tokens, *features])
            tokens, features = mixed[: len(tokens)], mixed[len(tokens) :]
        return {"images": images, "targets": targets, TOKENS: tokens, FEATURES: features}

    def loss(self, outputs: dict[str, Any], batch: Batch) -> dict[str, Tensor]:
        opts = self.opts
        parts = {"class": soft_cross_entropy(outputs["logits"], batch["targets"])}
        total = opts.tl_cls_weight * parts["class"]
        if TOKENS in outputs:
            pairs = zip(outputs[TOKENS], batch[TOKENS], strict=True)
            tokens = [soft_cross_entropy(logits, targets.movedim(1, -1)) for logits, targets in pairs]
            parts[TOKENS] = torch.stack(tokens).mean()
            total = total + opts.tl_dense_weight * parts[TOKENS]
        if FEATURES in outputs:
            pairs = zip(outputs[FEATURES], batch[FEATURES], strict=True)
            parts[FEATURES] = torch.stack([self._feature_distance(*pair) for pair in pairs]).mean()
            total = total + opts.tl_feature_weight * parts[FEATURES]
        return {"loss": total, **{f"loss_{name}": part for name, part in parts.items()}}

    def _feature_distance(self, answers: Tensor, targets: Tensor) -> Tensor:
        components, shown = targets[:, :-1], targets[:, -1:]
        features = self.maps.basis.decode(components / shown.clamp(min=1e-6))
        return feature_distance(answers, features, self.opts.tl_feature_loss, shown[:, 0])


def check_parts(options: Any, maps: ShardedMaps | PublishedMaps) -> None:
    """UsageError if the maps do not hold what is to be learnt."""
    if options.tl_feature_weight and maps.basis is None:
        raise UsageError(
            f"--tl_feature_weight {options.tl_feature_weight:g}: --tl_maps {options.tl_maps} holds no features; "
            f"{COMMAND} --features 80 makes them"
        )
    if not maps.labels and (options.tl_dense_weight or options.tl_target != "label" or options.tl_eval_blend):
        raise UsageError(
            f"--tl_maps {options.tl_maps} holds features alone; pass --tl_dense_weight 0 --tl_target label, without "
            "--tl_eval_blend"
        )


def class_targets(seen: Tensor, labels: Tensor, kind: str, smoothing: float) -> Tensor:
    """The targets (B, C) of --tl_target.

    seen: the mean of each image's tokens (B, C), which sums to the part of it that shows something. labels: (B,).
    """
    classes = seen.shape[1]
    truth = F.one_hot(labels, classes) * (1 - smoothing) + smoothing / classes
    mass = seen.sum(1, keepdim=True)
    taught = torch.where(mass > 0, seen / mass.clamp(min=1e-6), truth)  # nothing of the image is left: only its label
    if kind == "map":
        return taught
    if kind == "label":
        return truth
    agreed = taught.argmax(1, keepdim=True) == labels[:, None]
    share = torch.where(agreed, AGREED, DISAGREED)
    return share * taught + (1 - share) * truth


def mix_tokens(images: Tensor, targets: Tensor, tokens: list[Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Put a box of the last image into the first, and so on, one box for the batch, cut along the last stage's tokens.

    images (B, 3, H, W); targets (B, C), mixed by area; tokens (B, C, h, w) each: the box's come from where its pixels
    do, which is to the loss the same as to bring the answers for it back to their image.
    """
    sides = [-(-side // STRIDE) for side in images.shape[2:]]
    box = token_box(sides, 1 - np.random.beta(1.0, 1.0))
    images = swap(images, [span * STRIDE for span in box])
    area = 1.0
    for span, side in zip(box, images.shape[2:], strict=True):
        ends = np.minimum(span * STRIDE, side)
        area *= (ends[1] - ends[0]) / side
    targets = (1 - area) * targets + area * targets.flip(0)
    mixed = []
    for values in tokens:
        scale = [round(size / side) for size, side in zip(values.shape[2:], sides, strict=True)]
        mixed.append(swap(values, [span * factor for span, factor in zip(box, scale, strict=True)]))
    return images, targets, mixed


def token_box(sides: Sequence[int], share: float) -> list[np.ndarray]:
    """A box of about a share of a grid, as [first, end) of its rows and its columns; its centre may be anywhere."""
    spans = []
    for side in sides:
        length, centre = int(side * math.sqrt(share)), np.random.randint(side)
        spans.append(np.clip(np.array([0, length]) + centre - length // 2, 0, side))
    return spans


def swap(values: Tensor, box: Sequence[Any]) -> Tensor:
    """Values (B, ..., H, W) with a box of rows and columns taken from the batch in reverse order."""
    rows, columns = (slice(int(span[0]), int(span[1])) for span in box)
    result = values.clone()
    result[..., rows, columns] = values.flip(0)[..., rows, columns]
    return result
