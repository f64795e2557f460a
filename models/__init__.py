"""The model families, registered with timm on import.

`import debiformer, timm; timm.create_model("debiformer_tiny")` where installed; inside a checkout, `import models`.
"""

import sys

__version__ = "0.1.0"

for _name in ("models", "debiformer"):
    if _name != __name__ and f"{_name}.ops.routed" in sys.modules:
        raise ImportError(
            f"{__name__} is the same package as {_name}, which this process has imported from "
            f"{sys.modules[_name].__path__[0]}, and PyTorch registers its operators once per process; "
            f"import {_name} only (`models` inside a checkout, `debiformer` everywhere else)"
        )

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
