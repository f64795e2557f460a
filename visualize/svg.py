"""Scenes as inline SVG: sharp at any size, a few kilobytes each, over one photo that they share.

Colours of marks are written out; everything else follows the page's style.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np
from PIL import Image

from runtime.plot_style import COLOURS

from .figures import dimmed
from .shapes import Box, Cross, Dot, Heat, Line, Scene, Shape, heat_colours, ramp

PHOTO = "photo"
QUALITY = 88
SMOOTH, EXACT = "auto", "pixelated"


def _gradient(signed: bool) -> str:
    colours = ramp(np.linspace(-1 if signed else 0, 1, 9), signed).tolist()
    stops = ", ".join(f"rgb({r} {g} {b} / {a / 255:.2f})" for r, g, b, a in colours)
    return f"linear-gradient(to right, {stops}), #222"


STYLE = f"""
.scenes {{ display: grid; gap: 2px; background: #000 }}
.scenes.four {{ grid-template-columns: 1fr 1fr }}
.scenes svg {{ display: block; width: 100%; height: auto }}
.scenes text {{ fill: #fff; text-anchor: middle; dominant-baseline: central; font-family: system-ui, sans-serif }}
.chart text {{ fill: currentColor; font: 8px system-ui, sans-serif; dominant-baseline: central }}
.chart svg {{ display: block; width: 100%; height: auto }}
.bar {{ display: flex; gap: 0.4rem; align-items: center; font-size: 0.8rem; font-variant-numeric: tabular-nums }}
.bar i {{ flex: 1; height: 0.6rem; border-radius: 0.3rem; background: {_gradient(False)} }}
.bar.signed i {{ background: {_gradient(True)} }}
"""


def shared_photo(photo: Image.Image, size: tuple[int, int]) -> str:
    """What the scenes of a page refer to: the photo, bright and dimmed, over a picture of size (height, width)."""
    height, width = size
    box = f'x="-0.5" y="-0.5" width="{width}" height="{height}" preserveAspectRatio="none"'
    images = {PHOTO: photo, f"{PHOTO}-dim": Image.fromarray(dimmed(np.asarray(photo)))}
    defined = "".join(
        f'<image id="{name}" {box} href="{data_url(image, "JPEG")}"></image>' for name, image in images.items()
    )
    return f'<svg width="0" height="0" style="position: absolute" aria-hidden="true"><defs>{defined}</defs></svg>'


def data_url(image: Image.Image, kind: str) -> str:
    """An image as a PNG or JPEG within an address."""
    buffer = io.BytesIO()
    image.save(buffer, kind, quality=QUALITY)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def scenes_svg(
    scenes: Sequence[Scene], size: tuple[int, int], words: str, density: float | None = None, smooth: bool = False
) -> str:
    """One scene, or four in a square, for a picture of size (height, width). words: what they show, for who cannot see.

    density: value per pixel at the scale's end; None takes the greatest of all scenes.
    """
    if density is None:
        density = max((scene.heat.density for scene in scenes if scene.heat), default=None)
    drawn = "".join(_scene(scene, size, words, density, smooth) for scene in scenes)
    return f'<div class="scenes{" four" * (len(scenes) > 1)}">{drawn}</div>'


def _scene(scene: Scene, size: tuple[int, int], words: str, density: float | None, smooth: bool) -> str:
    height, width = size
    unit = max(size) / 448
    photo = PHOTO if scene.bright else f"{PHOTO}-dim"
    heat = _heat(scene.heat, density, smooth) if scene.heat else ""
    shapes = "".join(_shape(shape, unit) for shape in scene.shapes)
    return (
        f'<svg viewBox="-0.5 -0.5 {width} {height}" role="img" aria-label="{escape(words)}">'
        f'<use href="#{photo}"></use>{heat}{shapes}</svg>'
    )


def _heat(heat: Heat, density: float | None, smooth: bool) -> str:
    """The map as a PNG of one pixel per value, with the values in 32767ths of the greatest for who points at them."""
    rows, columns = heat.values.shape
    top = heat.top
    numbers = np.round(heat.values / (top or 1.0) * 32767).astype("<i2").tobytes()
    return (
        f'<image x="-0.5" y="-0.5" width="{columns * heat.stride}" height="{rows * heat.stride}" '
        f'preserveAspectRatio="none" style="image-rendering: {SMOOTH if smooth else EXACT}" '
        f'data-values="{base64.b64encode(numbers).decode()}" data-columns="{columns}" data-stride="{heat.stride}" '
        f'data-top="{top:.6g}" data-unit="{escape(heat.unit)}" '
        f'href="{data_url(Image.fromarray(heat_colours(heat, density)), "PNG")}"></image>'
    )


def _shape(shape: Shape, unit: float) -> str:
    match shape:
        case Box(left, top, right, bottom, colour, width, fill, label):
            place = f'x="{left:g}" y="{top:g}" width="{right - left:g}" height="{bottom - top:g}"'
            looks = f'fill="{colour}" fill-opacity="{fill}" stroke="{colour}" stroke-width="{width * unit:g}"'
            box = f"<rect {place} {looks}/>"
            middle = f'x="{(left + right) / 2:g}" y="{(top + bottom) / 2:g}" font-size="{17 * unit:g}"'
            return f"{box}<text {middle}>{escape(label)}</text>" if label else box
        case Line((x1, y1), (x2, y2), colour):
            ends = f'x1="{x1:.2f}" y1="{y1:.2f}" x2="{x2:.2f}" y2="{y2:.2f}"'
            return f'<line {ends} stroke="{colour}" stroke-width="{1.5 * unit:g}"/>'
        case Dot(x, y, area, colour, edge, words):
            place = f'cx="{x:.2f}" cy="{y:.2f}" r="{unit * (area / np.pi) ** 0.5:.3g}"'
            looks = f'fill="{colour}" fill-opacity="0.9" stroke="{edge}" stroke-width="{unit:g}"'
            return f"<circle {place} {looks}><title>{escape(words)}</title></circle>"
        case Cross(x, y):
            arm = 4 * unit
            path = f"M{x - arm:g} {y:g}h{2 * arm:g}M{x:g} {y - arm:g}v{2 * arm:g}"
            return f'<path d="{path}" stroke="#fff" stroke-opacity="0.8" stroke-width="{unit:g}"/>'


def colour_bar(heat: Heat, density: float | None = None) -> str:
    """The scale of a map with the values at its ends."""
    top = (heat.density if density is None else density) * heat.stride**2
    start, looks = (with_unit(-top, heat.unit), "bar signed") if heat.signed else ("0", "bar")
    return f'<div class="{looks}"><span>{start}</span><i></i><span>{with_unit(top, heat.unit)}</span></div>'


def chart(lines: Mapping[str, np.ndarray], words: str) -> str:
    """Curves of values 0..1 over 0..1, by their names; those of chance are dashed. words: what they show."""
    drawn, names = [], []
    for number, (name, values) in enumerate(lines.items()):
        places = enumerate(values.tolist())
        path = " ".join(f"{20 + 170 * step / (len(values) - 1):.1f},{180 - 170 * value:.1f}" for step, value in places)
        dashes = ' stroke-dasharray="4 4"' if "chance" in name else ""
        looks = f'stroke="{COLOURS[number % 2]}"{dashes}'
        drawn.append(f'<polyline points="{path}" fill="none" stroke-width="2" {looks}/>')
        x, y = 24 + 68 * (number // 2), 190 + 9 * (number % 2)
        names.append(
            f'<path d="M{x} {y}h16" stroke-width="2" {looks}/><text x="{x + 20}" y="{y}">{escape(name)}</text>'
        )
    ticks = "".join(f'<text x="4" y="{180 - 170 * part}">{part:g}</text>' for part in (0, 0.5, 1))
    axes = '<path d="M20 10V180H190" fill="none" stroke="currentColor"/>'
    return (
        f'<div class="chart"><svg viewBox="0 0 200 205" role="img" aria-label="{escape(words)}">'
        f"{axes}{''.join(drawn)}{''.join(names)}{ticks}</svg></div>"
    )


def with_unit(value: float, unit: str) -> str:
    """A value in three digits, with its unit."""
    return f"{value:.3g} {escape(unit)}".rstrip()


def largest_values(heat: Heat, most: int = 5) -> str:
    """A table of the greatest values and the pixels in the middle of their squares."""
    order = np.argsort(np.abs(heat.values), axis=None)[::-1][:most]
    rows, columns = np.unravel_index(order, heat.values.shape)
    middle = [((place + 0.5) * heat.stride).astype(int).tolist() for place in (columns, rows)]
    cells = "".join(
        f"<tr><td>{x},{y}</td><td>{with_unit(value, heat.unit)}</td></tr>"
        for x, y, value in zip(*middle, heat.values[rows, columns].tolist(), strict=True)
    )
    return f"<table><tr><th>Pixel x,y</th><th>Greatest</th></tr>{cells}</table>"
