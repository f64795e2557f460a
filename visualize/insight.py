"""What TensorBoard shows of the attention while a model trains: pictures, and numbers that warn of collapse."""

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import FigureBase
from PIL import Image
from torch import Tensor, nn

from models.pixels import Pixels, denormalize, normalize

from . import figures, maps
from .capture import Capture, Layer, capture, check_readable
from .shapes import Heat, Scene, agent_shapes

IMAGES = 4
"""Validation images that are watched."""
STAGE_SIDE = 224
Drawing = Callable[[Axes, np.ndarray, list[Layer]], None]


@dataclass(frozen=True)
class Insight:
    """scalars by tag; pictures by tag."""

    scalars: dict[str, float]
    pictures: dict[str, Image.Image]


class Watcher:
    """Captures the attention on the same images each time.

    images: (N, 3, height, width) uint8, or floats, which are taken for normalised with `pixels`. UsageError if the
    model, called `name`, has nothing to show.
    """

    def __init__(self, model: nn.Module, name: str, images: Tensor, pixels: Pixels) -> None:
        check_readable(model, name)
        self.model, self.images, self.pixels = model, normalize(images, pixels), pixels

    def collect(self) -> Insight:
        """Capture the attention as it is now: one forward pass per image, without effect on the training."""
        parameter = next(self.model.parameters())
        captures = [capture(self.model, image[None].to(parameter)) for image in self.images]
        found: dict[str, list[float]] = defaultdict(list)
        for one in captures:
            for layer in one.layers:
                for name, value in warnings_of(layer).items():
                    found[name].append(value)
        pictures = {}
        for number, (one, image) in enumerate(zip(captures, self.images, strict=True)):
            picture = picture_of(image, self.pixels)
            pictures[f"attention_routing/image_{number}"] = stages_in_a_row(one, picture, _draw_routing)
            if any(layer.agents for layer in one.layers):
                pictures[f"attention_agents/image_{number}"] = stages_in_a_row(one, picture, _draw_agents)
        return Insight({name: sum(values) / len(values) for name, values in sorted(found.items())}, pictures)


def warnings_of(layer: Layer) -> dict[str, float]:
    """Shares in 0..1 that tell of collapse, by tag; empty where no windows are chosen.

    routing_entropy: of how often each window is read, divided by its maximum log P: 0 if all windows read the same
    one, 1 if all are read equally often. windows_unread: share that no window reads. offset_saturation: share of agents
    that were stopped at -1 or 1 along an axis. The tag says stage, and whether tokens or agents route.
    """
    if layer.routing is None:
        return {}
    place = f"stage_{layer.stage}_{'agents' if layer.agents else 'tokens'}"
    read = layer.routing.windows_read().flatten().double()
    shares = read / read.sum()
    entropy = -float(torch.special.xlogy(shares, shares).sum()) / math.log(len(shares))
    result = {
        f"attention_routing_entropy/{place}": entropy,
        f"attention_windows_unread/{place}": float((read == 0).double().mean()),
    }
    if layer.agents:
        result[f"attention_offset_saturation/{place}"] = maps.share_stopped(layer.agents)
    return result


def picture_of(image: Tensor, pixels: Pixels) -> np.ndarray:
    """(3, height, width), normalised as in training -> (height, width, 3) uint8."""
    shown = denormalize(image[None], pixels)[0].permute(1, 2, 0)
    return (shown * 255).round().byte().cpu().numpy()


def stages_in_a_row(found: Capture, picture: np.ndarray, draw: Drawing) -> Image.Image:
    """One picture with the last block of each stage, from left to right."""

    def draw_all(figure: FigureBase) -> None:
        for axes, stage in zip(figures.full_bleed(figure, 1, len(found.depths)), found.depths, strict=True):
            draw(axes, picture, found.block(stage))

    height, width = found.size
    stages = len(found.depths)
    return figures.render(draw_all, (height, width * stages), STAGE_SIDE * stages)


def _draw_routing(axes: Axes, picture: np.ndarray, layers: list[Layer]) -> None:
    """How often each window is read; the brightest is read most."""
    layer = next((layer for layer in layers if layer.routing), None)
    if layer is None:
        figures.show(axes, picture)
        return
    window_h, window_w = (side // layer.routing.n_win for side in layer.routing.sides)
    tokens = layer.routing.windows_read().double().repeat_interleave(window_h, 0).repeat_interleave(window_w, 1)
    height, width = layer.maps.tokens
    times = Heat(tokens[:height, :width].numpy(), layer.stride, "times")
    figures.draw_scene(axes, picture, Scene(heat=times))


def _draw_agents(axes: Axes, picture: np.ndarray, layers: list[Layer]) -> None:
    figures.draw_scene(axes, picture, Scene(agent_shapes(layers[-1], None) if layers[-1].agents else ()))
