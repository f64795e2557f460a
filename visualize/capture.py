"""What every attention layer did with one image, read off by forward hooks that exist only during the capture.

The hooks keep what the models compute anyway (projections, routing, offsets); attention maps are made of it only when
asked for (`visualize.maps`). Nothing in `models` or `ops` knows of this.

Letters: H x W token map (padded to whole windows), C channels, m heads, S windows per side, P = S*S windows,
k routed windows, Ha x Wa agent grid (padded likewise), g offset groups. One image, so there is no batch axis.
"""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models import ops
from models.attention import BiLevelRoutingAttention, FullAttention
from models.backbone import STRIDES
from models.deformable_attention import DeformableAgentAttention
from models.stl import PooledRoutingAttention
from runtime.errors import UsageError

WATCHED = {
    BiLevelRoutingAttention: ("qkv", "router"),
    PooledRoutingAttention: ("qkv_linear", "router"),
    FullAttention: ("qkv",),
    DeformableAgentAttention: ("qkv_conv", "conv_offset_q", "proj_q", "proj_k", "router"),
}
"""Per kind of attention, the submodules whose outputs determine its maps."""

PLACE = re.compile(r"stages\.(\d+)\.(?:blocks\.)?(\d+)\.")


@dataclass(frozen=True)
class Layer:
    """One attention layer's share in the forward pass of one image.

    name: the module's path; stage: 1..4; block: from 0. tokens: rows and columns of the token map before padding.
    q, k: (H, W, C) of the tokens. idx: (P, k) int64, the windows that each window (of queries) reads, best first.
    """

    name: str
    stage: int
    block: int
    tokens: tuple[int, int]
    q: Tensor
    k: Tensor
    n_win: int
    idx: Tensor
    num_heads: int
    scale: float

    @property
    def stride(self) -> int:
        """Pixels per token along each axis."""
        return STRIDES[self.stage - 1]


@dataclass(frozen=True)
class RoutedLayer(Layer):
    """Bi-level routing attention; plain attention is the same with one window (n_win = 1) that reads itself."""


@dataclass(frozen=True)
class AgentLayer(Layer):
    """Deformable agent attention. Here idx says what the windows of agents read.

    positions: (Ha, Wa, g, 2) in [-1, 1], y first. agents: rows and columns of the agent grid before padding.
    agent_q, agent_k: (Ha, Wa, C), what agents ask the tokens with, and what tokens find them by.
    rpe_table: (m, 2Q-1, 2Q-1).
    """

    positions: Tensor
    agents: tuple[int, int]
    agent_q: Tensor
    agent_k: Tensor
    rpe_table: Tensor

    @property
    def groups(self) -> int:
        return self.positions.shape[2]


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
        if not -depth <= block < depth:
            raise UsageError(f"stage {stage} has no block {block}; use 0..{depth - 1}, or -1 for the last")
        return [layer for layer in self.layers if layer.stage == stage and layer.block == block % depth]


def readable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The attention modules that can be read, by path."""
    return {name: module for name, module in model.named_modules() if isinstance(module, tuple(WATCHED))}


def check_readable(model: nn.Module, name: str) -> None:
    """UsageError if the model called `name` has no attention that can be read."""
    if not readable_layers(model):
        raise UsageError(f"{name} has no routing or deformable attention to show; choose a debiformer or biformer")


@contextmanager
def time_limit(model: nn.Module, seconds: float) -> Iterator[None]:
    """Within the block, forward passes end with a UsageError at the first attention layer after so many seconds."""
    end = time.monotonic() + seconds

    def check(module: nn.Module, args: Any) -> None:
        if time.monotonic() > end:
            raise UsageError(f"given up after {seconds:g} seconds; choose a smaller model or image")

    handles = [module.register_forward_pre_hook(check) for module in readable_layers(model).values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def capture(model: nn.Module, image: Tensor) -> Capture:
    """Run the model on one image (1, 3, height, width) in evaluation mode and keep what its attention layers did.

    The model's mode and hooks are afterwards what they were. Not for several threads at once on one model.
    """
    was_training = model.training
    model.eval()
    try:
        with _recording(model) as records:
            logits = model.forward(image)  # a model compiled as a whole would not run the hooks
    finally:
        model.train(was_training)
    modules = readable_layers(model)
    layers = tuple(_layer(name, modules[name], record) for name, record in records.items())
    return Capture(layers, _kept(logits), (image.shape[2], image.shape[3]))


@contextmanager
def _recording(model: nn.Module) -> Iterator[dict[str, dict[str, Any]]]:
    """Within the block, outputs of the watched submodules by layer and submodule; a layer's "input" is its shape."""
    records: dict[str, dict[str, Any]] = {}
    handles = []
    try:
        for name, module in readable_layers(model).items():
            record = records[name] = {}

            def keep_input(module: nn.Module, args: tuple[Tensor], record: dict[str, Any] = record) -> None:
                record["input"] = args[0].shape

            handles.append(module.register_forward_pre_hook(keep_input))
            for part in next(parts for kind, parts in WATCHED.items() if isinstance(module, kind)):

                def keep(
                    module: nn.Module, args: Any, output: Any, record: dict[str, Any] = record, part: str = part
                ) -> None:
                    record[part] = output

                handles.append(module.get_submodule(part).register_forward_hook(keep))
        yield records
    finally:
        for handle in handles:
            handle.remove()


def _kept(x: Tensor) -> Tensor:
    """The first of a batch, on the CPU, in float32 at least; integers stay."""
    x = x[0].detach().cpu()
    return x.to(torch.promote_types(x.dtype, torch.float32)) if x.is_floating_point() else x.clone()


def _layer(name: str, module: nn.Module, record: dict[str, Any]) -> Layer:
    stage, block = (int(number) for number in PLACE.search(name).groups())
    height, width = record["input"][1:3]
    common = {
        "name": name,
        "stage": stage + 1,
        "block": block,
        "tokens": (height, width),
        "num_heads": module.num_heads,
    }
    if isinstance(module, FullAttention):
        q, k, _ = record["qkv"].chunk(3, dim=-1)
        scale = (q.shape[-1] // module.num_heads) ** -0.5
        idx = torch.zeros(1, 1, dtype=torch.int64)
        return RoutedLayer(**common, q=_kept(q), k=_kept(k), n_win=1, idx=idx, scale=scale)

    router = module.router
    if isinstance(module, PooledRoutingAttention):
        (window_h, rows), (window_w, columns) = (ops.split_side(side, router.n_win) for side in (height, width))
        if rows != columns:
            raise UsageError(f"{rows}x{columns} windows cannot be shown for this model; use a square image")
        padded = ops.pad_to_multiple(record["qkv_linear"], (window_h, window_w))
        q, k, _ = padded.chunk(3, dim=-1)
        idx = _kept(record["router"][1])
        return RoutedLayer(**common, q=_kept(q), k=_kept(k), n_win=rows, idx=idx, scale=module.scale)

    common |= {"n_win": router.n_win, "idx": _kept(record["router"][1]), "scale": router.scale}
    if isinstance(module, BiLevelRoutingAttention):
        q, k, _ = record["qkv"]
        return RoutedLayer(**common, q=_kept(q), k=_kept(k))

    q, k, _ = record["qkv_conv"]
    positions = ops.agent_positions(record["conv_offset_q"])
    return AgentLayer(
        **common,
        q=_kept(q),
        k=_kept(k),
        positions=_kept(ops.pad_to_multiple(positions, router.n_win)),
        agents=(positions.shape[1], positions.shape[2]),
        agent_q=_kept(record["proj_q"]),
        agent_k=_kept(record["proj_k"]),
        rpe_table=_kept(module.rpe_table[None]),
    )
