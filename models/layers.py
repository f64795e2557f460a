"""Small modules shared by all families. Letters: B batch, H x W map, C channels."""

import copy
from collections.abc import Callable, Iterator, Sequence

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from . import ops


def to_nhwc(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H, W, C), a view."""
    return x.permute(0, 2, 3, 1)


def to_nchw(x: Tensor) -> Tensor:
    """(B, H, W, C) -> (B, C, H, W), a view with channels-last strides, so convolutions need no copy."""
    return x.permute(0, 3, 1, 2)


class MapLinear(nn.Linear):
    """A linear layer on the last axis of a map: (B, H, W, C_in) -> (B, H, W, C_out)."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.pointwise(x, self.weight, self.bias)


class PointwiseConv(nn.Conv2d):
    """A 1x1 convolution of a map with channels last: (B, H, W, C_in) -> (B, H, W, C_out).

    Its weight keeps the convolution's shape (C_out, C_in, 1, 1), as published checkpoints have it.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, kernel_size=1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return ops.pointwise(x, self.weight, self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PointwiseConv":
        super()._apply(fn, recurse)
        # Moving a model to channels-last memory gives 1x1 kernels strides that the gradient of a matrix product does
        # not have; optimizers and DistributedDataParallel are fast only where the two agree.
        self.weight.data = self.weight.data.flatten(1)[..., None, None]
        return self


def pointwise_weights(module: nn.Module) -> Iterator[Tensor]:
    """Weights and biases of all linear layers of maps in a module."""
    for layer in module.modules():
        if isinstance(layer, MapLinear | PointwiseConv):
            yield from layer.parameters(recurse=False)


class DepthwiseConv(nn.Conv2d):
    """Depthwise convolution of a map (B, H, W, C) with padding kernel // 2: a side s becomes ceil(s / stride)."""

    def __init__(self, dim: int, kernel_size: int, stride: int = 1, bias: bool = True) -> None:
        super().__init__(dim, dim, kernel_size, stride, padding=kernel_size // 2, groups=dim, bias=bias)

    def forward(self, x: Tensor, residual: Tensor | None = None, gelu: bool = False) -> Tensor:
        """The residual, if there is one, plus the convolution, through GELU if asked for."""
        return ops.depthwise(x, self.weight, self.bias, residual, gelu, self.stride[0])


class ResidualDepthwiseConv(DepthwiseConv):
    """x + conv(x) of a map (B, H, W, C), with the keys of the convolution alone, as published."""

    def forward(self, x: Tensor, gelu: bool = False) -> Tensor:
        return super().forward(x, residual=x, gelu=gelu)

    @torch.no_grad()
    def fuse(self) -> DepthwiseConv:
        """The same map as one convolution: the identity is a one in the middle of the kernel."""
        dim, _, size, _ = self.weight.shape
        fused = DepthwiseConv(dim, size).to(self.weight)
        fused.load_state_dict(self.state_dict())
        fused.weight[:, :, size // 2, size // 2] += 1
        return fused


class AddNorm(nn.LayerNorm):
    """LayerNorm of a sum: (..., C) and a branch like it, or none -> the sum and its norm."""

    def forward(self, x: Tensor, branch: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return ops.add_norm(x, branch, self.weight, self.bias, self.eps)


class Downsampling(nn.Sequential):
    """Strided convolutions with norms before or behind them: what opens a stage."""

    def fuse(self) -> nn.Sequential:
        """The same map with every BatchNorm folded into the convolution behind or before it; ValueError in training."""
        if self.training:
            raise ValueError("BatchNorm can be folded only when its statistics are fixed: call eval() first")
        layers: list[nn.Module] = []
        for layer in self:
            before = layers[-1] if layers else None
            if isinstance(layer, nn.BatchNorm2d) and isinstance(before, nn.Conv2d):
                layers[-1] = fuse_conv_bn_eval(before, layer)
            elif isinstance(layer, nn.Conv2d) and isinstance(before, nn.BatchNorm2d):
                layers[-1] = _fold_into_next(before, layer)
            else:
                layers.append(layer)
        return nn.Sequential(*layers)


@torch.no_grad()
def _fold_into_next(norm: nn.BatchNorm2d, conv: nn.Conv2d) -> nn.Conv2d:
    """One convolution for norm, then conv. Padding would be of zeros behind the norm, so there must be none."""
    assert conv.padding == (0, 0)
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    shift = norm.bias - norm.running_mean * scale
    fused = copy.deepcopy(conv)
    fused.weight *= scale[:, None, None]
    fused.bias += (conv.weight * shift[:, None, None]).sum((1, 2, 3))
    return fused


class QKV(nn.Module):
    """The projection to queries, keys and values: (..., C) -> three of (..., C), each as often as it is used.

    projection: a linear layer of maps, C -> 3C. It lives one level down, at the key `qkv`, as published.
    """

    def __init__(self, projection: MapLinear | PointwiseConv) -> None:
        super().__init__()
        self.qkv = projection

    def forward(self, x: Tensor, uses: Sequence[int] = (1, 1, 1)) -> tuple[Tensor, ...]:
        return ops.split(self.qkv(x), uses)

    @torch.no_grad()
    def apart(self) -> nn.Module:
        """The same as three layers: for runtimes in which parts of one layer's output are copies."""
        weights, bias = self.qkv.weight.flatten(1).chunk(3), self.qkv.bias
        layers = [PointwiseConv(w.shape[1], w.shape[0], bias is not None) for w in weights]
        for number, (layer, weight) in enumerate(zip(layers, weights, strict=True)):
            layer.weight.copy_(weight[..., None, None])
            if bias is not None:
                layer.bias.copy_(bias.chunk(3)[number])
        return _Together(layers)


class _Together(nn.ModuleList):
    """Layers that take the same input: a tensor -> the output of each, as often as it is used."""

    def forward(self, x: Tensor, uses: Sequence[int] = (1, 1, 1)) -> tuple[Tensor, ...]:
        return tuple(out for layer, count in zip(self, uses, strict=True) for out in [layer(x)] * count)


class ConvMlp(nn.Module):
    """DeBiFormer's feed-forward: expand, add a 3x3 depthwise convolution, GELU, project. (B, H, W, C) in and out."""

    def __init__(self, dim: int, ratio: float) -> None:
        super().__init__()
        hidden = int(dim * ratio)
        self.linear1 = nn.Sequential(PointwiseConv(dim, hidden))
        self.dwc = ResidualDepthwiseConv(hidden, 3)
        self.linear2 = nn.Sequential(PointwiseConv(hidden, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear2(self.dwc(self.linear1(x), gelu=True))


def init_linear(module: nn.Module) -> None:
    """Draw a linear layer's (or 1x1 convolution's) weight from a truncated normal, std 0.02; its bias becomes zero."""
    if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1)):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
