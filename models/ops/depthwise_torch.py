"""Depthwise convolutions with PyTorch's own kernels; in float32 on CPUs, with the fastest that oneDNN has.

Letters: B batch, H x W map, C channels, k side of a kernel.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import conv_flop_count, register_flop_formula

_ONEDNN = torch.backends.mkldnn.is_available()
_COLUMNS = 3
"""Most columns of a depthwise kernel whose gradient oneDNN has code for; there may be any number of rows.

Gradients of others it computes as if all of 16 channels met, which multiplies 16 times as often.
"""


def convolve(maps: Tensor, weight: Tensor, bias: Tensor | None, stride: int, gelu: bool) -> Tensor:
    """Maps (B, C, H, W), weight (C, 1, k, k) -> act(conv(maps) + bias), where act is GELU or nothing."""
    by_onednn = _ONEDNN and maps.device.type == "cpu" and maps.dtype == torch.float32
    by_onednn = by_onednn and not (torch.is_autocast_enabled("cpu") or torch.compiler.is_exporting())
    at_once = gelu and by_onednn and not (torch.is_grad_enabled() or torch.compiler.is_compiling())
    if at_once and maps.numel():
        options = [weight.shape[-1] // 2] * 2, [stride] * 2, [1, 1], len(weight)
        return torch.ops.mkldnn._convolution_pointwise(maps, weight, bias, *options, "gelu", [], "none")
    learns = torch.is_grad_enabled() and weight.requires_grad
    # With a larger stride, the parts of the map that gradients are computed from would cost more than they spare.
    in_parts = by_onednn and learns and weight.shape[-1] > _COLUMNS and stride <= 2
    out = (_Wide.apply if in_parts else _convolve)(maps, weight, bias, stride)
    return activate(out) if gelu else out


def activate(x: Tensor) -> Tensor:
    """GELU, in place where nothing else needs x."""
    in_place = not (torch.is_grad_enabled() or torch.compiler.is_compiling())
    return torch.ops.aten.gelu_(x) if in_place else F.gelu(x)


def _convolve(maps: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    return F.conv2d(maps, weight, bias, stride, weight.shape[-1] // 2, groups=len(weight))


class _Wide(torch.autograd.Function):
    """`_convolve`, whose kernel gets its gradient a few columns at a time."""

    @staticmethod
    def forward(maps: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
        return _convolve(maps, weight, bias, stride)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        maps, weight, _, ctx.stride = inputs
        ctx.save_for_backward(maps, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        maps, weight = ctx.saved_tensors
        (channels, _, _, size), stride, padding = weight.shape, ctx.stride, weight.shape[-1] // 2
        needs_map, _, needs_bias, _ = ctx.needs_input_grad

        def gradients(x: Tensor, kernel: Tensor, padding: list[int], wanted: list[bool]) -> tuple[Tensor, ...]:
            options = [stride, stride], padding, [1, 1], False, [0, 0], channels
            return torch.ops.aten.convolution_backward(grad, x, kernel, [channels], *options, wanted)

        dmaps, dbias, parts = None, None, []
        if needs_map:
            dmaps, _, _ = gradients(maps, weight, [padding, padding], [True, False, False])
        for first in range(0, size, _COLUMNS):
            columns = weight[..., first : first + _COLUMNS]
            left, width = padding - first, (grad.shape[-1] - 1) * stride + columns.shape[-1]
            read = F.pad(maps, (left, width - left - maps.shape[-1]))
            _, part, sums = gradients(read, columns, [padding, 0], [False, True, needs_bias and first == 0])
            parts.append(part)
            dbias = sums if first == 0 else dbias
        return dmaps, torch.cat(parts, dim=-1), dbias, None


if _ONEDNN:

    @register_flop_formula(torch.ops.mkldnn._convolution_pointwise)
    def _flops(maps: torch.Size, weight: torch.Size, *_: Any, out_shape: torch.Size, **__: Any) -> int:
        return conv_flop_count(maps, weight, out_shape)
