"""What the demo page computes: pure functions of a photo, a point and choices, with bounded caches and costs.

Nothing here knows of the page, and nothing is kept per user: a user's state is a `Photo` and a `Choice`.
"""

import hashlib
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from runtime.errors import UsageError

from . import evidence, maps, panels, svg
from .capture import Capture
from .images import open_image
from .report import Picture, Section, panel_picture, report_html
from .subject import Subject, load_classifier

PHOTO_SIDE = 1024
"""Pixels kept of a photo's longer side."""
INSIDE = 1 - 1e-6
"""The largest fraction of a side that is still a pixel."""
FARTHEST = 1e6
"""Pixels from a picture's corner: no click is farther."""
MODELS_KEPT, CAPTURES_KEPT = 2, 8
SECONDS, EVIDENCE_SECONDS = 30.0, 120.0
"""After so long a request is given up."""


@dataclass(frozen=True)
class Photo:
    """An RGB image under its name; equal if the pixels are."""

    digest: str
    name: str = field(compare=False)
    image: Image.Image = field(compare=False, repr=False)


@dataclass(frozen=True)
class Choice:
    """What a user has set. point: (x, y) as fractions of the picture, 0..1; checkpoint "": untrained weights.

    common: one colour scale for all maps of the stage; smooth: maps are drawn without the tokens' edges.
    """

    model: str
    checkpoint: str = ""
    stage: int = 3
    block: int = -1
    head: int | None = None
    point: tuple[float, float] = (0.5, 0.5)
    common: bool = False
    smooth: bool = False


@dataclass(frozen=True)
class Answer:
    """What the page shows. photo: what its pictures refer to; stages: a picture of each, by its number.

    query: the point in pixels of `size`; step: pixels from a token of the stage to the next; blocks, heads: how many
    the chosen stage has.
    """

    subject: Subject
    photo: str
    picture: Picture
    stages: dict[int, Picture]
    panels: list[Picture]
    predictions: list[tuple[str, float]]
    query: panels.Query
    size: tuple[int, int]
    step: int
    blocks: int
    heads: int


def photo_from_file(path: str | Path) -> Photo:
    """The image of a file, shrunk if it is large. UsageError as of `open_image`."""
    return photo_of(open_image(path), Path(path).name)


def photo_of(image: Image.Image, name: str) -> Photo:
    """An RGB image as a photo."""
    image = image.copy()
    image.thumbnail((PHOTO_SIDE, PHOTO_SIDE))
    return Photo(hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest(), name, image)


@lru_cache(maxsize=1)
def samples() -> dict[str, Photo]:
    """Two photographs that come with scikit-learn, by name."""
    from sklearn.datasets import load_sample_images

    found = load_sample_images()
    names = [Path(name).stem for name in found.filenames]
    return {name: photo_of(Image.fromarray(pixels), name) for name, pixels in zip(names, found.images, strict=True)}


def subject_of(choice: Choice) -> Subject:
    """The model of a choice, from the cache if it was used lately and its checkpoint is still the same file."""
    path = Path(choice.checkpoint)
    changed = path.stat().st_mtime_ns if choice.checkpoint and path.is_file() else 0
    return _subject(choice.model, choice.checkpoint, changed)


@lru_cache(maxsize=MODELS_KEPT)
def _subject(model: str, checkpoint: str, changed: int) -> Subject:
    return load_classifier(model, checkpoint or None)


@lru_cache(maxsize=CAPTURES_KEPT)
def _shared_photo(subject: Subject, photo: Photo) -> str:
    return svg.shared_photo(subject.sharp(photo.image), (subject.input_size, subject.input_size))


@lru_cache(maxsize=CAPTURES_KEPT)
def _capture(subject: Subject, photo: Photo) -> tuple[Image.Image, Capture]:
    view = subject.view(photo.image)
    return view, subject.capture(view, SECONDS)


def query_of(choice: Choice, size: tuple[int, int]) -> panels.Query:
    """What is asked of a picture of size (height, width)."""
    height, width = size
    x, y = (int(part * side // 1) for part, side in zip(choice.point, (width, height), strict=True))
    return panels.Query(x, y, choice.stage, choice.block, choice.head)


def answer(photo: Photo, choice: Choice) -> Answer:
    """Everything about one point of a photo. UsageError for choices that do not exist, and for what takes too long."""
    subject = subject_of(choice)
    view, capture = _capture(subject, photo)
    picture = np.asarray(view)
    query = query_of(choice, capture.size)
    layers = capture.block(choice.stage, choice.block)
    shown, stages = panels.panels_of(capture, picture, query), panels.stages_at(capture, picture, query)
    density = _common(shown) if choice.common else None
    looks = {"size": capture.size, "smooth": choice.smooth}
    return Answer(
        subject,
        _shared_photo(subject, photo),
        panel_picture(panels.picture_panel(picture, query), **looks),
        {stage: panel_picture(panel, **looks) for stage, panel in stages.items()},
        [panel_picture(panel, density=density, **looks) for panel in shown],
        maps.predictions(capture, subject.classes),
        query,
        capture.size,
        step=layers[-1].stride,
        blocks=capture.depths[choice.stage],
        heads=min(layer.maps.num_heads for layer in layers),
    )


def _common(shown: list[panels.Panel]) -> float:
    """The greatest attention per pixel of all panels."""
    return max(heat.density for panel in shown for heat in panel.heats if not heat.signed)


def evidence_of(photo: Photo, choice: Choice) -> list[Picture]:
    """Pictures of what speaks for the most probable class, and of what the point sees, each map put to the test.

    UsageError without the libraries it takes.
    """
    subject = subject_of(choice)
    view, capture = _capture(subject, photo)
    best = int(capture.logits.argmax())
    shown = panels.panels_of(capture, np.asarray(view), query_of(choice, capture.size))
    seen = [panel for panel in shown if panel.key.startswith(("composed", "token_attention"))][-1]
    shown = [*evidence.evidence_panels(subject, view, best, EVIDENCE_SECONDS), seen]
    trials = evidence.trials(subject, view, best, shown, EVIDENCE_SECONDS)
    drawn = [panel_picture(panel, capture.size) for panel in shown]
    return [picture for both in zip(drawn, trials, strict=True) for picture in both]


def report_of(photo: Photo, found: Answer, evident: list[Picture]) -> str:
    """The answer as a self-contained HTML file."""
    sections = [
        Section(found.query.words, [found.picture, *found.panels]),
        Section("All stages", list(found.stages.values())),
    ]
    if evident:
        sections.append(Section("Class evidence", evident))
    subject = found.subject
    title = f"{photo.name} through {subject.name}"
    return report_html(title, subject.facts, found.predictions, sections, subject.trained, found.photo)


def point_from_text(text: str, size: tuple[int, int]) -> tuple[float, float]:
    """'X,Y' in pixels of a picture (height, width) as fractions. UsageError if it is no point of the picture."""
    try:
        x, y = (int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"expected a point X,Y in whole pixels, not {text!r}") from None
    maps.check_inside(size, x, y)
    return (x + 0.5) / size[1], (y + 0.5) / size[0]


def point_from_click(data: object, size: tuple[int, int]) -> tuple[float, float]:
    """The pixel of a picture (height, width) that a click names by {"index": [x, y]}, as fractions inside of it.

    UsageError if it names none: a browser may send anything.
    """
    match data:
        case {"index": [int() | float() as x, int() | float() as y]} if abs(x) < FARTHEST and abs(y) < FARTHEST:
            x, y = (x + 0.5) / size[1], (y + 0.5) / size[0]
            return min(max(x, 0.0), INSIDE), min(max(y, 0.0), INSIDE)
    raise UsageError("a click needs the two coordinates of a pixel; click into the picture, or write X,Y below it")


def stage_from_click(data: object) -> int:
    """The stage that a click names by {"stage": number}. UsageError if it names none."""
    match data:
        case {"stage": int() as stage}:
            return stage
    raise UsageError("a click needs a stage; choose one of the row above the panels")
