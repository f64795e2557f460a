"""ImageNet's other test sets, read from the folders they were published in, for models of its 1000 classes.

real: the validation images with the labels of ReaL (arXiv 2006.07159), several per image; images without any do not
count. v2 (arXiv 1902.10811): folders 0 to 999. a (arXiv 1907.07174), r (arXiv 2006.16241): folders of 200 synsets;
the answer is sought among these alone. sketch (arXiv 1905.13549): folders of all synsets.
"""

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data import ImageNetInfo, RealLabelsImagenet
from torch import Tensor

from runtime.errors import UsageError, listed
from runtime.packed import PackedPaths

from .listing import list_images
from .sources import ImageFiles

TITLES = {
    "real": "ImageNet-ReaL",
    "v2": "ImageNet-V2",
    "a": "ImageNet-A",
    "r": "ImageNet-R",
    "sketch": "ImageNet-Sketch",
}
VALIDATION_IMAGES = 50_000


class EvalSet(ImageFiles):
    """Images with ImageNet's class numbers. class_subset: the numbers among which the answer is sought; None: all."""

    def __init__(
        self, paths: Sequence[str], targets: Sequence[int] | np.ndarray, class_subset: list[int] | None = None
    ) -> None:
        super().__init__(paths, targets, ImageNetInfo().label_names())
        self.class_subset = class_subset


class RealImages(EvalSet):
    """Images with several right classes each: targets (1000,) float32, of equal shares that sum to 1."""

    def __init__(self, samples: list[tuple[str, list[int]]]) -> None:
        super().__init__(PackedPaths(path for path, _ in samples), range(len(samples)))
        self.labels = [labels for _, labels in samples]

    def __getitem__(self, index: int) -> tuple[str, Tensor]:
        labels = self.labels[index]
        target = torch.zeros(len(self.classes))
        target[labels] = 1 / len(labels)
        return self.paths[index], target


def open_eval_set(options: Any) -> EvalSet:
    """The test set that --eval_set and --data_path name. UsageError if it is not there, or is another one."""
    if options.num_classes not in (None, 1000):
        raise UsageError(f"--eval_set {options.eval_set} has ImageNet's 1000 classes: leave out --num_classes")
    folder = Path(options.data_path)
    if not options.data_path or not folder.is_dir():
        raise UsageError(f"--eval_set {options.eval_set} needs its folder: --data_path {options.data_path!r} is none")
    return _real(folder) if options.eval_set == "real" else _folders_of_classes(options.eval_set, folder)


def _real(folder: Path) -> RealImages:
    """The validation images under `folder`, or its val/, in class folders or in one."""
    folder = folder / "val" if (folder / "val").is_dir() else folder
    paths = sorted(folder.rglob("ILSVRC2012_val_*.JPEG"), key=lambda path: path.name)
    if not paths:
        raise UsageError(f"{folder} holds no image named ILSVRC2012_val_….JPEG; the labels of ReaL go by these names")
    # timm's class judges all 50,000 answers in order; of it, only the table of labels is used.
    labels = RealLabelsImagenet([""] * VALIDATION_IMAGES).real_labels
    unknown = [path.name for path in paths if path.name not in labels]
    if unknown:
        raise UsageError(f"{folder}: {listed(unknown)} is none of ImageNet's {VALIDATION_IMAGES} validation images")
    samples = [(str(path), labels[path.name]) for path in paths if labels[path.name]]
    if not samples:
        raise UsageError(f"{folder}: none of its images has a label in ReaL")
    return RealImages(samples)


def _folders_of_classes(name: str, folder: Path) -> EvalSet:
    """FOLDER/SYNSET/* or FOLDER/NUMBER/*."""
    synsets = ImageNetInfo().label_names()
    class_subset = [synsets.index(synset) for synset in _synsets_of(name)] if name in ("a", "r") else None
    known = {synsets[number]: number for number in class_subset or range(len(synsets))}
    known |= {str(number): number for number in known.values()}
    found = sorted(path.name for path in folder.iterdir() if path.is_dir())
    unknown = [entry for entry in found if entry not in known]
    if not found or unknown:
        hint = "it has no class folders" if not found else f"{unknown[0]} is no class of it"
        raise UsageError(f"{folder} is not {TITLES[name]}: {hint}; --data_path is the folder that holds n01498041, …")
    images = EvalSet(*list_images(folder, {entry: known[entry] for entry in found}), class_subset)
    if not len(images):
        raise UsageError(f"{folder}: its class folders hold no images; unpack {TITLES[name]} anew")
    return images


def _synsets_of(name: str) -> list[str]:
    """The synsets of ImageNet-A or -R, from timm's lists."""
    return (resources.files("timm.data") / "_info" / f"imagenet_{name}_synsets.txt").read_text().split()
