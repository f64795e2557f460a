"""What the attention does, as arrays (`maps`), pictures (`panels`), a report, TensorBoard figures and a demo page.

python -m visualize IMAGE_OR_FOLDER --checkpoint outputs/run/best.pth --output DIR
python -m visualize.app
"""

from .capture import AgentLayer, Capture, Layer, RoutedLayer, capture
from .images import open_image
from .maps import (
    agent_reads,
    agent_shares,
    composed_attention,
    to_pixels,
    token_attention,
    token_to_agents,
    windows_read,
)
from .panels import Panel, Query, panels_of
from .subject import Subject, load_subject

__all__ = [
    "AgentLayer",
    "Capture",
    "Layer",
    "Panel",
    "Query",
    "RoutedLayer",
    "Subject",
    "agent_reads",
    "agent_shares",
    "capture",
    "composed_attention",
    "load_subject",
    "open_image",
    "panels_of",
    "to_pixels",
    "token_attention",
    "token_to_agents",
    "windows_read",
]
