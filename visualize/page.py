"""The demo page as gradio builds it. Asks nothing of any other machine; visualize.app sets the scene and serves it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import gradio as gr
from starlette.middleware import Middleware

import models
from models.weights import WeightsError
from runtime.errors import UsageError

from . import session
from .limits import LARGEST_UPLOAD, MOST_WAITING, UploadLimit, limit_waiting
from .link import link_to, linked
from .looks import HEAD, PANELS_SCRIPT, PICTURE_SCRIPT, STAGES_SCRIPT, STYLE, alarm, facts, panels, picture, stages
from .report import Picture, prediction_rows
from .session import Choice, Photo
from .storage import Storage
from .subject import DEFAULT_MODEL

MEAN, NO_CHECKPOINT, LAST_BLOCK = "mean", "none: untrained weights", "last"
OWN_SCALE, COMMON_SCALE = "each map its own", "one for all"
EXACT, SMOOTH = "tokens", "smooth"


@dataclass(frozen=True)
class Desk:
    """One user's state: the photo, the last choice that worked, and the class evidence asked for."""

    photo: Photo
    choice: Choice
    evidence: tuple[Picture, ...] = ()

    @property
    def sees(self) -> tuple[Photo, str, str]:
        """What the photo below the pictures depends on."""
        return self.photo, self.choice.model, self.choice.checkpoint


class Page:
    """The page's components and what they do. `blocks` is the page.

    storage: where reports are written; model: the one to start with; checkpoints: those on offer. Everything a user
    does goes through `_update`: what it shows is a function of the user's own state, and a mistake becomes a sentence
    above what was there before.
    """

    def __init__(
        self, storage: Storage, model: str = DEFAULT_MODEL, checkpoints: Sequence[str] = (), checkpoint: str = ""
    ) -> None:
        self.storage, self.checkpoints = storage, checkpoints
        self.start = Choice(model, checkpoint)
        with gr.Blocks(title="What the attention does", analytics_enabled=False) as self.blocks:
            self._lay_out()
            self._connect()
        self.blocks.queue(max_size=MOST_WAITING, api_open=False)
        limit_waiting(self.blocks._queue)

    # -- looks

    def _lay_out(self) -> None:
        self.desk = gr.State(None, time_to_live=3600)
        gr.HTML("<h1>What the attention does</h1>", apply_default_css=False, js_on_load=None)
        self.facts = own_html("facts")
        self.message = own_html("message", visible=False)
        self.photo = own_html("photo-shared")
        with gr.Row(elem_id="bench"):
            self.picture = own_html("picture", PICTURE_SCRIPT)
            self.stages = own_html("stages", STAGES_SCRIPT)
            with gr.Column(elem_id="answers"):
                self.panels = own_html("panels", PANELS_SCRIPT)
                self.ask_evidence = gr.Button("Show class evidence (takes longer)", elem_id="ask-evidence", size="sm")
                self.evidence = own_html("evidence", PANELS_SCRIPT)
            with gr.Column(elem_id="settings"):
                self.predictions = own_html("predictions")
                self._lay_out_settings()

    def _lay_out_settings(self) -> None:
        names = list(session.samples())
        with gr.Row():
            self.point = gr.Textbox(label="Point x,y", elem_id="point", max_length=20, min_width=90)
            self.block = gr.Dropdown([LAST_BLOCK], value=LAST_BLOCK, label="Block", min_width=90)
            self.head = gr.Dropdown([MEAN], value=MEAN, label="Head", min_width=90)
        with gr.Row():
            self.scale = gr.Radio([OWN_SCALE, COMMON_SCALE], value=OWN_SCALE, label="Colour scale", elem_id="scale")
            self.overlay = gr.Radio([EXACT, SMOOTH], value=EXACT, label="Overlay", elem_id="overlay")
        self.sample = gr.Radio(names, value=names[0], label="A photograph, or an image of yours", elem_id="sample")
        self.upload = gr.File(type="filepath", show_label=False, height=120, elem_id="upload")
        self.model = gr.Dropdown(list(models.MODEL_NAMES), value=self.start.model, label="Model")
        self.checkpoint = gr.Dropdown(
            [NO_CHECKPOINT, *self.checkpoints], value=self.start.checkpoint or NO_CHECKPOINT, label="Checkpoint"
        )
        self.download = gr.DownloadButton("Download the report", elem_id="download", size="sm")

    def _connect(self) -> None:
        settings = [self.model, self.checkpoint, self.block, self.head, self.scale, self.overlay]
        self.shown = [
            *(self.desk, self.message, self.photo, self.picture, self.stages, self.point, self.facts),
            *(self.predictions, self.download, self.panels, self.evidence, self.sample, self.upload, *settings),
        ]

        def on(event: Callable[..., Any], function: Callable[..., Any], inputs: Sequence[Any]) -> None:
            event(
                function,
                [self.desk, *inputs],
                self.shown,
                concurrency_limit=1,
                concurrency_id="attention",  # one at a time, so that nobody's request takes another's time
                api_visibility="private",
                show_progress_on=[self.ask_evidence],
                trigger_mode="always_last",
            )

        on(self.blocks.load, self.begin, [])
        self.blocks.unload(self.leave)
        on(self.sample.input, self.pick_sample, [self.sample])
        on(self.upload.upload, self.open_file, [self.upload])
        on(self.picture.select, self.click, [])
        on(self.stages.select, self.pick_stage, [])
        on(self.point.submit, self.type_point, [self.point])
        on(self.ask_evidence.click, self.show_evidence, [])
        for component in (self.model, self.checkpoint):
            on(component.input, self.choose, settings[:2])
        for component in settings[2:]:
            on(component.input, self.refine, settings[2:])

    # -- what users do: each returns updates of `shown`

    def begin(self, desk: Desk | None, request: gr.Request) -> list[Any]:
        """A new visitor sees what the page's address asks for, or the first sample."""

        def asked(desk: Desk) -> Desk:
            photo, choice = linked(request.query_params, self.start, self.checkpoints)
            return replace(desk, photo=photo, choice=choice)

        return self._update(None, request, asked)

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
        return self._move(desk, request, lambda size: session.point_from_click(event._data, size))

    def type_point(self, desk: Desk, text: str, request: gr.Request) -> list[Any]:
        return self._move(desk, request, lambda size: session.point_from_text(text, size))

    def pick_stage(self, desk: Desk, event: gr.EventData, request: gr.Request) -> list[Any]:
        """Another stage has other blocks and heads: back to the last block and to their mean."""

        def picked(desk: Desk) -> Desk:
            return _with(desk, stage=session.stage_from_click(event._data), block=-1, head=None)

        return self._update(desk, request, picked)

    def choose(self, desk: Desk, model: str, checkpoint: str, request: gr.Request) -> list[Any]:
        """Another model has other blocks and heads, too."""
        file = "" if checkpoint == NO_CHECKPOINT else checkpoint

        def chosen(desk: Desk) -> Desk:
            return self._other(desk, choice=replace(desk.choice, model=model, checkpoint=file, block=-1, head=None))

        return self._update(desk, request, chosen)

    def refine(
        self, desk: Desk, block: int | str, head: int | str, scale: str, overlay: str, request: gr.Request
    ) -> list[Any]:
        place = {"block": -1 if block == LAST_BLOCK else block, "head": None if head == MEAN else head}
        looks = {"common": scale == COMMON_SCALE, "smooth": overlay == SMOOTH}
        return self._update(desk, request, lambda desk: _with(desk, **place, **looks))

    def show_evidence(self, desk: Desk, request: gr.Request) -> list[Any]:
        def asked(desk: Desk) -> Desk:
            return replace(desk, evidence=tuple(session.evidence_of(desk.photo, desk.choice)))

        return self._update(desk, request, asked)

    def _move(
        self, desk: Desk, request: gr.Request, point: Callable[[tuple[int, int]], tuple[float, float]]
    ) -> list[Any]:
        def moved(desk: Desk) -> Desk:
            side = session.subject_of(desk.choice).input_size
            return _with(desk, point=point((side, side)))

        return self._update(desk, request, moved)

    @staticmethod
    def _other(desk: Desk, **changes: Any) -> Desk:
        """A desk whose evidence would be of another picture or model."""
        return replace(desk, evidence=(), **changes)

    # -- what they see

    def _update(self, desk: Desk | None, request: gr.Request, change: Callable[[Desk], Desk]) -> list[Any]:
        """The page for the changed desk; for a mistake, a sentence, and the settings as they were."""
        before = desk or Desk(next(iter(session.samples().values())), self.start)  # new, or away for long
        message = gr.update(value="", visible=False)
        try:
            changed = change(before)
            found = session.answer(changed.photo, changed.choice)
        except (UsageError, WeightsError) as error:
            message = gr.update(value=alarm("", str(error)), visible=True)
            if desk:
                updates = {self.message: message, self.upload: None, **self._settings(desk.choice)}
                return [updates.get(component, gr.skip()) for component in self.shown]
            changed, found = before, session.answer(before.photo, before.choice)
        report = session.report_of(changed.photo, found, list(changed.evidence))
        updates = {
            self.desk: changed,
            self.message: message,
            self.photo: gr.skip() if desk and desk.sees == changed.sees else found.photo,
            self.picture: picture(found, link_to(changed.photo, changed.choice)),
            self.stages: stages(found.stages, changed.choice.stage),
            self.point: str(found.query),
            self.facts: facts(found.subject),
            self.predictions: f'<table class="predictions">{prediction_rows(found.predictions)}</table>',
            self.download: str(self.storage.write_report(request.session_hash, report)),
            self.panels: panels(found.panels),
            self.evidence: panels(changed.evidence),
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
            self.block: _block(choice),
            self.head: _head(choice),
            self.scale: COMMON_SCALE if choice.common else OWN_SCALE,
            self.overlay: SMOOTH if choice.smooth else EXACT,
        }


def own_html(name: str, script: str | None = None, visible: bool = True) -> gr.HTML:
    """A part of the page that is styled by `looks` alone. script: what runs once, with the part as `element`."""
    return gr.HTML(elem_id=name, js_on_load=script, visible=visible, apply_default_css=False)


def _with(desk: Desk, **changes: Any) -> Desk:
    """The desk with a part of its choice changed."""
    return replace(desk, choice=replace(desk.choice, **changes))


def _block(choice: Choice) -> int | str:
    return LAST_BLOCK if choice.block == -1 else choice.block


def _head(choice: Choice) -> int | str:
    return MEAN if choice.head is None else choice.head


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
            head=HEAD,
            theme=local_theme(),
            app_kwargs={"middleware": [Middleware(UploadLimit, after=page.storage.sweep)]},
        )
    except OSError as error:
        asked = "ports 7860 to 7959" if port is None else f"port {port}"
        raise UsageError(f"cannot serve on {asked} of {host}; choose another --port") from error
    return address


def local_theme() -> gr.themes.Base:
    """A theme of the system's own fonts, for which Gradio's default asks Google, and of words that can be read."""
    theme = gr.themes.Base(
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
        primary_hue="cyan",
        neutral_hue="gray",
    )
    faint = ("body_text_color_subdued", "block_label_text_color", "block_title_text_color", "block_info_text_color")
    return theme.set(**dict.fromkeys(faint, "*neutral_600"), **{f"{name}_dark": "*neutral_300" for name in faint})
