"""The model families, registered with timm on import: `import models, timm; timm.create_model("debiformer_tiny")`."""

from . import biformer, debiformer
from .biformer import BiFormer
from .debiformer import DeBiFormer

__all__ = ["MODEL_NAMES", "BiFormer", "DeBiFormer"]

MODEL_NAMES: tuple[str, ...] = (*debiformer.VARIANTS, *biformer.VARIANTS)
"""Every variant, under its own name (the aliases debi_tiny, debi_small and debi_base are left out)."""
