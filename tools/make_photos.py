"""Write 150 small photos of three classes to fine-tune on: python -m tools.make_photos --output DIR

They are cut, without overlap, from three photographs that come with libraries: scikit-learn's china.jpg, by
danielbuechele, and flower.jpg, by vultilion (Flickr, both CC BY 2.0), and matplotlib's grace_hopper.jpg, by the U.S.
Navy (public domain). DIR gets train/{flower,portrait,temple}/, and no val/.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.cbook import get_sample_data
from PIL import Image
from sklearn.datasets import load_sample_image

from runtime.errors import OneLineParser

COUNT = 50
"""Photos of each class."""


def photographs() -> dict[str, Image.Image]:
    """Return what the photos are cut from, by the class that they make."""
    with get_sample_data("grace_hopper.jpg") as file:
        portrait = Image.open(file).convert("RGB")
    return {
        "portrait": portrait,
        "flower": Image.fromarray(load_sample_image("flower.jpg")),
        "temple": Image.fromarray(load_sample_image("china.jpg")),
    }


def cut(photograph: Image.Image, count: int) -> list[Image.Image]:
    """Cut a photograph into so many pieces, in five rows."""
    rows, columns = 5, count // 5
    lower, right = (
        np.linspace(0, side, parts + 1).astype(int)
        for side, parts in zip(photograph.size[::-1], (rows, columns), strict=True)
    )
    return [
        photograph.crop((right[column], lower[row], right[column + 1], lower[row + 1]))
        for row in range(rows)
        for column in range(columns)
    ]


def write(root: Path) -> None:
    """Write the photos."""
    for name, photograph in photographs().items():
        folder = root / "train" / name
        folder.mkdir(parents=True, exist_ok=True)
        for number, piece in enumerate(cut(photograph, COUNT)):
            piece.save(folder / f"{number:02d}.png")


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = OneLineParser("python -m tools.make_photos", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    args = parser.parse_args(argv)
    write(args.output)
    print(f"{3 * COUNT} photos in {args.output}")


if __name__ == "__main__":
    main()
