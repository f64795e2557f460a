"""Scenes onto matplotlib axes: full-bleed pictures whose axes are the image's pixels, with a colour bar for heat.

Shapes: picture (height, width, 3) uint8; points (x, y) in pixels. Letters otherwise as in `visualize.capture`.
"""

import io
from collections.abc import Callable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure, FigureBase
from matplotlib.patches import Rectangle
from PIL import Image

from .shapes import Box, Cross, Dot, Heat, Line, Scene, heat_colours, ramp

POINT = 100 / 72
"""Pixels of a rendered picture per point, in which matplotlib measures marks."""


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
    """The picture as dark grey, for colours to stand out on: (height, width, 3) uint8."""
    grey = picture.mean(-1, keepdims=True)
    return np.repeat(20 + 0.42 * grey, 3, axis=-1).round().astype(np.uint8)


def show(axes: Axes, picture: np.ndarray) -> None:
    """The picture, with the axes' limits at its edges."""
    axes.imshow(picture, interpolation="nearest", aspect="auto")
    axes.set_autoscale_on(False)


def draw_scene(axes: Axes, picture: np.ndarray, scene: Scene) -> None:
    """A scene over the picture, as large as the axes."""
    show(axes, picture if scene.bright else dimmed(picture))
    if scene.heat:
        _draw_heat(axes, scene.heat)
    for order, shape in enumerate(scene.shapes, start=3):
        if isinstance(shape, Box):
            _draw_box(axes, shape, order)
        elif isinstance(shape, Cross):
            axes.plot(shape.x, shape.y, "+", color="white", alpha=0.8, zorder=order)
        elif isinstance(shape, Dot):
            area = {"s": shape.area / POINT**2, "linewidths": 1 / POINT}
            axes.scatter(shape.x, shape.y, color=shape.colour, edgecolors=shape.edge, zorder=order, **area)
    lines = [shape for shape in scene.shapes if isinstance(shape, Line)]
    ends, colours = [(line.start, line.end) for line in lines], [line.colour for line in lines]
    axes.add_collection(LineCollection(ends, colors=colours, linewidths=1.1, zorder=3))


def _draw_heat(axes: Axes, heat: Heat) -> None:
    rows, columns = heat.values.shape
    extent = (-0.5, columns * heat.stride - 0.5, rows * heat.stride - 0.5, -0.5)
    axes.imshow(heat_colours(heat), interpolation="nearest", aspect="auto", extent=extent)
    axes.add_patch(Rectangle((0.02, 0.02), 0.58, 0.09, transform=axes.transAxes, color="black", alpha=0.7, zorder=900))
    bar = axes.inset_axes((0.09, 0.045, 0.2, 0.04), zorder=901)
    bar.imshow(ramp(np.linspace(-1 if heat.signed else 0, 1, 64), heat.signed)[None], aspect="auto")
    bar.set_axis_off()
    for place, words in ((0.04, "±" if heat.signed else "0"), (0.3, f"{heat.top:.3g} {heat.unit}".rstrip())):
        looks = {"transform": axes.transAxes, "color": "white", "fontsize": 8, "va": "center", "zorder": 902}
        axes.text(place, 0.062, words, **looks)


def _draw_box(axes: Axes, box: Box, order: int) -> None:
    place, width, height = (box.left, box.top), box.right - box.left, box.bottom - box.top
    if box.fill:
        axes.add_patch(Rectangle(place, width, height, facecolor=box.colour, alpha=box.fill, zorder=order))
    edge = {"fill": False, "edgecolor": box.colour, "linewidth": box.width / POINT}
    axes.add_patch(Rectangle(place, width, height, zorder=order, **edge))
    middle = (box.left + width / 2, box.top + height / 2)
    axes.text(*middle, box.label, ha="center", va="center", color="white", fontsize=9, zorder=order + 1, clip_on=True)
