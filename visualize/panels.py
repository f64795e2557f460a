"""The panels about one query: what each shows, in words and as a picture."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from matplotlib.figure import Figure, FigureBase
from PIL import Image
from torch import Tensor

from models.attention_maps import compose
from runtime.errors import UsageError

from . import figures, maps
from .capture import Capture, Layer
from .shapes import Dot, Heat, Scene, agent_parts, agent_shapes, attention_heat, query_mark, ranked_windows

AGENTS_SHOWN = 4


@dataclass(frozen=True, eq=False)
class Panel:
    """key: fit for a file name. scenes: one, or up to four in a square, over the picture (height, width, 3) uint8.

    note: a sentence that is never folded away.
    """

    key: str
    title: str
    caption: str
    scenes: tuple[Scene, ...]
    picture: np.ndarray
    note: str = ""

    @property
    def heats(self) -> list[Heat]:
        return [scene.heat for scene in self.scenes if scene.heat]

    def draw(self, figure: FigureBase) -> None:
        """Onto an empty figure of the picture's shape."""
        side = 2 if len(self.scenes) > 1 else 1
        for axes, scene in zip(figures.full_bleed(figure, side, side), self.scenes, strict=False):
            figures.draw_scene(axes, self.picture, scene)


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
        place = (layer, picture, query, row, column)
        for panel in [*kind(*place), *_contributions(*place)]:
            if again or panel.key in {other.key for other in panels}:
                panel = replace(panel, key=f"{panel.key}_{number}", title=f"{panel.title}, second attention")
            panels.append(panel)
    return panels


def _peak(weights: Tensor) -> str:
    return f"{100 * float(weights.max()):.1f} %"


def _in_padding(layer: Layer, weights: Tensor) -> str:
    """What of a map (H, W) cannot be shown, in words; nothing if all can."""
    height, width = layer.maps.tokens
    hidden = float(weights.sum() - weights[:height, :width].sum())
    return f" {100 * hidden:.1f} % go to the padding right of and below the picture." if hidden > 5e-4 else ""


def _token_panels(layer: Layer, picture: np.ndarray, query: Query, row: int, column: int) -> list[Panel]:
    routing = layer.routing
    window = routing.window_of(row, column) if routing else 0
    weights = maps.over_heads(layer.maps.token_attention(row, column), query.head)
    mark, read = query_mark((query.x, query.y)), ranked_windows(layer, window, filled=False) if routing else ()
    attention = Panel(
        "token_attention",
        "Token attention",
        f"Where the marked token looks within what it may read ({query.heads}). "
        f"The brightest token gets {_peak(weights)}.{_in_padding(layer, weights)}",
        (Scene((*read, mark), attention_heat(layer, weights)),),
        picture,
    )
    if routing is None:
        return [attention]
    count, among = routing.idx.shape[1], routing.n_win**2
    windows = Panel(
        "windows",
        "Routed windows",
        f"The window of the marked token (framed) reads {count} of {among} windows. Yellow and 1: the best match; "
        "towards violet: the later ranks.",
        (Scene((*ranked_windows(layer, window), mark)),),
        picture,
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

    def reading(row: int, column: int) -> Scene:
        dots = [Dot(*place, 60, "#ffffff", "#000000", "the agent") for place in positions[row, column].tolist()]
        read = ranked_windows(layer, int(windows[row, column]), filled=False)
        return Scene((*read, *dots), attention_heat(layer, reads[row, column]))

    shares = ", ".join(f"{100 * share:.1f} %" for share in shown.values.tolist())
    groups = f", one colour for each of {agents.groups} groups" if agents.groups > 1 else ""
    return [
        Panel(
            "agents",
            "Deformable agents",
            f"{ha * wa} agents{groups}: crosses are the reference grid, lines lead to where the agents went, areas are "
            f"the attention that they get from all tokens ({query.heads}). "
            f"{100 * maps.share_stopped(agents):.1f} % were stopped at the picture's edge.",
            (Scene(agent_shapes(layer, query.head)),),
            picture,
        ),
        Panel(
            "agent_reads",
            "What agents read",
            f"The agents that the marked token listens to most ({shares} of its attention), each with the "
            f"{agents.idx.shape[1]} of {agents.n_win**2} windows that its own window (framed) reads.",
            tuple(reading(*place) for place in places),
            picture,
        ),
        Panel(
            "composed",
            "Token → agents → pixels",
            f"What the marked token sees through all agents: its attention to them ({query.heads}) times theirs. "
            f"The brightest token gets {_peak(composed)}.{_in_padding(layer, composed)}",
            (Scene((query_mark((query.x, query.y)),), attention_heat(layer, composed)),),
            picture,
        ),
    ]


def _contributions(layer: Layer, picture: np.ndarray, query: Query, row: int, column: int) -> list[Panel]:
    """What makes the layer's output at the token, if the layer says so."""
    if layer.output is None or layer.maps.values is None:
        return []
    output, parts = layer.output[row, column].double(), layer.maps.contributions(row, column).double()
    missing = (parts.sum((0, 1, 2)) + layer.maps.rest[row, column].double() - output).norm() / output.norm()
    shares = parts @ output / output.square().sum()
    mark = query_mark((query.x, query.y))
    if layer.agents:
        scene, from_what = Scene((*agent_parts(layer, shares), mark)), "agent"
    else:
        scene, from_what = Scene((mark,), attention_heat(layer, shares.sum(0), signed=True)), "token"
    caption = (
        f"How far each {from_what}'s value carries the output at the marked token along its own direction (all heads): "
        f"red with it, blue against it. Together {100 * float(shares.sum()):.1f} % of the output; the rest is of local "
        "convolution and bias."
    )
    note = f"All parts add up to the layer's output but for {float(missing):.0e} of it."
    return [Panel("contributions", "What makes the output", caption, (scene,), picture, note)]


def picture_panel(picture: np.ndarray, query: Query) -> Panel:
    """What the model sees, with the query marked."""
    scene = Scene((query_mark((query.x, query.y)),), bright=True)
    return Panel("picture", "The picture", f"What the model sees; the query is at {query}.", (scene,), picture)


def stages_at(capture: Capture, picture: np.ndarray, query: Query) -> dict[int, Panel]:
    """What the query's token sees through the last attention of each stage's last block (mean over the heads)."""
    found = {}
    for stage in capture.depths:
        layer = capture.block(stage)[-1]
        weights = maps.over_heads(
            layer.maps.token_attention(*maps.token_at(layer, capture.size, query.x, query.y)), None
        )
        scene = Scene((query_mark((query.x, query.y)),), attention_heat(layer, weights))
        caption = f"Where the marked token looks in the last block of stage {stage}"
        found[stage] = Panel(f"stage_{stage}", f"Stage {stage}", caption, (scene,), picture)
    return found


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
        scene = Scene((query_mark((query.x, query.y)),), attention_heat(layer, weights))

        def draw(figure: FigureBase, scene: Scene = scene, layer: Layer = layer, name: str = name) -> None:
            (axes,) = figures.full_bleed(figure)
            figures.draw_scene(axes, picture, scene)
            label = f"stage {layer.stage}, block {layer.block}, {layer.name.rsplit('.', 1)[-1]}: {name}"
            axes.text(
                *(0.02, 0.98, label),
                transform=axes.transAxes,
                va="top",
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
