"""Reading golden files, and describing a model in their terms."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

CLASSIFIERS = {
    "debiformer_tiny": (2, 0),
    "biformer_tiny": (2, 0),
    "biformer_stl": (1, 6),
    "biformer_stl_nchw": (1, 7),
    "maxvit_stl": (1, 8),
}
"""Golden files NAME_224.npz: images in the batch, and the seed of images and weights."""


def load(name: str) -> dict[str, np.ndarray]:
    with np.load(Path(__file__).parent / f"{name}.npz") as file:
        return dict(file)


def relative_error(actual: Tensor | np.ndarray, expected: Tensor | np.ndarray) -> float:
    """The largest difference, as a fraction of the largest expected magnitude."""
    actual, expected = (torch.as_tensor(x).detach().double() for x in (actual, expected))
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    return float((actual - expected).abs().max() / expected.abs().max())


def sample(x: Tensor, count: int) -> Tensor:
    """`count` values of the flattened tensor, evenly spread."""
    return x.flatten()[torch.linspace(0, x.numel() - 1, count).long()]


def keys_and_shapes(model: nn.Module) -> list[str]:
    return sorted(f"{key} {list(value.shape)}" for key, value in model.state_dict().items())
