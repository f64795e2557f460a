"""What the layers compute of a map besides attention, in the form that is fastest where it runs.

Letters: B batch, H x W map, C channels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_ONEDNN = torch.backends.mkldnn.is_available()


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer on the last axis: (..., C_in) -> (..., C_out). weight: (C_out, C_in).

    In float32 on a CPU a map (B, H, W, C_in) goes through a 1x1 convolution: oneDNN's reaches twice the speed of a
    matrix product on processors that MKL was not made for, and the same on the others.
    """
    if _ONEDNN and x.device.type == "cpu" and x.dtype == torch.float32 and x.ndim == 4:
        return F.conv2d(x.permute(0, 3, 1, 2), weight[..., None, None], bias).permute(0, 2, 3, 1)
    return F.linear(x, weight, bias)


def residual_depthwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x + a depthwise convolution of x (B, C, H, W), with a stride of one and the map's size kept.

    weight: (C, 1, k, k), k odd. The sum is one convolution, whose kernel has a one added in the middle; in half
    precision it is not, for beside the one the kernel would lose its last digits.
    """
    channels, _, size, _ = weight.shape
    exact = x.dtype in (torch.float32, torch.float64) and x.device.type in ("cpu", "cuda")
    merged = exact and not torch.is_autocast_enabled(x.device.type)
    if merged:
        weight = weight + F.pad(weight.new_ones(1, 1), [size // 2] * 4)
    out = F.conv2d(x, weight, bias, padding=size // 2, groups=channels)
    return out if merged else x + out
