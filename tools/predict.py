"""What a model sees in images: their classes, their objects, or a class per pixel.

python -m tools.predict cat.jpg dog.jpg --model debiformer_tiny --checkpoint tiny.pth
python -m tools.predict street.jpg --checkpoint outputs/mask_rcnn/best.pth --output drawn
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image

import utils
from runtime import distributed
from runtime.errors import UsageError, exit_on_error
from tasks.loading import open_image

from .loading import UNTRAINED, Loaded, load_from, model_parser


def predict(
    loaded: Loaded, paths: Iterable[str], device: torch.device | str = "cpu", most: int = 5
) -> Iterator[tuple[str, list[tuple[str, float]]]]:
    """Per image its path and the `most` classes that a classifier finds likeliest, with their probabilities in 0..1.

    UsageError for a file that is no image, and for a size the model cannot take.
    """
    task = loaded.task_on(device)
    for path in paths:
        yield path, task.likeliest(loaded.model, open_image(path), most)


def names_of(images: Iterable[str]) -> list[str]:
    """Names for what is drawn: the image's own without its suffix, with a number where that is taken."""
    names: list[str] = []
    for image in images:
        stem = Path(image).stem
        names.append(next(name for name in itertools.chain([stem], numbered(stem)) if name not in names))
    return names


def numbered(stem: str) -> Iterator[str]:
    """STEM_2, STEM_3, ..."""
    return (f"{stem}_{number}" for number in itertools.count(2))


def save(picture: Image.Image, path: Path, images: Iterable[str]) -> None:
    """Write what is drawn. UsageError if that cannot be, or one of the images would be overwritten."""
    if path.resolve() in {Path(image).resolve() for image in images}:
        raise UsageError(f"{path} is one of the images; choose another --output")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}; choose another --output") from error


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = model_parser(
        "tools.predict",
        "Print what a model sees in images. Classifiers: the five likeliest classes. Detectors and segmenters (the "
        "checkpoint says which it is): objects, or classes by their share of the pixels, also drawn over the image.",
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files")
    parser.add_argument("--device", default="auto", help="auto (a GPU if there is one), cuda, cuda:N, mps or cpu")
    parser.add_argument(
        "--output", type=Path, default=Path("predictions"), metavar="DIR", help="where drawn images go (predictions)"
    )
    parser.add_argument("--least", type=float, default=0.3, metavar="SCORE", help="leave out objects below it (0.3)")
    args, loaded = load_from(parser, argv, any_task=True)
    if not 0 <= args.least <= 1:
        raise UsageError(f"--least must be from 0 to 1, not {args.least}")
    if not loaded.trained:
        print(UNTRAINED)
    task = loaded.task_on(utils.choose_device(args.device, distributed.DistInfo()))
    for path, name in zip(args.images, names_of(args.images), strict=True):
        prediction = task.predict(loaded.model, open_image(path), args.least)
        print(path)
        for line in prediction.lines:
            print(f"  {line}")
        if prediction.picture is not None:
            drawn = args.output / f"{name}.png"
            save(prediction.picture, drawn, args.images)
            print(f"  drawn: {drawn}")


if __name__ == "__main__":
    exit_on_error("tools.predict", main)
