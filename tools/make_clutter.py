"""Write a small data set for classification: python -m tools.make_clutter --output DIR

One of ten forms of any colour, nearly upright, of many sizes and at any place, on a textured background, among scraps
that hide a part of it. DIR gets train/CLASS/ and val/CLASS/. The form alone tells the class. The same numbers give the
same files.
"""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from runtime.errors import OneLineParser

from .make_shapes import texture

FORMS = ("arrow", "crescent", "cross", "disc", "hexagon", "ring", "sector", "square", "star", "triangle")
SCRAPS = (4, 8)
"""How many scraps there are: at least, at most."""


def around(radii: np.ndarray, turns: float = 1.0) -> np.ndarray:
    """Corners (N, 2) at these radii, all round or a part of a turn."""
    angles = 2 * np.pi * turns * np.arange(len(radii)) / len(radii)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1) * radii[:, None]


def outlines(form: str) -> list[np.ndarray]:
    """A form's outline in a circle of radius 1, and what is cut out of it: corners (N, 2) each."""
    ones = np.ones
    if form == "arrow":
        head, tail = [(1, 0), (0, 0.9), (0, 0.35)], [(-1, 0.35), (-1, -0.35), (0, -0.35), (0, -0.9)]
        return [np.array(head + tail, float)]
    if form == "crescent":
        return [around(ones(40)), np.array([[0.5, 0.0]]) + around(0.85 * ones(40))]
    if form == "cross":
        arm = np.array([(1, -0.33), (1, 0.33), (0.33, 0.33)])
        return [np.concatenate([arm @ turned(quarter / 4).T for quarter in range(4)])]
    if form == "sector":
        return [np.concatenate([around(ones(30), 0.6), [(0.0, 0.0)]])]
    if form == "star":
        return [around(np.tile([1.0, 0.42], 5))]
    if form == "ring":
        return [around(ones(40)), around(0.55 * ones(40))]
    return [around(ones({"disc": 40, "hexagon": 6, "square": 4, "triangle": 3}[form]))]


def turned(part: float) -> np.ndarray:
    """The matrix of a part of a turn."""
    cos, sin = np.cos(2 * np.pi * part), np.sin(2 * np.pi * part)
    return np.array([[cos, -sin], [sin, cos]])


def paint(pixels: np.ndarray, mask: np.ndarray, generator: np.random.Generator) -> None:
    """Fill a mask (H, W) of pixels (H, W, 3) with some colour and noise."""
    color = generator.integers(0, 256, 3) + generator.normal(0, 10, (int(mask.sum()), 3))
    pixels[mask] = np.clip(color, 0, 255).astype(np.uint8)


def filled(size: int, shapes: list[np.ndarray]) -> np.ndarray:
    """The pixels (size, size) inside the first shape and outside the others."""
    canvas = Image.new("1", (size, size))
    for number, corners in enumerate(shapes):
        ImageDraw.Draw(canvas).polygon([tuple(corner) for corner in corners.tolist()], fill=int(number == 0))
    return np.array(canvas)


def picture(form: str, generator: np.random.Generator, size: int) -> Image.Image:
    """An image with a form in it."""
    pixels = texture(generator, size, size) // 2 + 64
    radius, part = generator.uniform(0.24, 0.38) * size, turned(generator.uniform(-0.05, 0.05))
    center = generator.uniform(radius, size - radius, 2)
    count = int(generator.integers(SCRAPS[0], SCRAPS[1] + 1))
    for number in range(count):
        if number == count * 2 // 3:  # the other scraps lie on it
            paint(pixels, filled(size, [center + radius * corners @ part.T for corners in outlines(form)]), generator)
        middle, width = generator.uniform(0, size, 2), generator.uniform(0.02, 0.1, 2) * size
        corners = around(generator.uniform(0.3, 1.0, int(generator.integers(3, 8)))) * width * (1.6, 0.8)
        paint(pixels, filled(size, [middle + corners @ turned(generator.uniform()).T]), generator)
    return Image.fromarray(pixels)


def write(root: Path, train: int = 1500, val: int = 500, size: int = 80, seed: int = 0) -> None:
    """Write the data set. train, val: images, of all classes in turn; size: side in pixels."""
    for place, (split, count) in enumerate((("train", train), ("val", val))):
        for number in range(count):
            form = FORMS[number % len(FORMS)]
            folder = root / split / form
            folder.mkdir(parents=True, exist_ok=True)
            generator = np.random.default_rng([2 * seed + place, number])
            picture(form, generator, size).save(folder / f"{number:05d}.png")


def main() -> None:
    parser = OneLineParser("python -m tools.make_clutter", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--train", type=int, default=1500, help="images to train on")
    parser.add_argument("--val", type=int, default=500, help="images to evaluate on")
    parser.add_argument("--size", type=int, default=80, help="side in pixels")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write(args.output, args.train, args.val, args.size, args.seed)
    print(f"{args.train} + {args.val} images of {len(FORMS)} classes in {args.output}")


if __name__ == "__main__":
    main()
