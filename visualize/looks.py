"""The demo page's own HTML: its style, its scripts, and what its parts look like."""

from collections.abc import Mapping, Sequence
from html import escape

from . import svg
from .report import UNTRAINED, UNTRAINED_HINT, Picture, note_html
from .session import Answer
from .subject import Subject

HEAD = '<link rel="icon" href="data:,">'
STYLE = (
    svg.STYLE
    + """
.gradio-container { max-width: 82rem !important; margin: 0 auto; overflow-wrap: anywhere }
.gradio-container .app { padding: 0.5rem 1rem !important }
.gradio-container main { padding: 0 !important }
.gradio-container main > .column, #settings, #answers { gap: 0.6rem }
.gradio-container .html-container { padding: 0 !important }
h1 { font-size: 1.35rem; font-weight: 700; margin: 0; color: var(--body-text-color) }
#facts p { margin: 0 0 0.4rem; color: var(--body-text-color) }
#photo-shared { position: absolute; height: 0; min-height: 0; overflow: hidden }
#bench { display: grid; gap: 0.75rem 1rem;
  grid-template: "picture answers" auto "stages answers" auto "settings answers" 1fr / 22rem minmax(0, 1fr) }
#bench > * { min-width: 0 !important }
#picture { grid-area: picture; cursor: crosshair; border-radius: 0.5rem }
#stages { grid-area: stages } #answers { grid-area: answers } #settings { grid-area: settings }
#picture :focus-visible, #stages button:focus-visible { outline: 3px solid var(--color-accent); outline-offset: 2px }
#stages ol { display: grid; grid-template-columns: repeat(4, minmax(0, 1fr)); gap: 0.4rem; margin: 0; padding: 0;
  list-style: none }
#stages button { width: 100%; padding: 0; border: 2px solid transparent; border-radius: 0.5rem; overflow: hidden;
  text-align: left; color: var(--body-text-color); background: var(--background-fill-secondary) }
#stages button[aria-pressed=true] { border-color: var(--color-accent) }
#stages button b { display: block; padding: 0.1rem 0.3rem 0; font-size: 0.8rem }
#stages .bar { padding: 0 0.3rem 0.2rem; flex-wrap: wrap; justify-content: space-between; gap: 0; font-size: 0.75rem }
#stages .bar i { flex: 0 0 100%; height: 0.3rem; order: -1 }
.panels { display: grid; gap: 0.75rem; grid-template-columns: repeat(4, minmax(0, 1fr)) }
.panels figure { margin: 0; border-radius: 0.5rem; overflow: hidden; background: var(--background-fill-secondary) }
.panels figcaption { padding: 0.3rem 0.6rem; font-size: 0.85rem; color: var(--body-text-color); position: relative }
.panels figcaption b { display: block }
.panels figcaption p { margin: 0.1rem 0; font-size: 0.8rem }
.panels summary { cursor: pointer }
.panels output { position: absolute; right: 0.6rem; font-variant-numeric: tabular-nums }
.panels table, .predictions { border-collapse: collapse; font-variant-numeric: tabular-nums }
.panels th, .panels td { text-align: left; padding-right: 0.6rem; white-space: nowrap }
.alarm { border: 2px solid #c00026; border-radius: 0.5rem; padding: 0.2rem 0.7rem; color: #c00026 }
.dark .alarm { color: #ff8794; border-color: #ff8794 }
.alarm strong { color: inherit; margin-right: 0.5rem }
.predictions { width: 100%; color: var(--body-text-color) }
.predictions td:last-child { text-align: right; white-space: nowrap }
@media (max-width: 60rem) {
  #bench { gap: 0.5rem;
    grid-template: "picture" auto "stages" auto "answers" auto "settings" auto / minmax(0, 1fr) }
  #picture { width: min(100%, 36vh); margin: 0 auto }
  .panels { grid-template-columns: repeat(auto-fill, minmax(min(100%, 10rem), 1fr)); gap: 0.5rem }
}
"""
)

PICTURE_SCRIPT = """
const state = () => element.firstElementChild.dataset
const ask = (x, y) => {
  const { width, height } = state()
  const at = [Math.max(0, Math.min(width - 1, x)), Math.max(0, Math.min(height - 1, y))]
  Object.assign(state(), { x: at[0], y: at[1] })
  const mark = element.querySelector('circle')
  mark.setAttribute('cx', at[0])
  mark.setAttribute('cy', at[1])
  trigger('select', { index: at })
}
element.tabIndex = 0
element.setAttribute('role', 'application')
element.setAttribute('aria-roledescription', 'picture with a movable point')
element.setAttribute('aria-label', 'The picture')
element.addEventListener('click', event => {
  const box = element.querySelector('svg').getBoundingClientRect()
  const along = (place, start, length, pixels) => Math.floor((place - start) / length * pixels)
  const { width, height } = state()
  ask(along(event.clientX, box.left, box.width, width), along(event.clientY, box.top, box.height, height))
})
element.addEventListener('keydown', event => {
  const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }
  if (!(event.key in moves) || event.ctrlKey || event.altKey || event.metaKey) return
  event.preventDefault()
  const { x, y, step } = state(), [right, down] = moves[event.key]
  ask(+x + right * step, +y + down * step)
})
watch('value', () => {
  element.setAttribute('aria-label', state().words)
  history.replaceState(null, '', state().link)
})
"""

STAGES_SCRIPT = """
element.addEventListener('click', event => {
  const button = event.target.closest('button')
  if (button) trigger('select', { stage: +button.dataset.stage })
})
"""

PANELS_SCRIPT = """
const numbers = new WeakMap()
const read = image => {
  if (!numbers.has(image)) {
    const bytes = Uint8Array.from(atob(image.dataset.values), letter => letter.charCodeAt(0))
    numbers.set(image, new Int16Array(bytes.buffer))
  }
  return numbers.get(image)
}
element.addEventListener('pointermove', event => {
  const svg = event.target.closest('svg')
  const image = svg?.querySelector('image')
  const output = svg?.closest('figure').querySelector('output')
  if (!image || !output) return
  const box = svg.getBoundingClientRect(), view = svg.viewBox.baseVal
  const x = Math.floor((event.clientX - box.left) / box.width * view.width)
  const y = Math.floor((event.clientY - box.top) / box.height * view.height)
  const { columns, stride, top, unit } = image.dataset
  const value = read(image)[Math.floor(y / stride) * columns + Math.floor(x / stride)] / 32767 * top
  if (Number.isFinite(value)) output.textContent = `${x},${y}: ${value.toPrecision(3)} ${unit}`
})
element.addEventListener('pointerout', event => {
  for (const output of element.querySelectorAll('output')) output.textContent = ''
})
"""


def picture(found: Answer, link: str) -> str:
    """The picture to click into. link: query of the address of what is shown."""
    query, (height, width) = found.query, found.size
    words = f"The picture; the point is at {query}. Arrow keys move it."
    state = {"words": words, "link": link, "x": query.x, "y": query.y, "width": width, "height": height}
    attributes = " ".join(
        f'data-{name}="{escape(str(value))}"' for name, value in {**state, "step": found.step}.items()
    )
    return f"<div {attributes}>{found.picture.body}</div>"


def stages(pictures: Mapping[int, Picture], chosen: int) -> str:
    """All stages in a row; each is a button that chooses it."""
    buttons = "".join(
        f'<li><button type="button" data-stage="{stage}" aria-pressed="{str(stage == chosen).lower()}">'
        f"{picture.body}<b>Stage {stage}</b>{picture.scale}</button></li>"
        for stage, picture in pictures.items()
    )
    return f"<ol>{buttons}</ol>"


def panels(pictures: Sequence[Picture]) -> str:
    """Panels in a grid, with their words and numbers folded away."""
    return f'<div class="panels">{"".join(map(_panel, pictures))}</div>' if pictures else ""


def _panel(picture: Picture) -> str:
    here = "<output></output>" if picture.numbers else ""
    return (
        f"<figure>{picture.body}<figcaption><b>{escape(picture.title)}</b>{picture.scale}{note_html(picture)}{here}"
        f"<details><summary>What this shows</summary>{escape(picture.caption)}{picture.numbers}</details>"
        "</figcaption></figure>"
    )


def facts(subject: Subject) -> str:
    """Model, weights and size; a warning if nothing was learnt."""
    warning = "" if subject.trained else alarm(UNTRAINED, UNTRAINED_HINT)
    return f"<p>{escape(subject.facts)}</p>{warning}"


def alarm(heading: str, sentence: str) -> str:
    """A sentence that must be seen."""
    strong = f"<strong>{escape(heading)}</strong>" if heading else ""
    return f'<div class="alarm" role="alert">{strong}{escape(sentence)}</div>'
