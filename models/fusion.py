"""Fewer operations for inference, with the same outputs."""

from timm.utils import reparameterize_model
from torch import nn


def fuse(model: nn.Module) -> nn.Module:
    """A copy of a model in evaluation mode whose layers are merged where that changes nothing but rounding.

    In the models of this project (and what wraps them) every BatchNorm beside a convolution is folded into it, and
    the identity of x + conv(x) into the kernel; the norm before the classifier stays. The modules say themselves how
    they fuse, so timm's own scripts do the same (`--reparam`); other models of timm fuse what timm fuses in them.
    The copy is for inference: its weights fit no other model. ValueError if the model is in training mode.
    """
    if model.training:
        raise ValueError("fusing is for inference: call eval() on the model first")
    return reparameterize_model(model)
