"""The models' arithmetic, above all the attention's: plain functions of tensors, without parameters.

Call them as `ops.name(...)`: they are registered here as leaves for torch.fx, so that the models trace
symbolically although the functions look at shapes.
"""

import torch.fx

from .deformable import (
    agent_positions,
    deformable_attention,
    positions_of_features,
    relative_position_bias,
    sample_agents,
)
from .maps import add_norm, copied_for_autocast, depthwise, pointwise, split
from .routed import full_attention, route_maps, route_windows, routed_attention
from .windows import from_windows, pad_to_multiple, pool_windows, split_side, to_windows, window_means

__all__ = [
    "add_norm",
    "agent_positions",
    "copied_for_autocast",
    "deformable_attention",
    "depthwise",
    "from_windows",
    "full_attention",
    "pad_to_multiple",
    "pointwise",
    "pool_windows",
    "positions_of_features",
    "relative_position_bias",
    "route_maps",
    "route_windows",
    "routed_attention",
    "sample_agents",
    "split",
    "split_side",
    "to_windows",
    "window_means",
]

for _name in __all__:
    torch.fx.wrap(_name)
