"""The panels about one query: what each shows, in words and as a picture."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.figure import Figure, FigureBase
from PIL import Image
from torch import Tensor

from models.attention_maps import compose
from runtime.errors import UsageError

from . import figures, maps
from .capture import Capture, Layer

AGENTS_SHOWN = 4


@dataclass(frozen=True)
class Panel:
    """key: fit for a file name. draw: onto an empty figure of the picture's shape."""

    key: str
    title: str
    caption: str
    draw: Callable[[FigureBase], None]


@dataclass(frozen=True)
class Query:
    """What is asked: a pixel (x, y) of the picture, in a stage (1..4), block (from 0, or from the end), head.

    head None: the mean over all heads.
    """

    x: int
    y: int
    stage: int = 3
    block: int = -1
    head: int | None = None

    def __str__(self) -> str:
        return f"{self.x},{self.y}"

    @property
    def heads(self) -> str:
        return "mean over the heads" if self.head is None else f"head {self.head}"

    @property
    def words(self) -> str:
        """The whole query, as a heading."""
        block = "last block" if self.block == -1 else f"block {self.block}"
        return f"Query {self}, stage {self.stage}, {block}, {self.heads}"


def panels_of(capture: Capture, picture: np.ndarray, query: Query) -> list[Panel]:
    """Every panel there is for the query, in the order of the computation.

    picture: (height, width, 3) uint8, what the model saw. UsageError if there is no such stage, block, head or pixel.
    """
    layers = capture.block(query.stage, query.block)
    maps.check_head(layers, query.head)
    panels = []
    for number, layer in enumerate(layers, start=1):
        row, column = maps.token_at(layer, capture.size, query.x, query.y)
        kind = _agent_panels if layer.agents else _token_panels
        # A block of stage 4 of DeBiFormer has the same attention twice.
        again = number > 1 and bool(layers[0].agents) == bool(layer.agents)
        for panel in kind(layer, picture, query, row, column):
            title = f"{panel.title}, second attention" if again else panel.title
            panels.append(Panel(f"{panel.key}_{number}" if again else panel.key, title, panel.caption, panel.draw))
    return panels


def _peak(weights: Tensor) -> str:
    return f"{100 * float(weights.max()):.1f} %"


def _in_padding(layer: Layer, weights: Tensor) -> str:
    """What of a map (H, W) cannot be shown, in words; nothing if all can."""
    height, width = layer.maps.tokens
    hidden = float(weights.sum() - weights[:height, :width].sum())
    return f" {100 * hidden:.1f} % go to the padding right of and below the picture." if hidden > 5e-4 else ""


def _heat(layer: Layer, picture: np.ndarray, weights: Tensor) -> np.ndarray:
    return figures.heated(picture, maps.to_pixels(layer, weights, picture.shape[:2]).numpy())


def _token_panels(layer: Layer, picture: np.ndarray, query: Query, row: int, column: int) -> list[Panel]:
    routing = layer.routing
    window = routing.window_of(row, column) if routing else 0
    weights = maps.over_heads(layer.maps.token_attention(row, column), query.head)
    point = (query.x, query.y)

    def draw_windows(figure: FigureBase) -> None:
        axes = figures.full_picture(figure, figures.dimmed(picture))
        figures.draw_ranked_windows(axes, layer, window)
        figures.mark_query(axes, point)

    def draw_attention(figure: FigureBase) -> None:
        axes = figures.full_picture(figure, _heat(layer, picture, weights))
        if routing:
            figures.draw_ranked_windows(axes, layer, window, filled=False)
        figures.mark_query(axes, point)

    attention = Panel(
        "token_attention",
        "Token attention",
        f"Where the marked token looks within what it may read ({query.heads}). "
        f"The brightest token gets {_peak(weights)}.{_in_padding(layer, weights)}",
        draw_attention,
    )
    if routing is None:
        return [attention]
    count, among = routing.idx.shape[1], routing.n_win**2
    windows = Panel(
        "windows",
        "Routed windows",
        f"The window of the marked token (framed) reads {count} of {among} windows. Yellow and 1: the best match; "
        "towards violet: the later ranks.",
        draw_windows,
    )
    return [windows, attention]


def _agent_panels(layer: Layer, picture: np.ndarray, query: Query, row: int, column: int) -> list[Panel]:
    agents = layer.agents
    ha, wa = agents.agents
    to_agents = maps.over_heads(agents.token_to_agents()[:, row, column], query.head)
    reads = agents.agent_reads().mean(0)
    composed = compose(to_agents, reads)
    shown = to_agents[:ha, :wa].flatten().topk(min(AGENTS_SHOWN, ha * wa))
    places = [divmod(number, wa) for number in shown.indices.tolist()]
    windows = agents.agent_windows()
    positions = maps.agent_pixels(layer)[1]
    point = (query.x, query.y)

    def draw_agents(figure: FigureBase) -> None:
        axes = figures.full_picture(figure, figures.dimmed(picture))
        figures.draw_agents(axes, layer, query.head)

    def draw_reads(figure: FigureBase) -> None:
        side = 2 if len(places) > 1 else 1
        for axes, (a, b) in zip(figures.full_bleed(figure, side, side), places, strict=False):
            figures.show(axes, _heat(layer, picture, reads[a, b]))
            figures.draw_ranked_windows(axes, layer, int(windows[a, b]), filled=False)
            for group in positions[a, b]:
                axes.scatter(*group.tolist(), s=30, color="white", edgecolors="black", zorder=5)

    def draw_composed(figure: FigureBase) -> None:
        axes = figures.full_picture(figure, _heat(layer, picture, composed))
        figures.mark_query(axes, point)

    shares = ", ".join(f"{100 * share:.1f} %" for share in shown.values.tolist())
    groups = f", one colour for each of {agents.groups} groups" if agents.groups > 1 else ""
    return [
        Panel(
            "agents",
            "Deformable agents",
            f"{ha * wa} agents{groups}: crosses are the reference grid, lines lead to where the agents went, areas are "
            f"the attention that they get from all tokens ({query.heads}). "
            f"{100 * maps.share_stopped(agents):.1f} % were stopped at the picture's edge.",
            draw_agents,
        ),
        Panel(
            "agent_reads",
            "What agents read",
            f"The agents that the marked token listens to most ({shares} of its attention), each with the "
            f"{agents.idx.shape[1]} of {agents.n_win**2} windows that its own window (framed) reads.",
            draw_reads,
        ),
        Panel(
            "composed",
            "Token → agents → pixels",
            f"What the marked token sees through all agents: its attention to them ({query.heads}) times theirs. "
            f"The brightest token gets {_peak(composed)}.{_in_padding(layer, composed)}",
            draw_composed,
        ),
    ]


def picture_panel(picture: np.ndarray, query: Query) -> Panel:
    """What the model sees, with the query marked."""

    def draw(figure: FigureBase) -> None:
        axes = figures.full_picture(figure, picture)
        figures.mark_query(axes, (query.x, query.y))

    return Panel("picture", "The picture", f"What the model sees; the query is at {query}.", draw)


def overview(panels: list[Panel], title: str, size: tuple[int, int], columns: int = 3) -> Figure:
    """All panels with their titles in one figure, for papers and slides."""
    rows = -(-len(panels) // columns)
    height = 3 * size[0] / size[1]
    figure = Figure(figsize=(3 * columns, (height + 0.35) * rows + 0.4), dpi=100, facecolor="white")
    figure.suptitle(title, fontsize=11)
    body = figure.subfigures(2, 1, height_ratios=(0.3, (height + 0.35) * rows))[1]
    cells = np.atleast_1d(body.subfigures(rows, columns, wspace=0.02, hspace=0)).ravel()
    for cell, panel in zip(cells, panels, strict=False):
        head, picture = cell.subfigures(2, 1, height_ratios=(0.35, height), hspace=0)
        head.text(0.5, 0.35, panel.title, ha="center", va="center", fontsize=10)
        panel.draw(picture)
    return figure


def layer_frames(capture: Capture, picture: np.ndarray, query: Query, side: int = 320) -> list[Image.Image]:
    """For each attention layer from input to output, what the query's token sees; the layer's name stands below."""
    frames = []
    for layer in capture.layers:
        row, column = maps.token_at(layer, capture.size, query.x, query.y)
        weights = maps.over_heads(layer.maps.token_attention(row, column), None)
        name = "through agents" if layer.agents else "in routed windows" if layer.routing else "plain attention"
        heat = _heat(layer, picture, weights)

        def draw(figure: FigureBase, heat: np.ndarray = heat, layer: Layer = layer, name: str = name) -> None:
            axes = figures.full_picture(figure, heat)
            figures.mark_query(axes, (query.x, query.y))
            label = f"stage {layer.stage}, block {layer.block}, {layer.name.rsplit('.', 1)[-1]}: {name}"
            axes.text(
                *(0.02, 0.02, label),
                transform=axes.transAxes,
                color="white",
                fontsize=10,
                bbox={"facecolor": "black", "alpha": 0.7, "linewidth": 0, "pad": 3},
            )

        frames.append(figures.render(draw, capture.size, side))
    return frames


def grid_of_queries(size: tuple[int, int], per_side: int) -> list[tuple[int, int]]:
    """Centres (x, y) of per_side x per_side cells. UsageError if there are fewer pixels than cells."""
    if not 1 <= per_side <= min(size):
        raise UsageError(f"a grid of {per_side}x{per_side} queries does not fit; use 1..{min(size)} per side")
    ys, xs = (((torch.arange(per_side) + 0.5) * edge / per_side).long().tolist() for edge in size)
    return [(x, y) for y in ys for x in xs]
