"""What the attention does, as arrays (`maps`), pictures (`panels`), a report, TensorBoard figures and a demo page.

python -m visualize IMAGE_OR_FOLDER --checkpoint outputs/run/best.pth --output DIR
python -m visualize.app

The maps themselves are methods of what `Layer.maps` holds, see `models.attention_maps`.
"""

from .capture import Capture, Layer, capture
from .images import open_image
from .maps import token_at
from .panels import Panel, Query, panels_of
from .subject import Subject, load_subject

__all__ = [
    "Capture",
    "Layer",
    "Panel",
    "Query",
    "Subject",
    "capture",
    "load_subject",
    "open_image",
    "panels_of",
    "token_at",
]
