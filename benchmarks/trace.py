"""Every operator of one step of a model, without a GPU and without computing: on fake tensors of a GPU's layouts.

Training is traced on fake CPU tensors, where autograd runs, with those of autocast's rules that are CUDA's.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any
from unittest import mock

import timm
import torch
import torch.nn.functional as F
from timm.layers import set_fused_attn
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

import models  # noqa: F401
from models.ops import backend, maps
from models.ops.operators import NAMESPACE, operators

Spec = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]
"""Shape, strides and type of a tensor."""
WITHOUT_A_KERNEL = {"detach", "empty", "new_empty", "empty_like", "empty_strided", "device", "lift_fresh", "set_"}
KERNELS = {"convolution_backward": 3, "native_layer_norm_backward": 2, "topk": 2, "grid_sampler_2d_backward": 2}
"""Kernels of an operator, where there are several."""


@dataclass
class Call:
    """One operator that runs.

    arguments: with `Spec`s in place of tensors. read, written: where inputs and outputs lie, (storage, offset) of each;
    empty for what the body of one of our operators calls.
    """

    name: str
    arguments: tuple[Any, ...]
    inputs: list[Spec]
    outputs: list[Spec]
    kernels: int = 1
    read: list[tuple[int, int]] = field(default_factory=list)
    written: list[tuple[int, int]] = field(default_factory=list)

    @property
    def ours(self) -> bool:
        return self.name.startswith(f"{NAMESPACE}::")

    @property
    def operator(self) -> str:
        """The name without namespace and overload."""
        return self.name.partition("::")[2].partition(".")[0]

    @property
    def bytes(self) -> int:
        """Of inputs and outputs, each once."""
        return sum(map(size_in_bytes, self.inputs + self.outputs))


def size_in_bytes(spec: Spec) -> int:
    return prod(spec[0]) * spec[2].itemsize


def spec_of(x: Tensor) -> Spec:
    return tuple(x.shape), tuple(x.stride()), x.dtype


def is_spec(x: Any) -> bool:
    return isinstance(x, tuple) and len(x) == 3 and isinstance(x[2], torch.dtype)


class _Recorder(TorchDispatchMode):
    """Notes what runs, but for views and allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.storages: dict[int, torch.UntypedStorage] = {}  # kept, so that no two have one address
        self.in_bodies = False

    def __torch_dispatch__(
        self, function: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        name = function.name()
        plain = name.rpartition("::")[2].partition(".")[0]
        inputs, outputs = ([x for x in tree_leaves(t) if isinstance(x, Tensor)] for t in ((args, kwargs), out))
        storages = {x.untyped_storage()._cdata for x in inputs}
        is_view = all(x.untyped_storage()._cdata in storages for x in outputs)
        if plain in WITHOUT_A_KERNEL or (is_view and not function._schema.is_mutable):
            return out
        kernels = KERNELS.get(plain, 1)
        if plain == "convolution" and len(inputs) == 3:  # the bias is added by a kernel of its own
            kernels += 1
        if plain.startswith("_foreach"):
            kernels = _launches_of_lists(args[0])
        specs = tree_map_only(Tensor, spec_of, args)
        call = Call(name, specs, list(map(spec_of, inputs)), list(map(spec_of, outputs)), kernels)
        if not self.in_bodies:
            call.read, call.written = list(map(self._place, inputs)), list(map(self._place, outputs))
        self.calls.append(call)
        return out

    def _place(self, x: Tensor) -> tuple[int, int]:
        storage = x.untyped_storage()
        self.storages[storage._cdata] = storage
        return storage._cdata, x.storage_offset()


def _launches_of_lists(tensors: Sequence[Tensor]) -> int:
    """Kernels of an operator on two lists: one takes 64 tensors, and 320 parts of 65,536 numbers, at most."""
    return max(-(-len(tensors) // 64), -(-sum(-(-x.numel() // 65536) for x in tensors) // 320))


@contextlib.contextmanager
def _as_on_a_gpu(device: str) -> Iterator[None]:
    """Choices that look at the machine are made as on a GPU."""
    layer_norm = F.layer_norm

    def in_float32(x: Tensor, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Tensor:
        if not torch.is_autocast_enabled(device):
            return layer_norm(x, shape, weight, bias, eps)
        with torch.autocast(device, enabled=False):
            return layer_norm(x.float(), shape, weight, bias, eps)

    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Any = None, dropout: float = 0.0, **options: Any) -> Tensor:
        if mask is not None:
            mask = mask.expand(*q.shape[:-1], k.shape[-2])
        training = q.requires_grad
        return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, mask, training, dropout)[0]

    def cudnn_layout(x: Tensor, *_: Any) -> torch.memory_format:
        last = x.is_contiguous(memory_format=torch.channels_last)
        return torch.channels_last if last else torch.contiguous_format

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(F, "scaled_dot_product_attention", attention))
        stack.enter_context(mock.patch.object(backend, "triton_obstacle", return_value=None))
        stack.enter_context(mock.patch.object(maps, "_ONEDNN", False))
        stack.enter_context(mock.patch.object(maps, "_writes_float32", return_value=True))
        stack.enter_context(backend.use_backend("triton"))
        if device == "cuda":  # where cuDNN keeps the layout; without a GPU PyTorch does not think of it
            cudnn = mock.patch.object(torch._C, "_conv_determine_backend_memory_format", cudnn_layout)
            stack.enter_context(cudnn)
        if device == "cpu":
            stack.enter_context(mock.patch.object(F, "layer_norm", in_float32))
        yield


def trace(name: str, task: str, batch_size: int, size: int = 224, dtype: torch.dtype = torch.bfloat16) -> list[Call]:
    """The operators of one eager step: inference with weights in `dtype`, or training under autocast.

    First those that the model asks for, then those that the bodies of ours ask for.
    """
    device = "cuda" if task == "inference" else "cpu"
    set_fused_attn(True, experimental=True)  # the fastest that models of timm have
    with torch.device("meta"):
        model = timm.create_model(name)
    set_fused_attn(True)
    model = model.to(memory_format=torch.channels_last)
    model = model.eval().to(dtype) if task == "inference" else model.train()
    recorder = _Recorder()
    with FakeTensorMode(allow_non_fake_inputs=True), _as_on_a_gpu(device):
        model = _on(device, model)
        images = torch.empty(batch_size, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
        if task == "inference":
            with torch.no_grad(), recorder:
                model(images.to(dtype))
        else:
            targets = torch.zeros(batch_size, dtype=torch.int64, device=device)
            with recorder:
                with torch.autocast(device, dtype):
                    loss = F.cross_entropy(model(images), targets)
                loss.backward()
    recorder.in_bodies = True
    with recorder:
        for call in [call for call in recorder.calls if call.ours]:
            run_body(call)
    return recorder.calls


def run_body(call: Call) -> None:
    """Run the body of one of our operators on meta tensors: it asks for what it would ask for, and computes nothing."""
    leaves, structure = tree_flatten(call.arguments, is_leaf=is_spec)
    leaves = [torch.empty_strided(*x[:2], dtype=x[2], device="meta") if is_spec(x) else x for x in leaves]
    operators[call.operator].body(*tree_unflatten(leaves, structure))


def _on(device: str, model: nn.Module) -> nn.Module:
    """The model, now with fake tensors on a device that need not exist."""
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for key, x in tensors.items():
                if x is None:
                    continue
                fake = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)
                tensors[key] = nn.Parameter(fake, x.requires_grad) if isinstance(x, nn.Parameter) else fake
    return model
