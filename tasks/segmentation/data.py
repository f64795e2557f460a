"""ADE20K, or any folder of images and index PNGs.

    ROOT/images/train/*.jpg        ROOT/annotations/train/*.png (the same names; a pixel's value is its class)
    ROOT/images/val/*.jpg          ROOT/annotations/val/*.png
    ROOT/classes.txt               names of the classes, a line each

ADE20K's own names (training, validation, objectInfo150.txt) are found, too.
"""

from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from runtime.errors import UsageError, listed
from runtime.images import MAX_PIXELS, open_rgb

IGNORED = 255
"""The label of pixels that do not count."""

SPLITS = {"train": ("train", "training"), "val": ("val", "validation")}
IMAGES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})


def class_names(root: Path, num_classes: int | None) -> list[str]:
    """Read the names of the classes. Raises UsageError where nothing says how many there are."""
    plain, ade = root / "classes.txt", root / "objectInfo150.txt"
    if plain.is_file():
        names = plain.read_text().splitlines()
    elif ade.is_file():
        names = [line.split("\t")[-1].strip() for line in ade.read_text().splitlines()[1:]]
    elif num_classes:
        names = [f"class {number}" for number in range(num_classes)]
    else:
        raise UsageError(f"{root}: no classes.txt says which classes there are; write one, or pass --num_classes")
    names = [name.strip() for name in names if name.strip()]
    if num_classes and num_classes != len(names):
        raise UsageError(f"--num_classes {num_classes}, but {root} names {len(names)} classes; leave it out")
    return names


class IndexImages(Dataset):
    """Images with a class number per pixel: {"image": PIL RGB, "labels": PIL "L", "name": the file's}.

    reduce_zero: number 0 means "ignored" and the others count from 1, as in ADE20K. Numbers that are no class are
    ignored, too.
    """

    def __init__(
        self, root: Path, split: str, classes: list[str], reduce_zero: bool, max_pixels: int = MAX_PIXELS
    ) -> None:
        self.classes, self.reduce_zero, self.max_pixels = classes, reduce_zero, max_pixels
        folder, annotations = (_folder(root / kind, split) for kind in ("images", "annotations"))
        paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGES)
        if not paths:
            raise UsageError(f"{folder} holds no images")
        self.samples = [(path, annotations / path.relative_to(folder).with_suffix(".png")) for path in paths]
        lacking = [labels for _, labels in self.samples if not labels.is_file()]
        if lacking:
            raise UsageError(f"{len(lacking)} of {len(paths)} images have no annotation: {listed(lacking, 1)}")

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, object]:
        path, annotation = self.samples[index]
        with Image.open(annotation) as image:
            labels = np.array(image)
        if labels.ndim != 2:
            raise UsageError(f"{annotation} is no index PNG: its pixels are colours, not class numbers")
        image = open_rgb(path, self.max_pixels)
        if image.size != labels.shape[::-1]:
            raise UsageError(f"{annotation} has another size than {path}")
        return {"image": image, "labels": Image.fromarray(self._numbered(labels)), "name": path.name}

    def name_of(self, index: int) -> str:
        return str(self.samples[index][0])

    def _numbered(self, labels: np.ndarray) -> np.ndarray:
        labels = labels.astype(np.int64) - int(self.reduce_zero)
        return np.where((labels < 0) | (labels >= len(self.classes)), IGNORED, labels).astype(np.uint8)


def _folder(parent: Path, split: str) -> Path:
    found = next((parent / name for name in SPLITS[split] if (parent / name).is_dir()), None)
    if found is None:
        raise UsageError(f"{parent}/{split} is not a folder; --data_path holds images/ and annotations/ with {split}/")
    return found
