"""Whether a map tells the truth of the model: what happens to a class as what the map points at goes, or comes alone.

Deletion and insertion are those of RISE (arXiv 1806.07421), with the mean colour in place of what is missing.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

STEPS = 8
"""Parts in which the picture goes or comes."""
MASKED = 0.2
"""The share of the picture that a counterfactual does without."""
RANDOM_CELLS = 8
"""Per side, of the random map that others are compared with."""


@dataclass(frozen=True)
class Curves:
    """Probability of a class, (STEPS + 1,) each: as the map's strongest pixels go first, and as they come first.

    random_deletion, random_insertion: the same by a map of random squares.
    """

    deletion: np.ndarray
    insertion: np.ndarray
    random_deletion: np.ndarray
    random_insertion: np.ndarray

    @staticmethod
    def area(curve: np.ndarray) -> float:
        """Of the unit square below a curve."""
        return float(np.trapezoid(curve, dx=1 / (len(curve) - 1)))

    @property
    def words(self) -> str:
        """The areas, beside those of chance."""
        gone, come, by_chance, came = map(
            self.area, (self.deletion, self.insertion, self.random_deletion, self.random_insertion)
        )
        return (
            f"Area below the deletion curve {gone:.2f} (by chance {by_chance:.2f}; lower is better), "
            f"below the insertion curve {come:.2f} (by chance {came:.2f}; higher is better)."
        )


@torch.no_grad()
def probabilities(model: nn.Module, images: Tensor) -> Tensor:
    """(N, 3, height, width) -> (N, classes), one image at a time: memory does not grow with them."""
    return torch.cat([model(image[None]) for image in images]).softmax(-1)


def kept(values: np.ndarray, shares: np.ndarray) -> Tensor:
    """For each share of the pixels, the mask (n, 1, height, width) of those with the greatest values of a map."""
    ranks = np.empty(values.size)
    ranks[np.argsort(-values, axis=None, kind="stable")] = np.arange(values.size) / values.size
    return torch.from_numpy(ranks.reshape(values.shape) < shares[:, None, None])[:, None]


def random_map(size: tuple[int, int]) -> np.ndarray:
    """Random squares, always the same: (height, width)."""
    cells = np.random.default_rng(0).random((RANDOM_CELLS, RANDOM_CELLS))
    rows, columns = (np.arange(side) * RANDOM_CELLS // side for side in size)
    return cells[rows[:, None], columns]


def deletion_and_insertion(model: nn.Module, image: Tensor, number: int, values: np.ndarray) -> list[np.ndarray]:
    """The two curves (STEPS + 1,) of a class for a map (height, width) of an image (1, 3, height, width)."""
    masks = kept(values, np.linspace(0, 1, STEPS + 1))
    return [probabilities(model, image * mask)[:, number].numpy() for mask in (~masks, masks)]


def curves(model: nn.Module, image: Tensor, number: int, maps: list[np.ndarray]) -> list[Curves]:
    """Of every map, beside the same random one. The image is normalised: 0 is the mean colour."""
    chance = deletion_and_insertion(model, image, number, random_map(image.shape[2:]))
    return [Curves(*deletion_and_insertion(model, image, number, values), *chance) for values in maps]


def without(model: nn.Module, image: Tensor, values: np.ndarray) -> Tensor:
    """Probabilities (classes,) without the MASKED strongest pixels of a map."""
    return probabilities(model, image * ~kept(values, np.array([MASKED])))[0]
