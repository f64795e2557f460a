"""The attention maps of every attention layer for one image.

A layer is any module with a method `attention_maps`; hooks that exist only during the capture ask it for the maps of
what its `forward` is given. Nothing in `models` knows of this.
"""

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from models.attention_maps import AgentMaps, AttentionMaps, RoutedMaps
from models.backbone import STRIDES
from runtime.errors import UsageError

PLACE = re.compile(r"stages\.(\d+)\.(?:blocks\.)?(\d+)\.")


@dataclass(frozen=True)
class Layer:
    """One attention layer. name: the module's path; stage: 1..4; block: from 0; output: what it gave for the image."""

    name: str
    stage: int
    block: int
    maps: AttentionMaps
    output: Tensor | None = None

    @property
    def stride(self) -> int:
        """Pixels per token along each axis."""
        return STRIDES[self.stage - 1]

    @property
    def routing(self) -> RoutedMaps | None:
        """The maps, if windows were chosen among several."""
        return self.maps if isinstance(self.maps, RoutedMaps) and self.maps.n_win > 1 else None

    @property
    def agents(self) -> AgentMaps | None:
        """The maps, if agents read for the tokens."""
        return self.maps if isinstance(self.maps, AgentMaps) else None


@dataclass(frozen=True)
class Capture:
    """All attention layers of one forward pass, from input to output. size: height, width of the image in pixels."""

    layers: tuple[Layer, ...]
    logits: Tensor
    size: tuple[int, int]

    @property
    def depths(self) -> dict[int, int]:
        """Blocks with attention, per stage."""
        return {layer.stage: layer.block + 1 for layer in self.layers}

    def block(self, stage: int, block: int = -1) -> list[Layer]:
        """The attention layers of a block; negative numbers count from the stage's end. UsageError if there is none."""
        if stage not in self.depths:
            raise UsageError(f"there is no stage {stage}; this model has stages {', '.join(map(str, self.depths))}")
        depth = self.depths[stage]
        found = [layer for layer in self.layers if layer.stage == stage and layer.block == block % depth]
        if not -depth <= block < depth or not found:
            raise UsageError(f"stage {stage} has no block {block}; use 0..{depth - 1}, or -1 for the last")
        return found


def readable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The modules in stages that offer attention maps, by path; what lies inside such a module is left to it."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if callable(getattr(module, "attention_maps", None)) and PLACE.search(f"{name}.") and not inside:
            found[name] = module
    return found


def check_readable(model: nn.Module, name: str) -> None:
    """UsageError if the model called `name` has no attention that can be read."""
    if not readable_layers(model):
        raise UsageError(f"{name} has no routing or deformable attention to show; choose a debiformer or biformer")


@contextmanager
def before_attention(model: nn.Module, call: Callable[[str, nn.Module, tuple[Any, ...]], None]) -> Iterator[None]:
    """Within the block, `call(path, module, args)` runs before every attention layer of a forward pass."""
    handles = [
        module.register_forward_pre_hook(lambda module, args, name=name: call(name, module, args))
        for name, module in readable_layers(model).items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def time_limit(model: nn.Module, seconds: float) -> Iterator[None]:
    """Within the block, forward passes end with a UsageError at the first attention layer after so many seconds."""
    end = time.monotonic() + seconds

    def check(*_: Any) -> None:
        if time.monotonic() > end:
            raise UsageError(f"given up after {seconds:g} seconds; choose a smaller model or image")

    with before_attention(model, check):
        yield


@torch.no_grad()
def capture(model: nn.Module, image: Tensor) -> Capture:
    """Run the model on one image (1, 3, height, width) in evaluation mode and keep its attention maps, on the CPU.

    The model's mode and hooks are afterwards what they were. Not for several threads at once on one model.
    UsageError if a layer has no maps for this image.
    """
    layers: list[Layer] = []

    def keep(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        stage, block = (int(number) for number in PLACE.search(f"{name}.").groups())
        try:
            layers.append(Layer(name, stage + 1, block, module.attention_maps(*args).cpu()))
        except ValueError as error:
            raise UsageError(f"{name}: {error}") from error

    def keep_output(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        layers[-1] = replace(layers[-1], output=output[0].cpu())

    handles = [module.register_forward_hook(keep_output) for module in readable_layers(model).values()]
    was_training = model.training
    model.eval()
    try:
        with before_attention(model, keep):
            logits = model.forward(image)  # a model compiled as a whole would not run the hooks
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    logits = logits[0].cpu()
    return Capture(tuple(layers), logits.to(torch.promote_types(logits.dtype, torch.float32)), tuple(image.shape[2:]))
