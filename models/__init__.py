"""The model families, registered with timm on import: `import models, timm; timm.create_model("debiformer_tiny")`."""

from . import biformer, debiformer, stl
from .biformer import BiFormer
from .debiformer import DeBiFormer
from .fusion import fuse
from .stl import BiFormerSTL, MaxViTSTL

__all__ = ["MODEL_NAMES", "BiFormer", "BiFormerSTL", "DeBiFormer", "MaxViTSTL", "fuse"]

MODEL_NAMES: tuple[str, ...] = (*debiformer.VARIANTS, *biformer.VARIANTS, *stl.VARIANTS)
"""Every variant, under its own name (the aliases debi_tiny, debi_small and debi_base are left out)."""
