"""Write a small data set for segmentation and detection: python -m tools.make_shapes --output DIR

Rectangles, discs and stars of any colour that hide each other, on textured backgrounds. DIR gets images/{train,val},
annotations/{train,val} (index PNGs; 0 is the background), classes.txt, and COCO's train/, val/ (links to the images)
and annotations/instances_{train,val}.json. The same numbers give the same files.
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from runtime.errors import OneLineParser

SHAPES = ("rectangle", "disc", "star")
LEAST_VISIBLE = 60
"""Pixels that must be seen of an object for it to be annotated."""


def outline(shape: str, center: np.ndarray, radius: float, turn: float) -> np.ndarray:
    """Return a shape's corners (N, 2)."""
    if shape == "rectangle":
        corners = np.array([[-1, -0.6], [1, -0.6], [1, 0.6], [-1, 0.6]])
    else:
        angles = np.linspace(0, 2 * np.pi, 10 if shape == "star" else 40, endpoint=False)
        radii = np.where(np.arange(len(angles)) % 2, 0.4, 1.0) if shape == "star" else 0.85
        corners = np.stack([np.cos(angles), np.sin(angles)], axis=1) * np.broadcast_to(radii, angles.shape)[:, None]
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    return center + radius * corners @ rotation.T


def texture(generator: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Return a background (height, width, 3) of soft blotches and noise, uint8."""
    coarse = generator.integers(60, 196, (6, 6, 3)).astype(np.uint8)
    blotches = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)
    return np.clip(blotches + generator.normal(0, 12, (height, width, 3)), 0, 255).astype(np.uint8)


def scene(generator: np.random.Generator, size: int) -> tuple[Image.Image, np.ndarray, list[tuple[int, np.ndarray]]]:
    """Return an image, its class numbers (H, W), and the visible part of each object as (class from 1, mask (H, W))."""
    height, width = (int(side) for side in generator.integers(size * 3 // 4, size + 1, 2))
    pixels, owner, kinds = texture(generator, height, width), np.zeros((height, width), np.int64), [0]
    for number in range(1, int(generator.integers(2, 6)) + 1):
        kind = int(generator.integers(len(SHAPES)))
        center, radius = generator.uniform(0.1, 0.9, 2) * (width, height), generator.uniform(0.1, 0.26) * size
        canvas = Image.new("1", (width, height))
        corners = outline(SHAPES[kind], center, radius, generator.uniform(0, 2 * np.pi))
        ImageDraw.Draw(canvas).polygon([tuple(corner) for corner in corners.tolist()], fill=1)
        mask = np.asarray(canvas)
        color = generator.integers(0, 256, 3) + generator.normal(0, 8, (int(mask.sum()), 3))
        pixels[mask], owner[mask] = np.clip(color, 0, 255).astype(np.uint8), number
        kinds.append(kind + 1)
    objects = [(kinds[number], owner == number) for number in range(1, len(kinds))]
    objects = [(kind, mask) for kind, mask in objects if mask.sum() >= LEAST_VISIBLE]
    return Image.fromarray(pixels), np.array(kinds)[owner], objects


def annotation(mask: np.ndarray) -> dict[str, Any]:
    """Return the box, area and uncompressed run lengths of a mask (H, W), as COCO writes them."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    x, y = int(columns[0]), int(rows[0])
    flat = np.concatenate([[False], mask.flatten(order="F"), [False]])
    changes = np.flatnonzero(flat[1:] != flat[:-1])
    runs = np.diff(np.concatenate([[0], changes, [mask.size]]))
    return {
        "bbox": [x, y, int(columns[-1]) - x + 1, int(rows[-1]) - y + 1],
        "area": int(mask.sum()),
        "iscrowd": 0,
        "segmentation": {"size": list(mask.shape), "counts": runs.tolist()},
    }


def write_split(root: Path, split: str, count: int, size: int, seed: int) -> None:
    """Write the images and annotations of a split."""
    folders = [root / "images" / split, root / "annotations" / split]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for number in range(count):
        image, labels, objects = scene(np.random.default_rng([seed, number]), size)
        name = f"{number:04d}.png"
        image.save(folders[0] / name)
        Image.fromarray(labels.astype(np.uint8)).save(folders[1] / name)
        images.append({"id": number, "file_name": name, "width": image.width, "height": image.height})
        for kind, mask in objects:
            entry = {"id": len(annotations) + 1, "image_id": number, "category_id": kind, **annotation(mask)}
            annotations.append(entry)
    categories = [{"id": number, "name": name} for number, name in enumerate(SHAPES, start=1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    if not (root / split).exists():
        os.symlink(Path("images") / split, root / split)


def write(root: Path, train: int = 200, val: int = 50, size: int = 160, seed: int = 0) -> None:
    """Write the data set. train, val: images; size: largest side in pixels."""
    for number, (split, count) in enumerate((("train", train), ("val", val))):
        write_split(root, split, count, size, 2 * seed + number)
    (root / "classes.txt").write_text("\n".join(("background", *SHAPES)) + "\n")


def main() -> None:
    parser = OneLineParser("python -m tools.make_shapes", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--train", type=int, default=200, help="images to train on")
    parser.add_argument("--val", type=int, default=50, help="images to evaluate on")
    parser.add_argument("--size", type=int, default=160, help="largest side in pixels")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write(args.output, args.train, args.val, args.size, args.seed)
    print(f"{args.train} + {args.val} images in {args.output}")


if __name__ == "__main__":
    main()
