"""The backbone of dense models: four maps at strides 4, 8, 16 and 32, of any model of ours or of timm."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
from timm.utils import freeze_batch_norm_2d
from torch import Tensor, nn

from models.arguments import check_arguments
from models.backbone import Backbone
from models.pyramid import FeaturePyramid
from models.weights import load_to_finetune
from runtime.errors import UsageError
from runtime.model import build_model

from .base import Task


def build_backbone(opts: Any) -> tuple[nn.Module, list[int], nn.Module]:
    """Build --model as a backbone: images -> maps, the maps' channels, and the module whose weights a release has.

    Ours are padded to whole windows and normed map by map, as the released dense models.
    """
    if timm.models.is_model_in_modules(opts.model, ("debiformer", "biformer", "stl")):
        classifier = build_model(opts, num_classes=1000)
        if not isinstance(classifier, Backbone):
            raise UsageError(f"--model {opts.model} has no maps at strides 4 to 32; choose another")
        return FeaturePyramid(classifier), [info["num_chs"] for info in classifier.feature_info], classifier
    try:
        check_arguments(opts.model, opts.model_kwargs)
        body = timm.create_model(
            opts.model,
            features_only=True,
            drop_path_rate=opts.drop_path,
            pretrained=opts.load_release,
            **opts.model_kwargs,
        )
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


class DenseTask(Task):
    """What segmentation and detection share: a backbone that starts from a classification's weights.

    backbone: the module whose weights a release has; known after `build_model`.
    """

    backbone: nn.Module

    def build_body(self) -> tuple[nn.Module, list[int]]:
        """Build the backbone and say its maps' channels."""
        body, widths, self.backbone = build_backbone(self.opts)
        return (freeze_batch_norm_2d(body) if self.opts.freeze_bn else body), widths

    def load_pretrained(self, model: nn.Module, weights: dict[str, Tensor], trained: Sequence[str], path: Path) -> list:
        """Load a classification's weights into the backbone, or those of another dense model as far as they fit."""
        places = ("backbone.body.", "backbone.")
        prefix = next((each for each in places if f"{each}stages.0.0.norm1.weight" in weights), "")
        if prefix:
            weights = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        load_to_finetune(self.backbone, weights, path)
        return ["everything but the backbone"]
