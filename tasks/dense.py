"""The backbone of dense models: four maps at strides 4, 8, 16 and 32, of any model of ours or of timm."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from PIL import Image
from torch import Tensor, nn

from models.arguments import check_arguments
from models.backbone import Backbone
from models.pixels import normalize, pixels_of
from models.pyramid import FeaturePyramid
from models.weights import load_to_finetune
from runtime.errors import UsageError
from runtime.model import build_model, is_ours
from runtime.options import option

from .base import Batch, Task


def build_backbone(opts: Any) -> tuple[nn.Module, list[int], nn.Module]:
    """Build --model as a backbone: images -> maps, the maps' channels, and the module whose weights a release has.

    Ours are padded to whole windows and normed map by map, as the released dense models.
    """
    if is_ours(opts.model):
        classifier = build_model(opts, num_classes=1000)
        if not isinstance(classifier, Backbone):
            raise UsageError(f"--model {opts.model} has no maps at strides 4 to 32; choose another")
        return FeaturePyramid(classifier), [info["num_chs"] for info in classifier.feature_info], classifier
    try:
        check_arguments(opts.model, opts.model_kwargs)
        body = timm.create_model(opts.model, features_only=True, drop_path_rate=opts.drop_path, **opts.model_kwargs)
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise UsageError(f"--model {opts.model} cannot be a backbone: {error}") from error
    if body.feature_info.reduction()[-4:] != [4, 8, 16, 32]:
        raise UsageError(f"--model {opts.model} has no maps at strides 4, 8, 16 and 32; choose another")
    return LastMaps(body), body.feature_info.channels()[-4:], body


class LastMaps(nn.Module):
    """The last four maps (B, C, H, W) of a timm backbone."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, images: Tensor) -> list[Tensor]:
        return self.body(images)[-4:]


@dataclass
class DenseOptions:
    """Segmentation and detection"""

    freeze_bn: bool = option(False, "leave the backbone's BatchNorm as the weights that training starts from have it")


class DenseTask(Task):
    """What segmentation and detection share: a backbone that starts from a classification's weights.

    body: images -> maps. backbone: the module inside whose weights a release has. Known after `build_model`.
    """

    body: nn.Module
    backbone: nn.Module

    def check(self) -> None:
        if self.opts.log_attention:
            raise UsageError(f"--log_attention is for classification, not for --task {self.opts.task}; leave it out")

    def data_folder(self) -> Path:
        """Return the folder of --data_path. UsageError if there is none."""
        if not self.opts.data_path:
            raise UsageError(f"--task {self.opts.task} needs --data_path: a folder of images and annotations")
        root = Path(self.opts.data_path)
        if not root.is_dir():
            raise UsageError(f"--data_path {root} is not a folder")
        return root

    def attending(self, model: nn.Module) -> nn.Module:
        return self.body

    def batch_of(self, image: Image.Image, **nothing: Any) -> Batch:
        """Return an image as evaluation shows it to the model, on the device.

        nothing: what a sample has besides, of an image on which nothing is labelled.
        """
        sample = self.transform(train=False)({"image": image, **nothing})
        return self.preprocess(self.collate([{**sample, "image": sample["image"].to(self.device)}]), train=False)

    @property
    def eval_batch_size(self) -> int:
        """One: images have their own sizes, and padding for others must not change a figure."""
        return 1

    def normalize(self, images: Tensor) -> Tensor:
        """Turn uint8 pixels into what the model was trained on."""
        return normalize(images, pixels_of(self.opts.model))

    def build_body(self) -> tuple[nn.Module, list[int]]:
        """Build the backbone and say its maps' channels."""
        self.body, widths, self.backbone = build_backbone(self.opts)
        if self.opts.freeze_bn:
            freeze_batch_norm(self.body)
        return self.body, widths

    def finished(self, model: nn.Module) -> nn.Module:
        """Return the model ready to train: BatchNorm over all GPUs, and named as its backbone."""
        model.default_cfg = self.backbone.default_cfg
        if self.info.distributed and self.device.type == "cuda":
            return nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return model

    def load_pretrained(self, model: nn.Module, weights: dict[str, Tensor], trained: Sequence[str], path: Path) -> list:
        """Load a classification's weights into the backbone, or the backbone of another dense model."""
        prefix = next((name.partition("extra_norms.")[0] for name in weights if "extra_norms." in name), None)
        if prefix is None:
            load_to_finetune(self.backbone, weights, path)
            return ["all but the backbone"]
        weights = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        load_to_finetune(self.body, weights, path)
        return ["all but the backbone and its norms"]


class FrozenBatchNorm(nn.BatchNorm2d):
    """BatchNorm that training leaves as it is. Keys and values stay those of `nn.BatchNorm2d`."""

    def train(self, mode: bool = True) -> "FrozenBatchNorm":
        return super().train(False)


def freeze_batch_norm(module: nn.Module) -> None:
    """Make every BatchNorm2d of a module one that training leaves as it is."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.__class__ = FrozenBatchNorm
            part.requires_grad_(False).eval()
