"""One HTML file that holds words and pictures: needs no network, fits a phone, follows the reader's light or dark."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from . import svg
from .panels import Panel

UNTRAINED = "UNTRAINED WEIGHTS"
UNTRAINED_HINT = "Random numbers, not what the model learns: these pictures show the mechanism only."

STYLE = (
    svg.STYLE
    + """
:root { color-scheme: light dark; --text: #1c1c1c; --soft: #5b5b5b; --page: #fff; --card: #f2f2f2; --alarm: #b3001b }
@media (prefers-color-scheme: dark) {
  :root { --text: #ececec; --soft: #a8a8a8; --page: #151515; --card: #232323; --alarm: #ff6b7a }
}
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 76rem; padding: 1rem; font: 1rem/1.5 system-ui, sans-serif;
  color: var(--text); background: var(--page); overflow-wrap: anywhere }
h1 { font-size: 1.5rem; line-height: 1.2; margin: 0.5rem 0 }
h2 { font-size: 1.2rem; margin: 2rem 0 0.5rem }
.facts { color: var(--soft); margin: 0 0 1rem }
.alarm { border: 3px solid var(--alarm); border-radius: 0.5rem; padding: 0.75rem 1rem; color: var(--alarm) }
.alarm strong { display: block; font-size: 2rem; line-height: 1.2 }
.panels { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 17rem), 1fr)) }
figure { margin: 0; background: var(--card); border-radius: 0.5rem; overflow: hidden; max-width: 32rem }
figure img { display: block; width: 100%; height: auto; image-rendering: auto }
figcaption { padding: 0.6rem 0.8rem 0.8rem }
figcaption b { display: block }
figcaption p { margin: 0 0 0.3rem }
table { border-collapse: collapse }
td { padding: 0.15rem 1rem 0.15rem 0 }
th { text-align: left; font-weight: 600 }
td:last-child, th:last-child { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
figcaption td, figcaption th { font-size: 0.8rem; padding-top: 0; padding-bottom: 0 }
"""
)


@dataclass(frozen=True)
class Picture:
    """body: what is shown, as HTML; scale: its colour bar; numbers: its table of values, of what has them.

    note: a sentence that is never folded away.
    """

    title: str
    caption: str
    body: str
    scale: str = ""
    numbers: str = ""
    note: str = ""


def file_picture(title: str, caption: str, data: bytes, kind: str = "png") -> Picture:
    """A picture from the bytes of a PNG or GIF file."""
    code = base64.b64encode(data).decode()
    return Picture(title, caption, f'<img src="data:image/{kind};base64,{code}" alt="{escape(title)}">')


def panel_picture(panel: Panel, size: tuple[int, int], density: float | None = None, smooth: bool = False) -> Picture:
    """A panel over the page's photo, see `svg.scenes_svg`."""
    if any(heat.signed for heat in panel.heats):
        density = None
    body = svg.scenes_svg(panel.scenes, size, f"{panel.title}. {panel.caption}", density, smooth)
    if not panel.heats:
        return Picture(panel.title, panel.caption, body, note=panel.note)
    strongest = max(panel.heats, key=lambda heat: heat.density)
    numbers = svg.largest_values(panel.heats[0])
    return Picture(panel.title, panel.caption, body, svg.colour_bar(strongest, density), numbers, panel.note)


@dataclass(frozen=True)
class Section:
    title: str
    pictures: Sequence[Picture]


def report_html(
    title: str,
    facts: str,
    predictions: Sequence[tuple[str, float]],
    sections: Sequence[Section],
    trained: bool,
    photo: str = "",
) -> str:
    """The report. facts: one line on model and weights; predictions: class names and probabilities, best first;
    none of what is no classifier. photo: what the panels refer to, see `svg.shared_photo`."""
    rows = prediction_rows(predictions)
    found = f"<h2>Prediction</h2><table>{rows}</table>" if rows else ""
    alarm = "" if trained else f'<p class="alarm"><strong>{UNTRAINED}</strong>{UNTRAINED_HINT}</p>'
    body = "".join(
        f'<h2>{escape(section.title)}</h2><div class="panels">{"".join(map(figure_html, section.pictures))}</div>'
        for section in sections
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{escape(title)}</title><link rel="icon" href="data:,"><style>{STYLE}</style></head><body>{photo}'
        f'<main><h1>{escape(title)}</h1><p class="facts">{escape(facts)}</p>{alarm}'
        f"{found}{body}</main></body></html>\n"
    )


def prediction_rows(predictions: Sequence[tuple[str, float]]) -> str:
    """The rows of a table of class names and probabilities."""
    return "".join(f"<tr><td>{escape(name)}</td><td>{100 * share:.1f} %</td></tr>" for name, share in predictions)


def figure_html(picture: Picture) -> str:
    """A picture with its scale and its words."""
    return (
        f"<figure>{picture.body}<figcaption><b>{escape(picture.title)}</b>{picture.scale}"
        f"{note_html(picture)}{escape(picture.caption)}{picture.numbers}</figcaption></figure>"
    )


def note_html(picture: Picture) -> str:
    """The sentence of a picture that is never folded away, if it has one."""
    return f"<p>{escape(picture.note)}</p>" if picture.note else ""
