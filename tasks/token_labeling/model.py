"""Auxiliary linear layers for the places of a model's last maps, beside its classifier."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from runtime.errors import UsageError
from tasks.classification.distillation import channel_axis
from tasks.classification.options import FEATURES, TOKENS

NAMES = {TOKENS: "{}", FEATURES: "features_{}"}


class AuxiliaryOutputs:
    """What a model is given so that in training it returns {"logits": (B, C), LESSON: [(B, H, W, width), ...]}.

    The linear layers are in `model.auxiliary`, so the other weights keep their names, and saved weights leave these out
    (`models.weights.AUXILIARY`). lessons: what they answer. tokens_in_evaluation: whether they answer there, too.
    """

    auxiliary: nn.ModuleDict
    lessons: list[str]
    with_middle: bool
    tokens_in_evaluation: bool

    def forward(self, x: Tensor) -> Any:
        if not (self.training or self.tokens_in_evaluation):
            return super().forward(x)
        if self.with_middle:
            features, (middle,) = self.forward_intermediates(x, indices=[middle_stage(self)])
        else:
            features = self.forward_features(x)
        maps = {"last": features.movedim(channel_axis(features, self.num_features, "--model"), -1)}
        if self.with_middle:
            maps["middle"] = middle.movedim(1, -1)
        answers = {
            lesson: [self.auxiliary[NAMES[lesson].format(name)](values) for name, values in maps.items()]
            for lesson in self.lessons
        }
        return {"logits": self.forward_head(features), **answers}


def add_auxiliary(
    model: nn.Module, widths: Mapping[str, int], middle: bool = False, in_evaluation: bool = False
) -> nn.Module:
    """Add linear layers for the tokens of the last map and, with `middle`, for those at stride 16.

    widths: how much they answer, by what: the classes for TOKENS, the teacher's channels for FEATURES.
    """
    channels = {"last": model.num_features}
    if middle:
        channels["middle"] = model.feature_info[middle_stage(model)]["num_chs"]
    model.auxiliary = nn.ModuleDict(
        {
            NAMES[lesson].format(name): nn.Linear(inputs, outputs)
            for lesson, outputs in widths.items()
            for name, inputs in channels.items()
        }
    )
    for layer in model.auxiliary.values():
        nn.init.trunc_normal_(layer.weight, std=0.02)
        nn.init.zeros_(layer.bias)
    model.lessons, model.with_middle, model.tokens_in_evaluation = list(widths), middle, in_evaluation
    kind = type(model)
    model.__class__ = type(kind.__name__, (AuxiliaryOutputs, kind), {})
    return model


def middle_stage(model: nn.Module) -> int:
    """The last stage at stride 16. UsageError if the model has none, or does not show it."""
    stages = [number for number, info in enumerate(model.feature_info) if info["reduction"] == 16]
    if not stages or not hasattr(model, "forward_intermediates"):
        raise UsageError(f"--tl_stage3: {type(model).__name__} shows no map at stride 16; leave the option out")
    return stages[-1]


@torch.no_grad()
def token_grids(model: nn.Module, side: int) -> list[tuple[int, int]]:
    """Rows and columns of tokens of each map that auxiliary layers answer for, for images of this side."""
    before, model.tokens_in_evaluation = model.tokens_in_evaluation, True
    training = model.training
    tokens = model.eval()(torch.zeros(1, 3, side, side))[model.lessons[0]]
    model.tokens_in_evaluation = before
    model.train(training)
    return [tuple(values.shape[1:3]) for values in tokens]
