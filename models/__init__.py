"""The model families, registered with timm on import: `import models, timm; timm.create_model("debiformer_tiny")`."""

from . import biformer, debiformer, stl
from .attention_maps import AttentionMaps
from .attention_table import register_attention
from .biformer import BiFormer
from .debiformer import DeBiFormer
from .fusion import fuse
from .stl import BiFormerSTL, MaxViTSTL

__all__ = [
    "MODEL_NAMES",
    "AttentionMaps",
    "BiFormer",
    "BiFormerSTL",
    "DeBiFormer",
    "MaxViTSTL",
    "fuse",
    "register_attention",
]

MODEL_NAMES: tuple[str, ...] = (*debiformer.VARIANTS, *biformer.VARIANTS, *stl.VARIANTS)
"""Every variant, under its own name (the aliases debi_tiny, debi_small and debi_base are left out)."""
