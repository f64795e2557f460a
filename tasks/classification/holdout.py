"""Images of train/ that are kept from training and evaluated on, where there is no val/."""

import hashlib
import os
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from runtime.errors import UsageError


class Part(Dataset):
    """Some images of a source, with all of its classes.

    held_out: the names of the source's images that are not for training, whichever part this is.
    """

    def __init__(self, source: Dataset, indices: np.ndarray, held_out: list[str]) -> None:
        self.source, self.indices, self.held_out = source, indices, held_out
        self.classes, self.targets = source.classes, np.asarray(source.targets)[indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.source[int(self.indices[index])]

    def name_of(self, index: int) -> str:
        """Say which image a number is, for messages."""
        return self.source.name_of(int(self.indices[index]))


def hold_out(
    source: Dataset, names: Sequence[str], fraction: float, before: Collection[str], place: str
) -> tuple[Part, Part]:
    """Divide a source into a part to train on and one to evaluate on.

    Of each class, `fraction` of the images is held out, one at least, and one at least is left. Which ones is decided
    by a hash of their names alone: it is the same on every machine, with any seed and number of processes.

    Args:
        names: of the images, wherever the data lies.
        fraction: 0..1; no number of images comes of it where `before` says which.
        before: the names held out by the training whose weights are used; images that are new since are for training.
        place: where the images are, for messages.

    Raises:
        UsageError: an image of `before` is gone, or no class has two images.
    """
    targets = np.asarray(source.targets)
    chosen = _as_before(names, before, place) if before else _by_class(names, targets, fraction)
    if not chosen.any():
        raise UsageError(f"{place} has no class with two images, of which one could be held out; add a val/ folder")
    held_out = [names[index] for index in np.flatnonzero(chosen)]
    return Part(source, np.flatnonzero(~chosen), held_out), Part(source, np.flatnonzero(chosen), held_out)


def _by_class(names: Sequence[str], targets: np.ndarray, fraction: float) -> np.ndarray:
    chosen = np.zeros(len(targets), bool)
    for target in np.unique(targets):
        members = np.flatnonzero(targets == target)
        order = sorted(members, key=lambda index: hashlib.blake2b(os.fsencode(names[index])).digest())
        count = min(max(round(fraction * len(members)), 1), len(members) - 1)
        chosen[order[:count]] = True
    return chosen


def _as_before(names: Sequence[str], before: Collection[str], place: str) -> np.ndarray:
    wanted = set(before)
    chosen = np.array([name in wanted for name in names], bool)
    if chosen.sum() < len(wanted):
        gone = sorted(wanted - {names[index] for index in np.flatnonzero(chosen)})
        raise UsageError(
            f"{len(gone)} of the images that were held out for evaluation are not in {place}, {gone[0]} among them; "
            "put them back, or add a val/ folder"
        )
    return chosen
