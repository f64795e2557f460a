"""Pictures of what the attention does: python -m visualize IMAGE_OR_FOLDER --output DIR."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from runtime.errors import OneLineParser, UsageError, exit_on_error, listed
from tasks import Prediction

from . import evidence, figures, maps, panels, svg
from .images import image_files, open_image
from .report import UNTRAINED, Picture, Section, file_picture, panel_picture, report_html
from .subject import DEFAULT_MODEL, DenseSubject, Subject, load_subject


def parser() -> OneLineParser:
    """The command line."""
    result = OneLineParser(
        prog="python -m visualize",
        allow_abbrev=False,
        description="Draws, for points of an image, what the attention of a model does there.",
    )
    add = result.add_argument
    add("images", metavar="IMAGE_OR_FOLDER", help="an image file, or a folder of them")
    add("--model", help=f"a debiformer or biformer model (default: the checkpoint's, or else {DEFAULT_MODEL})")
    weights = result.add_mutually_exclusive_group()
    weights.add_argument("--checkpoint", metavar="FILE", help="trained weights, such as a run's best.pth")
    weights.add_argument("--load_release", action="store_true", help="load the weights published for the model")
    add(
        "--query",
        metavar="X,Y",
        nargs="+",
        type=_point,
        help="points, in pixels of the picture that the model sees (default: its centre)",
    )
    add("--grid", metavar="N", type=int, help="N x N points instead")
    add("--stage", type=int, default=3, help="1 to 4 (default: 3)")
    add("--block", type=int, default=-1, help="block of the stage from 0, or from its end (default: -1, the last)")
    add("--head", type=int, help="attention head from 0 (default: the mean over all)")
    add("--evidence", action="store_true", help="also what speaks for the predicted class (needs grad-cam and captum)")
    add("--output", metavar="DIR", required=True, help="where to write: a folder per image")
    return result


def _point(text: str) -> tuple[int, int]:
    x, _, y = text.partition(",")
    try:
        return int(x), int(y)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected X,Y in whole pixels, not {text!r}") from None


def main(argv: Sequence[str] | None = None) -> None:
    """Write the pictures, the animation and the report of every image. UsageError for the user's mistakes."""
    options = parser().parse_args(argv)
    if options.query and options.grid is not None:
        raise UsageError("--query and --grid exclude each other; give one")
    files = image_files(options.images)
    subject = load_subject(options.model, options.checkpoint, options.load_release)
    if not subject.trained:
        print(f"{subject.name} has UNTRAINED WEIGHTS: the pictures show the mechanism, nothing learnt", file=sys.stderr)
    if options.evidence and isinstance(subject, DenseSubject):
        raise UsageError(f"--evidence is for classifiers; {subject.facts}")
    stems = [path.stem for path in files]
    failed: dict[str, UsageError] = {}
    bar = tqdm(files, unit="image", disable=len(files) == 1 or not sys.stderr.isatty())
    for path in bar:
        folder = Path(options.output, path.stem if stems.count(path.stem) == 1 else path.name)
        try:
            image = open_image(path)
        except UsageError as error:  # the other images of a folder are still worth showing
            failed[path.name] = error
            continue
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_all(subject, image, path.name, options, folder)
        except OSError as error:
            raise UsageError(f"cannot write to {folder}: {error.strerror}; choose another --output") from error
        bar.write(f"{folder / 'report.html'}")
    if len(files) == 1 and failed:
        raise next(iter(failed.values()))
    if failed:
        raise UsageError(f"{len(failed)} of {len(files)} files could not be read: {listed(failed.values())}")


def queries_in(view: Image.Image, options: argparse.Namespace) -> list[panels.Query]:
    """What is asked of a picture: a grid of points, those that were given, or its centre."""
    centre = [(view.width // 2, view.height // 2)]
    size = (view.height, view.width)
    points = panels.grid_of_queries(size, options.grid) if options.grid is not None else options.query or centre
    return [panels.Query(x, y, options.stage, options.block, options.head) for x, y in points]


def write_all(subject: Subject, image: Image.Image, name: str, options: argparse.Namespace, folder: Path) -> None:
    """Everything about what the model sees: PNGs, layers.gif (of the first query) and report.html, into the folder."""
    view = subject.view(image)
    picture, queries = np.asarray(view), queries_in(view, options)
    capture = subject.capture(view)
    predictions = maps.predictions(capture, subject.classes)
    seen = "".join(f": “{name}” ({100 * share:.0f} %)" for name, share in predictions[:1])
    untrained = "" if subject.trained else f", {UNTRAINED}"
    sections = (
        [Section("Prediction", [_drawn(subject.seen(view), folder)])] if isinstance(subject, DenseSubject) else []
    )
    for query in queries:
        shown = [panels.picture_panel(picture, query), *panels.panels_of(capture, picture, query)]
        sections.append(Section(query.words, _write_panels(shown, capture.size, folder, f"_{query.x}_{query.y}")))
        overview = panels.overview(shown, f"{subject.name}{untrained}{seen}. {query.words}", capture.size)
        overview.savefig(folder / f"overview_{query.x}_{query.y}.png")
    if options.evidence:
        best = int(capture.logits.argmax())
        shown = evidence.evidence_panels(subject, view, best)
        trials = evidence.trials(subject, view, best, shown)
        sections.append(Section("Class evidence", [*_write_panels(shown, capture.size, folder), *trials]))

    first, *others = panels.layer_frames(capture, picture, queries[0])
    first.save(folder / "layers.gif", save_all=True, append_images=others, duration=700, loop=0)
    caption = f"What the point {queries[0]} sees in each attention layer, from input to output (mean over the heads)."
    animation = file_picture("Through the layers", caption, (folder / "layers.gif").read_bytes(), "gif")
    sections.append(Section("All layers", [animation]))

    (folder / "report.html").write_text(
        report_html(
            f"{name} through {subject.name}",
            subject.facts,
            predictions,
            sections,
            subject.trained,
            svg.shared_photo(subject.sharp(image), capture.size),
        ),
        encoding="utf-8",
    )


def _drawn(prediction: Prediction, folder: Path) -> Picture:
    data = figures.png_bytes(prediction.picture)
    (folder / "prediction.png").write_bytes(data)
    return file_picture("What the model sees", "; ".join(line.strip() for line in prediction.lines[:5]), data)


def _write_panels(shown: list[panels.Panel], size: tuple[int, int], folder: Path, suffix: str = "") -> list[Picture]:
    pictures = []
    for panel in shown:
        figures.render(panel.draw, size).save(folder / f"{panel.key}{suffix}.png")
        pictures.append(panel_picture(panel, size))
    return pictures


if __name__ == "__main__":
    exit_on_error("visualize", main)
