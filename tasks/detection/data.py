"""COCO, or any images with annotations in COCO's format.

    ROOT/train2017/*.jpg    ROOT/annotations/instances_train2017.json
    ROOT/val2017/*.jpg      ROOT/annotations/instances_val2017.json

Folders and files may leave out 2017.
"""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from runtime.errors import UsageError, listed
from runtime.images import MAX_PIXELS, open_rgb

SUFFIXES = ("2017", "")
NEEDED = {
    "images": {"id": int, "file_name": str, "width": int | float, "height": int | float},
    "categories": {"id": int, "name": str | int},
    "annotations": {},
}
"""What a json must say of each of its images and categories; an annotation that lacks something is left out."""
BOXLESS, MASKLESS, STRAY, UNKNOWN = "without a box", "without a mask", "of unknown images", "of unknown categories"
UNREADABLE = frozenset({BOXLESS, MASKLESS, STRAY, UNKNOWN})
"""Problems for which an evaluation, too, leaves objects out."""


def mask_tools() -> Any:
    """faster-coco-eval's module for masks. Raises UsageError where it is not installed."""
    try:
        from faster_coco_eval.core import mask
    except ImportError as error:
        raise UsageError("--task detection needs faster-coco-eval: pip install -r requirements-dense.txt") from error
    return mask


def find_split(root: Path, split: str) -> tuple[Path, Path]:
    """Return the folder of a split's images and the file of its annotations. Raises UsageError if either is missing."""
    for suffix in SUFFIXES:
        images, annotations = root / f"{split}{suffix}", root / "annotations" / f"instances_{split}{suffix}.json"
        if annotations.is_file():
            if not images.is_dir():
                raise UsageError(f"{annotations} is there, but its images' folder {images} is not")
            return images, annotations
    raise UsageError(f"{root}/annotations/instances_{split}2017.json is missing; --data_path must hold it")


class CocoImages(Dataset):
    """Images and their objects.

    A sample has "image" (PIL RGB), "boxes" (N, 4) float32 x1, y1, x2, y2, "labels" (N,) int64 from 1, "masks" (N, H, W)
    uint8 where `masks` is set, "image_id". Objects that cannot be used are left out and counted by `problems`:
    crowds, boxes without an area or outside of the image, masks that cannot be read.
    """

    def __init__(self, images: Path, annotations: Path, masks: bool, max_pixels: int = MAX_PIXELS) -> None:
        self.folder, self.file, self.masks, self.max_pixels = images, annotations, masks, max_pixels
        content = _read(annotations)
        categories = sorted(content["categories"], key=lambda category: category["id"])
        self.classes = [str(category["name"]) for category in categories]
        self.category_ids = [category["id"] for category in categories]
        self.images = sorted(content["images"], key=lambda image: image["id"])
        if not self.images or not categories:
            raise UsageError(f"{annotations} names no {'images' if categories else 'categories'}")
        self._check_files()
        self.problems: dict[int, str] = {}
        self.objects = self._usable_objects(content["annotations"])
        if not self.objects:
            raise UsageError(self.said_of_left_out() or f"{annotations} has no objects")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        info = self.images[index]
        image = open_rgb(self.folder / info["file_name"], self.max_pixels)
        width, height = image.size
        if (width, height) != (info["width"], info["height"]):
            raise UsageError(
                f"{self.name_of(index)} has {width}x{height} pixels, {self.file} says {info['width']}x{info['height']}"
            )
        objects = self.objects.get(info["id"], [])
        sample = {
            "image": image,
            "boxes": torch.tensor([o["box"] for o in objects], dtype=torch.float32).view(-1, 4),
            "labels": torch.tensor([o["label"] for o in objects], dtype=torch.int64),
            "image_id": info["id"],
            "original_size": (height, width),
        }
        if self.masks:
            masks = [self._mask(o["segmentation"], height, width) for o in objects]
            sample["masks"] = torch.from_numpy(np.stack(masks)) if masks else torch.zeros(0, height, width).byte()
        return sample

    @property
    def wide(self) -> torch.Tensor:
        """Which images are wider than high: (N,) bool, by what the annotations say of them."""
        return torch.tensor([image["width"] > image["height"] for image in self.images])

    def name_of(self, index: int) -> str:
        return str(self.folder / self.images[index]["file_name"])

    def said_of_left_out(self) -> str:
        """Say in a line which objects are left out, and why; "" if none are."""
        counts = Counter(self.problems.values())
        parts = ", ".join(f"{count} {problem}" for problem, count in sorted(counts.items()))
        return f"{self.file}: {len(self.problems)} objects are left out: {parts}" if parts else ""

    def truth(self, masks: bool) -> dict[str, Any]:
        """Return the json to judge boxes or masks by: crowds and all, but what cannot be read; numbered anew."""
        content, unreadable = _read(self.file), UNREADABLE if masks else UNREADABLE - {MASKLESS}
        entries = [
            {**entry, "id": number + 1, "iscrowd": int(bool(entry.get("iscrowd")))}
            for number, entry in enumerate(content["annotations"])
            if self.problems.get(number) not in unreadable
        ]
        return {**content, "annotations": entries}

    def _check_files(self) -> None:
        there = set(os.listdir(self.folder))
        missing = [
            image["file_name"]
            for image in self.images
            if image["file_name"] not in there and not (self.folder / image["file_name"]).is_file()
        ]
        if missing:
            raise UsageError(
                f"{len(missing)} of the {len(self.images)} images of {self.file} are not in {self.folder}: "
                f"{listed(missing, 1)}"
            )

    def _usable_objects(self, annotations: list[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
        sizes = {image["id"]: (image["width"], image["height"]) for image in self.images}
        label_of = {number: label for label, number in enumerate(self.category_ids, start=1)}
        objects: dict[int, list[dict[str, Any]]] = {}
        for number, annotation in enumerate(annotations):
            problem, box = _checked(annotation, sizes, label_of, self.masks)
            if problem:
                self.problems[number] = problem
                continue
            entry = {"box": box, "label": label_of[annotation["category_id"]]}
            if self.masks:
                entry["segmentation"] = annotation["segmentation"]
            objects.setdefault(annotation["image_id"], []).append(entry)
        return objects

    def _mask(self, segmentation: Any, height: int, width: int) -> np.ndarray:
        tools = mask_tools()
        if isinstance(segmentation, list):
            polygons = [polygon for polygon in segmentation if len(polygon) >= 6]
            segmentation = tools.merge(tools.frPyObjects(polygons, height, width))
        elif isinstance(segmentation["counts"], list):
            segmentation = tools.frPyObjects(segmentation, height, width)
        return tools.decode(segmentation)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error
    lacking = {"images", "annotations", "categories"} - (content.keys() if isinstance(content, dict) else set())
    if lacking:
        raise UsageError(f"{path} is not in COCO's format: it has no {listed(lacking)}")
    for kind, needed in NEEDED.items():
        if not isinstance(content[kind], list):
            raise UsageError(f"{path} is not in COCO's format: its {kind} are no list")
        for number, entry in enumerate(content[kind]):
            said = entry if isinstance(entry, dict) else {}
            wrong = [name for name, kinds in needed.items() if not isinstance(said.get(name), kinds)]
            if wrong:
                raise UsageError(f"{path} is not in COCO's format: {kind}[{number}] has no usable {listed(wrong)}")
    return content


def _checked(
    annotation: dict[str, Any], sizes: dict[int, tuple[int, int]], label_of: dict[int, int], masks: bool
) -> tuple[str, list[float]]:
    """What is wrong with an annotation ("" if nothing is), and its box (x1, y1, x2, y2), cut to the image."""
    try:
        size, (x, y, w, h) = sizes.get(annotation["image_id"]), map(float, annotation["bbox"])
        known, area = annotation.get("category_id") in label_of, float(annotation.get("area", 1))
    except (KeyError, OverflowError, TypeError, ValueError):
        return BOXLESS, []
    if size is None:
        return STRAY, []
    if not known:
        return UNKNOWN, []
    if masks and not _is_mask(annotation.get("segmentation"), size):
        return MASKLESS, []
    if annotation.get("iscrowd"):
        return "crowds", []
    box = [max(x, 0.0), max(y, 0.0), min(x + w, size[0]), min(y + h, size[1])]
    if not (box[2] - box[0] >= 1 and box[3] - box[1] >= 1 and area > 0):
        return "without an area in the image", []
    return "", box


def _is_mask(segmentation: Any, size: tuple[int, int]) -> bool:
    """Whether polygons or run lengths can be decoded to an image of (width, height)."""
    if isinstance(segmentation, dict):
        counts = segmentation.get("counts")
        if segmentation.get("size") != [size[1], size[0]]:
            return False
        if isinstance(counts, list):
            return all(type(count) is int and count >= 0 for count in counts) and sum(counts) == size[0] * size[1]
        return isinstance(counts, str) and _is_decodable(segmentation)
    if not isinstance(segmentation, list) or not all(isinstance(polygon, list) for polygon in segmentation):
        return False
    numbers = [number for polygon in segmentation for number in polygon]
    return (
        any(len(polygon) >= 6 for polygon in segmentation)
        and all(len(polygon) % 2 == 0 for polygon in segmentation)
        and all(isinstance(number, int | float) and abs(number) < 1e6 for number in numbers)
    )


def _is_decodable(lengths: dict[str, Any]) -> bool:
    """Whether compressed run lengths are those of a mask: only decoding tells."""
    try:
        mask_tools().decode(lengths)
    except (RuntimeError, ValueError):
        return False
    return True
