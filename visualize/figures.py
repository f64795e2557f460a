"""Arrays onto matplotlib axes: full-bleed pictures whose axes are the image's pixels, without any words.

Shapes: picture (height, width, 3) uint8; points (x, y) in pixels. Letters otherwise as in `visualize.capture`.
"""

import io
from collections.abc import Callable

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection, PatchCollection
from matplotlib.figure import Figure, FigureBase
from matplotlib.patches import Rectangle
from PIL import Image

from . import maps
from .capture import Layer

HEAT = colormaps["inferno"]
RANKS = colormaps["plasma_r"]
GROUPS = colormaps["tab10"]
QUERY = "#00e5ff"


def full_bleed(figure: FigureBase, rows: int = 1, columns: int = 1) -> list[Axes]:
    """Axes without frames that fill the figure, with hair-thin gaps."""
    edges = {"left": 0, "right": 1, "bottom": 0, "top": 1, "wspace": 0.02, "hspace": 0.02}
    grid = figure.subplots(rows, columns, squeeze=False, gridspec_kw=edges)
    for axes in grid.flat:
        axes.set_axis_off()
    return list(grid.flat)


def render(draw: Callable[[FigureBase], None], size: tuple[int, int], side: int = 448) -> Image.Image:
    """What `draw` puts on a figure of the proportions of `size` (height, width), whose longer side is `side` pixels."""
    height, width = (side * edge / max(size) for edge in size)
    figure = Figure(figsize=(width / 100, height / 100), dpi=100)
    canvas = FigureCanvasAgg(figure)
    draw(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def png_bytes(image: Image.Image) -> bytes:
    """The image as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def dimmed(picture: np.ndarray) -> np.ndarray:
    """The picture as dark grey, for colours to stand out on: (height, width, 3) floats in 0..1."""
    grey = picture.astype(np.float64).mean(-1, keepdims=True) / 255
    return np.repeat(0.08 + 0.42 * grey, 3, axis=-1)


def heated(picture: np.ndarray, density: np.ndarray) -> np.ndarray:
    """A density (height, width) >= 0 over the dimmed picture, brightest where it is greatest: floats in 0..1."""
    share = density / max(density.max(), np.finfo(np.float64).tiny)
    opacity = 0.8 * np.sqrt(share)[..., None]
    return dimmed(picture) * (1 - opacity) + HEAT(share)[..., :3] * opacity


def show(axes: Axes, picture: np.ndarray) -> None:
    """The picture, with the axes' limits at its edges."""
    axes.imshow(picture, interpolation="nearest", aspect="auto")
    axes.set_autoscale_on(False)


def full_picture(figure: FigureBase, picture: np.ndarray) -> Axes:
    """The picture alone, as large as the figure."""
    (axes,) = full_bleed(figure)
    show(axes, picture)
    return axes


def mark_query(axes: Axes, point: tuple[int, int]) -> None:
    axes.scatter(*point, s=70, facecolors=QUERY, edgecolors="black", linewidths=1.5, zorder=5)


def _box(layer: Layer, window: int) -> Rectangle:
    left, top, right, bottom = maps.window_box(layer, window)
    return Rectangle((left - 0.5, top - 0.5), right - left, bottom - top)


def outline_window(axes: Axes, layer: Layer, window: int) -> None:
    """The frame of the window that asks."""
    for colour, width in (("black", 4.5), (QUERY, 2.5)):
        box = _box(layer, window)
        box.set(fill=False, edgecolor=colour, linewidth=width, zorder=4)
        axes.add_patch(box)


def draw_ranked_windows(axes: Axes, layer: Layer, window: int, filled: bool = True) -> None:
    """The windows that `window` reads, coloured (and numbered, if filled) by rank: yellow is the first."""
    routed = layer.maps.idx[window].tolist()
    colours = RANKS(np.linspace(0, 1, len(routed)) if len(routed) > 1 else [0.0])
    boxes = [_box(layer, number) for number in routed]
    faces = [(*colour[:3], 0.45 if filled else 0) for colour in colours]
    axes.add_collection(PatchCollection(boxes, facecolors=faces, edgecolors=colours, linewidths=1.5, zorder=3))
    if filled:
        for rank, box in enumerate(boxes, start=1):
            x, y = box.get_x() + box.get_width() / 2, box.get_y() + box.get_height() / 2
            axes.text(x, y, str(rank), ha="center", va="center", color="white", fontsize=9, zorder=6, clip_on=True)
    outline_window(axes, layer, window)


def draw_agents(axes: Axes, layer: Layer, head: int | None) -> None:
    """Agents at their positions (area: share of all tokens' attention), arrows from where the grid has them.

    One colour per offset group; a head has the positions of one group, the mean over heads shows all of them.
    """
    agents = layer.agents
    ha, wa = agents.agents
    start, end = (points.numpy() for points in maps.agent_pixels(layer))  # (ha, wa, g, 2)
    shares = agents.agent_shares()[:, :ha, :wa].numpy()
    heads_per_group = agents.num_heads // agents.groups
    axes.scatter(start[..., 0], start[..., 1], marker="+", s=28, c="white", linewidths=1, alpha=0.8, zorder=3)
    for group in range(agents.groups) if head is None else [head // heads_per_group]:
        heads = slice(group * heads_per_group, (group + 1) * heads_per_group) if head is None else slice(head, head + 1)
        share = shares[heads].mean(0).ravel()
        begin, stop = start[..., group, :].reshape(-1, 2), end[..., group, :].reshape(-1, 2)
        colour = GROUPS(group % 10)
        axes.add_collection(LineCollection(np.stack([begin, stop], 1), colors=[colour], linewidths=1.1, zorder=4))
        # An agent of average share has an area of 45 square points.
        area = 45 * share * len(share)
        axes.scatter(*stop.T, s=area, color=[colour], edgecolors="white", linewidths=0.7, alpha=0.85, zorder=5)
