"""What the layers compute of a map besides attention, in the form that is fastest where it runs.

Letters: B batch, H x W map, C channels.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import depthwise_torch
from .backend import choose_backend
from .operators import differentiable, operator
from .windows import pad_to_sides

_ONEDNN = torch.backends.mkldnn.is_available()


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer on the last axis: (..., C_in) -> (..., C_out). weight: (C_out, C_in) or (C_out, C_in, 1, 1).

    In float32 on a CPU a map (B, H, W, C_in) goes through a 1x1 convolution: oneDNN's reaches twice the speed of a
    matrix product on processors that MKL was not made for, and the same on the others. So it does where it is exported:
    other runtimes then keep their own layout from one convolution to the next.
    """
    by_convolution = _ONEDNN and x.device.type == "cpu" and x.dtype == torch.float32
    if x.ndim == 4 and (by_convolution or choose_backend(None, x) == "export"):
        kernel = weight if weight.ndim == 4 else weight[..., None, None]
        return F.conv2d(x.permute(0, 3, 1, 2), kernel, bias).permute(0, 2, 3, 1)
    if not _is_in_half_precision(x):
        return F.linear(x, weight.flatten(1), bias)
    dtype = torch.get_autocast_dtype(x.device.type)
    with torch.no_grad():
        copies = [_copies.get(id(w), w) for w in (weight, bias)]
        copies = [None if w is None else w.to(dtype) for w in copies]
    return _Pointwise.apply(x.to(dtype), weight, bias, *copies)


def split(x: Tensor, uses: Sequence[int]) -> tuple[Tensor, ...]:
    """Channels in equal parts, each as often as it is used: the gradients of one part are added as all are joined.

    x: (..., n * C). uses: of each of the n parts, 1 or 2. Returns sum(uses) tensors (..., C).
    """
    if x.requires_grad and len(uses) == 3 and not torch.compiler.is_compiling() and choose_backend(None, x) == "triton":
        return _Split.apply(x, uses)
    return _parts(x, uses)


def _parts(x: Tensor, uses: Sequence[int]) -> tuple[Tensor, ...]:
    parts = x.tensor_split(len(uses), -1)
    return tuple(part for part, count in zip(parts, uses, strict=True) for _ in range(count))


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, uses: Sequence[int]) -> tuple[Tensor, ...]:
        ctx.uses = uses
        return tuple(part.detach() for part in _parts(x, uses))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        once, again = [], []
        left = iter(grads)
        for count in ctx.uses:
            once.append(next(left).contiguous())
            again.append(next(left).contiguous() if count == 2 else once[-1].new_empty(0))
        return _join(*once, *again), None


_copies: dict[int, Tensor] = {}


@contextlib.contextmanager
def copied_for_autocast(weights: Iterable[Tensor]) -> Iterator[None]:
    """Within the block, `pointwise` under autocast finds half-precision copies of these, made in one pass."""
    weights = iter(weights)
    first = next(weights, None)
    if first is None or not _is_in_half_precision(first):
        yield
        return
    weights = [first, *weights]
    # Each begins at 16 bytes, as matrix products want it.
    sizes = [-(-w.numel() // 8) * 8 for w in weights]
    memory = weights[0].new_empty(sum(sizes), dtype=torch.get_autocast_dtype(weights[0].device.type))
    copies = [part[: w.numel()].view(w.shape) for part, w in zip(memory.split(sizes), weights, strict=True)]
    with torch.no_grad():
        torch._foreach_copy_(copies, weights)
    _copies.update(zip(map(id, weights), copies, strict=True))
    try:
        yield
    finally:
        for weight in weights:
            _copies.pop(id(weight), None)


def _is_in_half_precision(x: Tensor) -> bool:
    """Whether `pointwise` makes half precision of its inputs by itself; compiled, PyTorch's autocast is as good."""
    device = x.device.type
    if torch.compiler.is_compiling() or not torch.amp.is_autocast_available(device):
        return False
    return torch.is_autocast_enabled(device) and choose_backend(None, x) == "triton"


class _Pointwise(torch.autograd.Function):
    """A linear layer in half precision whose parameters get their gradients in float32, without another pass."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, low_weight: Tensor, low_bias: Tensor | None) -> Tensor:
        return F.linear(x, low_weight.flatten(1), low_bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, _, bias, low_weight, _ = inputs
        ctx.has_bias = bias is not None
        ctx.save_for_backward(x, low_weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, low_weight = ctx.saved_tensors
        rows, needed = grad.flatten(0, -2), ctx.needs_input_grad
        return (
            (rows @ low_weight.flatten(1)).view(x.shape) if needed[0] else None,
            _product_in_float32(rows.t(), x.flatten(0, -2)).view(low_weight.shape) if needed[1] else None,
            rows.sum(0, dtype=torch.float32) if ctx.has_bias and needed[2] else None,
            None,
            None,
        )


def _product_in_float32(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of half precision, unrounded where PyTorch can write it so: on NVIDIA's GPUs."""
    return torch.mm(a, b, out_dtype=torch.float32) if _writes_float32(a) else (a @ b).float()


def _writes_float32(x: Tensor) -> bool:
    return x.device.type == "cuda" and torch.version.hip is None


def depthwise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    gelu: bool = False,
    stride: int = 1,
) -> Tensor:
    """A depthwise convolution and what surrounds it: act(residual + conv(x) + bias).

    Args:
        x: (B, H, W, C).
        weight, bias: (C/g, 1, k, k), k odd, and (C/g), for g groups of channels alike.
        residual: x itself or another map, which is added; where it reaches beyond the convolution's last row or column
            nothing is added to it, and act is nothing.
        gelu: whether act is GELU (exact), or nothing.
        stride: a side s becomes ceil(s / stride).

    Returns:
        (B, ceil(H / stride), ceil(W / stride), C), or like the residual.
    """
    size, groups, itself = weight.shape[-1], x.shape[-1] // weight.shape[0], residual is x
    if choose_backend(None, x) == "triton" and (_in_bands(x, weight, stride) or not (itself or gelu)):
        none = weight.new_empty(0)
        bias = none if bias is None else bias
        if residual is None or itself:
            return _convolve(x, weight, bias, none, itself, gelu, stride)
        if not gelu:
            dtype = torch.promote_types(x.dtype, residual.dtype)
            return _convolve(x.to(dtype), weight, bias, residual.to(dtype), False, False, stride)
    if itself and _merges(x):
        weight, residual = weight + F.pad(weight.new_ones(1, 1), [size // 2] * 4), None
    if groups > 1:
        weight, bias = weight.repeat(groups, 1, 1, 1), None if bias is None else bias.repeat(groups)
    act_at_once = gelu and residual is None
    out = depthwise_torch.convolve(x.permute(0, 3, 1, 2), weight, bias, stride, act_at_once).permute(0, 2, 3, 1)
    if residual is None:
        return out
    out = residual + pad_to_sides(out, residual.shape[1:3])
    return depthwise_torch.activate(out) if gelu else out


def _merges(x: Tensor) -> bool:
    """Whether x + conv(x) is one convolution, whose kernel has the identity in it.

    In half precision it is not: beside the one, the kernel would lose its last digits.
    """
    exact = x.dtype in (torch.float32, torch.float64) and x.device.type in ("cpu", "cuda")
    return exact and not torch.is_autocast_enabled(x.device.type)


def add_norm(x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The sum x + branch of maps (..., C), or x alone, and its LayerNorm over the channels."""
    if choose_backend(None, x) == "triton":
        if branch is None:
            return x, _norm(x, weight, bias, eps)
        dtype = torch.promote_types(x.dtype, branch.dtype)
        return _add_norm(x.to(dtype), branch.to(dtype), weight, bias, eps)
    x = x if branch is None else x + branch
    return x, F.layer_norm(x, weight.shape, weight, bias, eps)


# -- operators on GPUs; a bias or gradient that is missing is empty ----------------------------------------------------


def _join_gradients(q: Tensor, k: Tensor, v: Tensor, q_more: Tensor, k_more: Tensor, v_more: Tensor) -> Tensor:
    from . import join_triton

    return join_triton.join((q, k, v), (q_more, k_more, v_more))


_join = operator("join", _join_gradients, lambda q, *_: q.new_empty((*q.shape[:-1], 3 * q.shape[-1])))


def _in_bands(x: Tensor, weight: Tensor, stride: int, residual: Tensor | None = None) -> bool:
    """Whether the faster kernels can be taken, which read a row of the map once for all that it meets."""
    alike = residual is None or residual.numel() == 0 or residual.shape == x.shape
    return stride == 1 and weight.shape[-1] <= 5 and weight.shape[0] == x.shape[-1] and alike


def _convolve_forward(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, itself: bool, gelu: bool, stride: int
) -> Tensor:
    from . import depthwise_triton, strided_triton

    if not _in_bands(x, weight, stride, residual):
        return strided_triton.forward(x, weight, bias, residual, stride)
    added = x if itself else residual if residual.numel() else None
    return depthwise_triton.forward(x, weight, bias, added, gelu)


def _convolve_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor,
    out: Tensor,
    itself: bool,
    gelu: bool,
    stride: int,
) -> tuple[Tensor, Tensor]:
    from . import depthwise_triton, strided_triton

    if not _in_bands(x, weight, stride, residual):
        return strided_triton.backward(grad, x, weight, bias, stride)
    return depthwise_triton.backward(grad, x, weight, bias, itself, gelu)


def _convolved_like(x: Tensor, _weight: Tensor, _bias: Tensor, residual: Tensor, *options: Any) -> Tensor:
    stride = options[-1]
    sides = residual.shape[1:3] if residual.numel() else [(side + stride - 1) // stride for side in x.shape[1:3]]
    return x.new_empty((x.shape[0], *sides, x.shape[3]))


_convolve = differentiable(
    *("depthwise", _convolve_forward, _convolve_backward, _convolved_like), gradients=(0, 1, 2, -1), packed=2
)


def _norm_forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    from . import norm_triton

    return norm_triton.forward(x, None, weight, bias, eps)[1]


def _norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    from . import norm_triton

    return norm_triton.backward(None, grad, x, weight, eps)


_norm = differentiable(
    *("norm", _norm_forward, _norm_backward, lambda x, *_: x.new_empty(x.shape)),
    gradients=range(3),
    packed=2,
)


def _add_norm_forward(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    from . import norm_triton

    return norm_triton.forward(x, branch, weight, bias, eps)


def _add_norm_backward(
    dsum: Tensor | None,
    dnormed: Tensor,
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    total: Tensor,
    normed: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    from . import norm_triton

    return norm_triton.backward(dsum, dnormed, total, weight, eps)


_add_norm = differentiable(
    *("add_norm", _add_norm_forward, _add_norm_backward, lambda x, *_: (x.new_empty(x.shape), x.new_empty(x.shape))),
    gradients=(0, 0, 1, 2),
    differentiated=2,
    packed=2,
)
