"""Backbones for dense prediction: feature pyramids over the classification models."""

from .pyramid import FeaturePyramid

__all__ = ["FeaturePyramid"]
