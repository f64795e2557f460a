"""What lies over a picture, as data: heat, windows, agents and marks. `figures` makes PNGs of it, `svg` makes HTML.

Places are pixels of the picture, x first; the pixel (0, 0) covers -0.5..0.5 along both axes. Marks are measured in
448ths of the picture's longer side. Letters otherwise as in `visualize.capture`.
"""

from dataclasses import dataclass

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import to_hex
from torch import Tensor

from runtime.plot_style import COLOURS

from . import maps
from .capture import Layer

HEAT = colormaps["inferno"]
BALANCE = colormaps["coolwarm"]
RANKS = colormaps["plasma_r"]
QUERY = "#00e5ff"


@dataclass(frozen=True, eq=False)
class Heat:
    """values: (rows, columns) float64, each for a square of `stride` pixels. unit: of the values, in words.

    signed: they may lie below 0, too.
    """

    values: np.ndarray
    stride: int = 1
    unit: str = "%"
    signed: bool = False

    @property
    def density(self) -> float:
        """The greatest value per pixel, or the farthest from 0."""
        return self.top / self.stride**2

    @property
    def top(self) -> float:
        return float(np.abs(self.values).max())

    def pixels(self, size: tuple[int, int]) -> np.ndarray:
        """The value of every pixel's square: (height, width)."""
        return self.values.repeat(self.stride, 0).repeat(self.stride, 1)[: size[0], : size[1]]


@dataclass(frozen=True)
class Box:
    """A window. width: of its frame; fill: opacity of its inside; label: written in its middle."""

    left: float
    top: float
    right: float
    bottom: float
    colour: str
    width: float = 2.0
    fill: float = 0.0
    label: str = ""


@dataclass(frozen=True)
class Line:
    start: tuple[float, float]
    end: tuple[float, float]
    colour: str


@dataclass(frozen=True)
class Dot:
    """A disc of an area, with an edge. words: what it is, with its value."""

    x: float
    y: float
    area: float
    colour: str
    edge: str
    words: str = ""


@dataclass(frozen=True)
class Cross:
    x: float
    y: float


Shape = Box | Line | Dot | Cross


@dataclass(frozen=True, eq=False)
class Scene:
    """One picture of a panel. The photo is dimmed for colours to stand out on, unless `bright`."""

    shapes: tuple[Shape, ...] = ()
    heat: Heat | None = None
    bright: bool = False


def attention_heat(layer: Layer, weights: Tensor, signed: bool = False) -> Heat:
    """A map (H, W) of shares as percentages of all attention; what lies in the padding is cut off."""
    height, width = layer.maps.tokens
    return Heat(100 * weights[:height, :width].double().numpy(), layer.stride, signed=signed)


def heat_colours(heat: Heat, density: float | None = None) -> np.ndarray:
    """(rows, columns, 4) uint8: the brightest and least transparent are of `density`, or else the map's greatest."""
    top = max((heat.density if density is None else density) * heat.stride**2, np.finfo(np.float64).tiny)
    return ramp(np.clip(heat.values / top, -1, 1), heat.signed)


def ramp(shares: np.ndarray, signed: bool = False) -> np.ndarray:
    """Shares of the scale (...), from 0 or, if signed, from -1 to 1, as their colours (..., 4) uint8."""
    colours = BALANCE((shares + 1) / 2, bytes=True) if signed else HEAT(shares, bytes=True)
    colours[..., 3] = np.round(255 * 0.8 * np.sqrt(np.abs(shares)))
    return colours


def query_mark(point: tuple[int, int]) -> Dot:
    return Dot(*point, area=110, colour=QUERY, edge="#000000", words="the marked token")


def ranked_windows(layer: Layer, window: int, filled: bool = True) -> tuple[Box, ...]:
    """The windows that `window` reads, coloured (and numbered, if filled) by rank: yellow is the first."""
    routed = layer.maps.idx[window].tolist()
    colours = RANKS(np.linspace(0, 1, len(routed)) if len(routed) > 1 else [0.0])
    boxes = [
        _box(layer, number, to_hex(colour), fill=0.45 * filled, label=str(rank) * filled)
        for rank, (number, colour) in enumerate(zip(routed, colours, strict=True), start=1)
    ]
    frame = (_box(layer, window, "#000000", width=6.5), _box(layer, window, QUERY, width=3.5))
    return (*boxes, *frame)


def _box(layer: Layer, window: int, colour: str, **looks: float | str) -> Box:
    return Box(*(edge - 0.5 for edge in maps.window_box(layer, window)), colour, **looks)


def agent_shapes(layer: Layer, head: int | None) -> tuple[Shape, ...]:
    """Agents at their positions (area: share of all tokens' attention), lines from where the grid has them.

    One colour per offset group; a head has the positions of one group, the mean over heads shows all of them.
    """
    agents = layer.agents
    ha, wa = agents.agents
    start, end = (points.numpy() for points in maps.agent_pixels(layer))  # (ha, wa, g, 2)
    shares = agents.agent_shares()[:, :ha, :wa].numpy()
    heads_per_group = agents.num_heads // agents.groups
    crosses = {Cross(*place) for place in start.reshape(-1, 2).round(2).tolist()}
    lines, dots = [], []
    for group in range(agents.groups) if head is None else [head // heads_per_group]:
        heads = slice(group * heads_per_group, (group + 1) * heads_per_group) if head is None else slice(head, head + 1)
        share = shares[heads].mean(0).ravel().tolist()
        begin, stop = (points[..., group, :].reshape(-1, 2).tolist() for points in (start, end))
        colour = COLOURS[group % len(COLOURS)]
        lines += [Line(tuple(a), tuple(b), colour) for a, b in zip(begin, stop, strict=True)]
        area = 87 * len(share)  # of an agent that gets everything: one of average share has 87
        dots += [
            Dot(*place, area * part, colour, "#ffffff", f"agent {number}: {100 * part:.2f} %")
            for number, (place, part) in enumerate(zip(stop, share, strict=True), start=1)
        ]
    return (*sorted(crosses, key=lambda cross: (cross.y, cross.x)), *lines, *dots)


def agent_parts(layer: Layer, shares: Tensor) -> tuple[Dot, ...]:
    """Agents at their positions by what they add (m, Ha, Wa): area says how much, red with the output, blue against."""
    agents = layer.agents
    ha, wa = agents.agents
    by_group = shares[:, :ha, :wa].unflatten(0, (agents.groups, -1)).sum(1).movedim(0, -1).flatten().tolist()
    places = maps.agent_pixels(layer)[1].flatten(0, 2).tolist()
    largest = max(map(abs, by_group)) or 1.0
    return tuple(
        Dot(
            *place,
            700 * abs(part) / largest,
            to_hex(BALANCE(1.0 if part > 0 else 0.0)),
            "#ffffff",
            f"{100 * part:.2f} %",
        )
        for place, part in zip(places, by_group, strict=True)
    )
