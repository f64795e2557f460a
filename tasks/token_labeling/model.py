"""Auxiliary classifiers for the places of a model's last maps, beside the model's own."""

from typing import Any

import torch
from torch import Tensor, nn

from runtime.errors import UsageError
from tasks.classification.distillation import channel_axis


class AuxiliaryOutputs:
    """What a model is given so that in training it returns {"logits": (B, C), "tokens": [(B, H, W, C), ...]}.

    The classifiers are in `model.auxiliary`, so the other weights keep their names, and saved weights leave these out
    (`models.weights.AUXILIARY`). tokens_in_evaluation: whether they answer there, too.
    """

    auxiliary: nn.ModuleDict
    tokens_in_evaluation: bool

    def forward(self, x: Tensor) -> Any:
        if not (self.training or self.tokens_in_evaluation):
            return super().forward(x)
        maps = []
        if "middle" in self.auxiliary:
            features, maps = self.forward_intermediates(x, indices=[middle_stage(self)])
        else:
            features = self.forward_features(x)
        last = features.movedim(channel_axis(features, self.num_features, "--model"), -1)
        tokens = [self.auxiliary["last"](last)]
        tokens += [self.auxiliary["middle"](values.movedim(1, -1)) for values in maps]
        return {"logits": self.forward_head(features), "tokens": tokens}


def add_auxiliary(model: nn.Module, num_classes: int, middle: bool = False, in_evaluation: bool = False) -> nn.Module:
    """Add a linear classifier for the tokens of the last map and, with `middle`, one for those at stride 16."""
    model.auxiliary = nn.ModuleDict({"last": nn.Linear(model.num_features, num_classes)})
    if middle:
        width = model.feature_info[middle_stage(model)]["num_chs"]
        model.auxiliary["middle"] = nn.Linear(width, num_classes)
    for head in model.auxiliary.values():
        nn.init.trunc_normal_(head.weight, std=0.02)
        nn.init.zeros_(head.bias)
    model.tokens_in_evaluation = in_evaluation
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
    """Rows and columns of tokens that each auxiliary classifier of a model answers for, for images of this side."""
    before, model.tokens_in_evaluation = model.tokens_in_evaluation, True
    training = model.training
    tokens = model.eval()(torch.zeros(1, 3, side, side))["tokens"]
    model.tokens_in_evaluation = before
    model.train(training)
    return [tuple(values.shape[1:3]) for values in tokens]
