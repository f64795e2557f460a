"""The demo page as gradio builds it. Asks nothing of any other machine; visualize.app sets the scene and serves it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Any

import gradio as gr
from starlette.middleware import Middleware

import models
from models.weights import WeightsError
from runtime.errors import UsageError

from . import session
from .limits import LARGEST_UPLOAD, MOST_WAITING, UploadLimit, limit_waiting
from .report import UNTRAINED, UNTRAINED_HINT, Picture, figure_html, prediction_rows
from .session import Answer, Choice, Photo
from .storage import Storage
from .subject import DEFAULT_MODEL

MEAN, NO_CHECKPOINT, LAST_BLOCK = "mean of all", "none: untrained weights", "last"
PICTURE_SIDE = 448
STYLE = """
.gradio-container { max-width: 80rem !important; margin: 0 auto }
.panels { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 15rem), 1fr)) }
.panels figure { margin: 0; border-radius: 0.5rem; overflow: hidden; background: var(--background-fill-secondary) }
.panels img { display: block; width: 100%; height: auto }
.panels figcaption { padding: 0.6rem 0.8rem; color: var(--body-text-color) }
.panels figcaption b { display: block }
.alarm { border: 3px solid #d3002a; border-radius: 0.5rem; padding: 0.5rem 1rem; color: #d3002a; margin-bottom: 0.5rem }
.dark .alarm { color: #ff7b8a; border-color: #ff7b8a }
.alarm strong { display: block; font-size: 2rem; line-height: 1.2; color: inherit }
.predictions { width: 100%; border-collapse: collapse; color: var(--body-text-color) }
.predictions td { border: none !important; padding: 0.1rem 0; overflow-wrap: anywhere }
.predictions td:last-child { text-align: right; white-space: nowrap; padding-left: 1rem }
"""


@dataclass(frozen=True)
class Desk:
    """One user's state: the photo, the last choice that worked, and the class evidence asked for."""

    photo: Photo
    choice: Choice
    evidence: tuple[Picture, ...] = ()


class Page:
    """The page's components and what they do. `blocks` is the page.

    storage: where reports are written; model: the one to start with; checkpoints: those on offer. Everything a user
    does goes through `_update`: what it shows is a function of the user's own state, and a mistake becomes a sentence
    above what was there before.
    """

    def __init__(
        self, storage: Storage, model: str = DEFAULT_MODEL, checkpoints: Sequence[str] = (), checkpoint: str = ""
    ) -> None:
        self.storage = storage
        self.start = Choice(model, checkpoint)
        with gr.Blocks(title="What the attention does", analytics_enabled=False) as self.blocks:
            self._lay_out(checkpoints)
            self._connect()
        self.blocks.queue(max_size=MOST_WAITING, api_open=False)
        limit_waiting(self.blocks._queue)

    # -- looks

    def _lay_out(self, checkpoints: Sequence[str]) -> None:
        self.desk = gr.State(None, time_to_live=3600)
        gr.Markdown("# What the attention does\nPick or drop an image, then click a point of the picture.")
        self.message = gr.HTML(elem_id="message", visible=False)
        with gr.Row():
            with gr.Column(scale=1, min_width=320):
                self.picture = gr.Image(
                    label="The picture",
                    show_label=False,
                    type="pil",
                    format="png",
                    interactive=False,
                    buttons=[],
                    elem_id="picture",
                )
                self.point = gr.Textbox(label="Point x,y in pixels", elem_id="point", max_length=20)
                self.facts = gr.HTML(elem_id="facts")
                self.download = gr.DownloadButton("Download the report", elem_id="download")
            with gr.Column(scale=1, min_width=320):
                names = list(session.samples())
                self.sample = gr.Radio(names, value=names[0], label="Photographs", elem_id="sample")
                gr.Markdown("Or an image of yours:")
                self.upload = gr.File(type="filepath", show_label=False, height=140, elem_id="upload")
                self.model = gr.Dropdown(list(models.MODEL_NAMES), value=self.start.model, label="Model")
                self.checkpoint = gr.Dropdown(
                    [NO_CHECKPOINT, *checkpoints], value=self.start.checkpoint or NO_CHECKPOINT, label="Checkpoint"
                )
                self.stage = gr.Radio([1, 2, 3, 4], value=self.start.stage, label="Stage", elem_id="stage")
                with gr.Row():
                    self.block = gr.Dropdown([LAST_BLOCK], value=LAST_BLOCK, label="Block", min_width=120)
                    self.head = gr.Dropdown([MEAN], value=MEAN, label="Head", min_width=120)
                self.ask_evidence = gr.Button("Show class evidence (takes longer)", elem_id="ask-evidence")
        self.panels = gr.HTML(elem_id="panels")
        self.evidence = gr.HTML(elem_id="evidence")

    def _connect(self) -> None:
        settings = [self.model, self.checkpoint, self.stage, self.block, self.head]
        self.shown = [
            *(self.desk, self.message, self.picture, self.point, self.facts, self.download),
            *(self.panels, self.evidence, self.sample, self.upload, *settings),
        ]

        def on(event: Callable[..., Any], function: Callable[..., Any], inputs: Sequence[Any]) -> None:
            event(
                function,
                [self.desk, *inputs],
                self.shown,
                concurrency_limit=1,
                concurrency_id="attention",  # one at a time, so that nobody's request takes another's time
                api_visibility="private",
                show_progress_on=[self.picture],
                trigger_mode="always_last",
            )

        on(self.blocks.load, self.begin, [])
        self.blocks.unload(self.leave)
        on(self.sample.input, self.pick_sample, [self.sample])
        on(self.upload.upload, self.open_file, [self.upload])
        on(self.picture.select, self.click, [])
        on(self.point.submit, self.type_point, [self.point])
        on(self.ask_evidence.click, self.show_evidence, [])
        for component in (self.model, self.checkpoint, self.stage):
            on(component.input, self.choose, settings[:3])
        for component in (self.block, self.head):
            on(component.input, self.refine, settings[3:])

    # -- what users do: each returns updates of `shown`

    def begin(self, desk: Desk | None, request: gr.Request) -> list[Any]:
        """A new visitor sees the first sample."""
        return self._update(desk, request, lambda desk: desk)

    def leave(self, request: gr.Request) -> None:
        self.storage.forget(request.session_hash)

    def pick_sample(self, desk: Desk, name: str, request: gr.Request) -> list[Any]:
        return self._update(desk, request, lambda desk: self._other(desk, photo=session.samples()[name]))

    def open_file(self, desk: Desk, path: str, request: gr.Request) -> list[Any]:
        try:
            return self._update(desk, request, lambda desk: self._other(desk, photo=session.photo_from_file(path)))
        finally:
            self.storage.discard(path)

    def click(self, desk: Desk, event: gr.EventData, request: gr.Request) -> list[Any]:
        data, size = event._data, (PICTURE_SIDE, PICTURE_SIDE)  # gr.SelectData fails without a sentence if parts lack
        return self._update(desk, request, lambda desk: _with(desk, point=session.point_from_click(data, size)))

    def type_point(self, desk: Desk, text: str, request: gr.Request) -> list[Any]:
        def moved(desk: Desk) -> Desk:
            side = session.subject_of(desk.choice).input_size
            return _with(desk, point=session.point_from_text(text, (side, side)))

        return self._update(desk, request, moved)

    def choose(self, desk: Desk, model: str, checkpoint: str, stage: int, request: gr.Request) -> list[Any]:
        """Another model, checkpoint or stage has other blocks and heads: back to the last block and to their mean."""
        file = "" if checkpoint == NO_CHECKPOINT else checkpoint

        def chosen(desk: Desk) -> Desk:
            return self._other(desk, choice=Choice(model, file, stage, point=desk.choice.point))

        return self._update(desk, request, chosen)

    def refine(self, desk: Desk, block: int | str, head: int | str, request: gr.Request) -> list[Any]:
        place = {"block": -1 if block == LAST_BLOCK else block, "head": None if head == MEAN else head}
        return self._update(desk, request, lambda desk: _with(desk, **place))

    def show_evidence(self, desk: Desk, request: gr.Request) -> list[Any]:
        def asked(desk: Desk) -> Desk:
            return replace(desk, evidence=tuple(session.evidence_of(desk.photo, desk.choice)))

        return self._update(desk, request, asked)

    @staticmethod
    def _other(desk: Desk, **changes: Any) -> Desk:
        """A desk whose evidence would be of another picture or model."""
        return replace(desk, evidence=(), **changes)

    # -- what they see

    def _update(self, desk: Desk | None, request: gr.Request, change: Callable[[Desk], Desk]) -> list[Any]:
        """The page for the changed desk; for a mistake, a sentence, and the settings as they were."""
        desk = desk or Desk(next(iter(session.samples().values())), self.start)  # new, or away for long
        try:
            changed = change(desk)
            found = session.answer(changed.photo, changed.choice)
        except (UsageError, WeightsError) as error:
            updates = {
                self.message: gr.update(value=_alarm("", str(error)), visible=True),
                self.upload: None,
                **self._settings(desk.choice),
            }
            return [updates.get(component, gr.skip()) for component in self.shown]
        report = session.report_of(changed.photo, found, list(changed.evidence))
        updates = {
            self.desk: changed,
            self.message: gr.update(value="", visible=False),
            self.picture: found.picture,
            self.point: str(found.query),
            self.facts: _facts(found),
            self.download: str(self.storage.write_report(request.session_hash, report)),
            self.panels: _panels(found.panels),
            self.evidence: _panels(changed.evidence),
            self.sample: changed.photo.name if changed.photo in session.samples().values() else None,
            self.upload: None,
            **self._settings(changed.choice),
            self.block: gr.update(choices=[LAST_BLOCK, *range(found.blocks)], value=_block(changed.choice)),
            self.head: gr.update(choices=[MEAN, *range(found.heads)], value=_head(changed.choice)),
        }
        return [updates[component] for component in self.shown]

    def _settings(self, choice: Choice) -> dict[Any, Any]:
        return {
            self.model: choice.model,
            self.checkpoint: choice.checkpoint or NO_CHECKPOINT,
            self.stage: choice.stage,
            self.block: _block(choice),
            self.head: _head(choice),
        }


def _with(desk: Desk, **changes: Any) -> Desk:
    """The desk with a part of its choice changed."""
    return replace(desk, choice=replace(desk.choice, **changes))


def _block(choice: Choice) -> int | str:
    return LAST_BLOCK if choice.block == -1 else choice.block


def _head(choice: Choice) -> int | str:
    return MEAN if choice.head is None else choice.head


def _alarm(heading: str, sentence: str) -> str:
    strong = f"<strong>{escape(heading)}</strong>" if heading else ""
    return f'<div class="alarm" role="alert">{strong}{escape(sentence)}</div>'


def _facts(found: Answer) -> str:
    rows = prediction_rows(found.predictions)
    alarm = "" if found.subject.trained else _alarm(UNTRAINED, UNTRAINED_HINT)
    return f'{alarm}<p>{escape(found.subject.facts)}</p><table class="predictions">{rows}</table>'


def _panels(pictures: Sequence[Picture]) -> str:
    return f'<div class="panels">{"".join(map(figure_html, pictures))}</div>' if pictures else ""


def serve(page: Page, host: str, port: int | None = None, auth: tuple[str, str] | None = None) -> str:
    """Serve the page from other threads; returns its address.

    port: None takes the first free one from 7860. auth: name and password that visitors are asked for.
    UsageError if the port cannot be had.
    """
    try:
        _, address, _ = page.blocks.launch(
            server_name=host,
            server_port=port,
            auth=auth,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            max_file_size=LARGEST_UPLOAD,
            state_session_capacity=100,
            footer_links=[],
            ssr_mode=False,
            css=STYLE,
            theme=local_theme(),
            app_kwargs={"middleware": [Middleware(UploadLimit, after=page.storage.sweep)]},
        )
    except OSError as error:
        asked = "ports 7860 to 7959" if port is None else f"port {port}"
        raise UsageError(f"cannot serve on {asked} of {host}; choose another --port") from error
    return address


def local_theme() -> gr.themes.Base:
    """A theme of the system's own fonts: Gradio's default asks Google for one."""
    return gr.themes.Base(
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
        primary_hue="cyan",
        neutral_hue="gray",
    )
