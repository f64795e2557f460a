"""Weights from files: read safely (`reading`), brought into a model (`fitting`), found where they are (`releases`)."""

from .errors import WeightsError, WeightsMismatch
from .fitting import check_fit, check_outline, checkpoint_filter_fn, load_for_inference, load_to_finetune, load_weights
from .reading import AUXILIARY, count_classes, load_checkpoint, options_of, saved_options, weights_of

__all__ = [
    "AUXILIARY",
    "WeightsError",
    "WeightsMismatch",
    "check_fit",
    "check_outline",
    "checkpoint_filter_fn",
    "count_classes",
    "load_checkpoint",
    "load_for_inference",
    "load_to_finetune",
    "load_weights",
    "options_of",
    "saved_options",
    "weights_of",
]
