"""What is timed: inference and training steps of models, the layers they consist of, two large maps."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import models
from models.attention import BiLevelRoutingAttention
from models.layers import PointwiseConv
from models.ops.backend import BACKENDS, use_backend
from models.pyramid import FeaturePyramid

from .measure import DTYPES, interleaved_seconds
from .model_table import count_macs

TASKS = ("inference", "training")
MODES = ("eager", "deterministic", "fused", "compiled")


@dataclass(frozen=True)
class Case:
    """One thing to measure.

    backend: of this project's attention; None for models that have none. dtype: "fp32", "bf16" or "fp16"; of the
    weights in inference, of autocast in training. mode: "eager", "deterministic" (the same, by
    deterministic algorithms alone), "fused" (`models.fuse`) or "compiled".
    model_kwargs: arguments of the model besides its size.
    """

    model: str
    batch_size: int
    task: str = "inference"
    backend: str | None = None
    dtype: str = "fp32"
    input_size: int = 224
    mode: str = "eager"
    model_kwargs: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def images_shape(self) -> tuple[int, int, int, int]:
        return self.batch_size, 3, self.input_size, self.input_size


def is_ours(name: str) -> bool:
    """Whether this project's attention, and so a choice of backend, is in the model."""
    return name in models.MODEL_NAMES and name != "maxvit_stl"


def create(case: Case) -> nn.Module:
    """The model with random weights; models bound to a size are made for the case's."""
    config = timm.models.get_pretrained_cfg(case.model)
    sized = config.fixed_input_size and config.input_size[-1] != case.input_size
    return timm.create_model(case.model, **({"img_size": case.input_size} if sized else {}), **case.model_kwargs)


def forward_flops(case: Case) -> int:
    """Floating-point operations of the convolutions and matrix products of one image, forward."""
    with torch.device("meta"):
        return 2 * count_macs(create(case), case.input_size)


def step_flops(case: Case) -> int:
    """Those of a step; backward counts twice as many as forward, and nothing that is only computed again."""
    return forward_flops(case) * case.batch_size * (3 if case.task == "training" else 1)


def build_step(case: Case, device: torch.device) -> Callable[[], None]:
    """A function that makes one step on random images. The optimizer's state exists, gradients do not."""
    torch.manual_seed(0)
    model = create(case).to(device, memory_format=torch.channels_last)
    images = torch.randn(case.images_shape, device=device).contiguous(memory_format=torch.channels_last)
    make = _inference if case.task == "inference" else _training
    step = make(model, images, case)

    def on_backend() -> None:
        torch.use_deterministic_algorithms(case.mode == "deterministic")
        try:
            with use_backend(case.backend):
                step()
        finally:
            torch.use_deterministic_algorithms(False)

    return on_backend


def _inference(model: nn.Module, images: Tensor, case: Case) -> Callable[[], None]:
    dtype = DTYPES[case.dtype]
    model, images = model.eval().to(dtype), images.to(dtype)
    if case.mode == "fused":
        model = models.fuse(model)
    model = _compiled(model, case)

    @torch.inference_mode()
    def step() -> None:
        model(images)

    return step


def _training(model: nn.Module, images: Tensor, case: Case) -> Callable[[], None]:
    """Forward, cross-entropy, backward, AdamW."""
    targets = torch.arange(case.batch_size, device=images.device) % model.num_classes
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # makes its state
    optimizer.zero_grad(set_to_none=True)
    dtype, model = DTYPES[case.dtype], _compiled(model.train(), case)

    def step() -> None:
        with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
            loss = F.cross_entropy(model(images), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


class _OnBackend(nn.Module):
    """A model that torch.compile traces anew for every backend, the choice being a constant of the graph."""

    def __init__(self, model: nn.Module, backend: str | None) -> None:
        super().__init__()
        self.model, self.backend = model, backend

    def forward(self, x: Tensor) -> Tensor:
        assert self.backend in (None, *BACKENDS)  # what is read is guarded
        return self.model(x)


def _compiled(model: nn.Module, case: Case) -> nn.Module:
    if case.mode != "compiled":
        return model
    torch._dynamo.config.recompile_limit = 64  # all models go through the same code above
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    return torch.compile(_OnBackend(model, case.backend), dynamic=False, fullgraph=True)


# -- the floor ----------------------------------------------------------------------------------------------------


def layer_floor(case: Case, device: torch.device, repeats: int) -> dict[str, float]:
    """Seconds that the convolutions and linear layers of one forward pass take, each timed alone on its own input.

    Keys: "as_run", every layer as the model runs it; "as_linear" and "as_convolution", 1x1 convolutions and linear
    layers by F.linear and by F.conv2d; "fastest", every layer in the fastest of these ways.
    """
    model = create(case).eval().to(device, memory_format=torch.channels_last)
    images = torch.randn(case.images_shape, device=device).contiguous(memory_format=torch.channels_last)
    calls: list[tuple[nn.Module, Tensor]] = []

    def record(layer: nn.Module, inputs: tuple[Tensor], _output: Tensor) -> None:
        calls.append((layer, inputs[0].clone(memory_format=torch.preserve_format)))

    layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    hooks = [layer.register_forward_hook(record) for layer in layers]
    with torch.inference_mode(), use_backend(case.backend):
        model(images)
        for hook in hooks:
            hook.remove()
        seconds = dict.fromkeys(("as_run", "as_linear", "as_convolution", "fastest"), 0.0)
        for layer, x in calls:
            timed = interleaved_seconds({"as_run": partial(layer, x), **ways_of(layer, x)}, repeats, device)
            medians = {way: statistics.median(values) for way, values in timed.items()}
            medians["fastest"] = min(medians.values())
            for way in seconds:
                seconds[way] += medians.get(way, medians["as_run"])
    return seconds


def ways_of(layer: nn.Module, x: Tensor) -> dict[str, Callable[[], Tensor]]:
    """The layer on x as a product of whole rows, and as a 1x1 convolution of them; nothing if it is neither."""
    if isinstance(layer, nn.Conv2d) and not isinstance(layer, PointwiseConv):
        if layer.kernel_size != (1, 1) or layer.stride != (1, 1) or layer.groups != 1:
            return {}
        x = x.permute(0, 2, 3, 1)
    weight = layer.weight.flatten(1)
    image, kernel = x.reshape(1, 1, -1, x.shape[-1]).permute(0, 3, 1, 2), weight[..., None, None]
    return {
        "as_linear": lambda: F.linear(x, weight, layer.bias),
        "as_convolution": lambda: F.conv2d(image, kernel, layer.bias),
    }


# -- large maps ---------------------------------------------------------------------------------------------------


def build_bra_layer(device: torch.device) -> Callable[[], None]:
    """Forward and backward of one BRA layer: 600x500 tokens of 32 channels, one head, 4 of 7x7 windows read."""
    layer = BiLevelRoutingAttention(dim=32, num_heads=1, n_win=7, topk=4).to(device)
    x = torch.randn(1, 600, 500, 32, device=device, requires_grad=True)
    return lambda: layer(x).sum().backward()


def build_dense(device: torch.device) -> Callable[[], None]:
    """Inference of debiformer_small as a detector's backbone (16x16 windows) on one image of 800x1344 pixels."""
    model = timm.create_model("debiformer_small", n_win=16)
    model = FeaturePyramid(model).eval().to(device, memory_format=torch.channels_last)
    image = torch.randn(1, 3, 800, 1344, device=device).contiguous(memory_format=torch.channels_last)

    @torch.inference_mode()
    def step() -> None:
        model(image)

    return step


LARGE_MAPS = {"bra_layer": build_bra_layer, "dense": build_dense}
