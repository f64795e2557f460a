"""A teacher's features in one byte for each of their principal components."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from runtime.errors import UsageError

BASIS = "features.safetensors"
RANGE = 6.0
"""Deviations of a component within which it is stored; beyond, it is cut off."""
STEPS = 127


@dataclass
class Basis:
    """The principal components of features. components: (d, C) float32, rows of length 1, the largest variance first.

    mean: (C,) float32; steps: (d,) float32, what one step of the stored bytes is of each component.
    """

    mean: Tensor
    components: Tensor
    steps: Tensor

    @property
    def width(self) -> int:
        """Channels of the features."""
        return self.components.shape[1]

    def to_bytes(self, job: str) -> bytes:
        """A safetensors file of it. job: says what it was made for."""
        return save({name: value.contiguous() for name, value in asdict(self).items()}, {"job": job})

    def to(self, device: torch.device) -> "Basis":
        """Move it to a device, as a module moves."""
        self.mean, self.components, self.steps = (part.to(device) for part in (self.mean, self.components, self.steps))
        return self

    def encode(self, features: Tensor) -> Tensor:
        """Features (B, C, H, W) -> their components (B, d, H, W) int8."""
        self.to(features.device)
        scaled = (features.movedim(1, -1).float() - self.mean) @ (self.components / self.steps[:, None]).T
        return scaled.round().clamp(-STEPS, STEPS).to(torch.int8).movedim(-1, 1)

    def decode(self, components: Tensor) -> Tensor:
        """Stored components, or means of them, (B, d, H, W) -> features (B, C, H, W) float32."""
        self.to(components.device)
        with torch.autocast(components.device.type, enabled=False):
            features = components.movedim(1, -1).float() @ (self.components * self.steps[:, None]) + self.mean
        return features.movedim(-1, 1)


def fit(maps: Iterable[Tensor], components: int) -> tuple[Basis, float]:
    """The basis of maps (B, C, H, W), of every place alike, and what share (0..1) of their variance it holds.

    UsageError if they have fewer channels than it is to have components.
    """
    count, total, products = 0, 0.0, 0.0
    for values in maps:
        places = values.movedim(1, -1).flatten(0, 2).cpu().double()
        count, total, products = count + len(places), total + places.sum(0), products + places.T @ places
    mean = total / count
    variances, vectors = torch.linalg.eigh(products / count - torch.outer(mean, mean))
    if components > len(mean):
        raise UsageError(f"--features {components}: the teacher's features have {len(mean)} components")
    variances, vectors = variances.flip(0).clamp(min=0), vectors.flip(1)
    steps = (RANGE / STEPS * variances[:components].sqrt()).clamp(min=1e-12)
    kept = float(variances[:components].sum() / variances.sum().clamp(min=1e-300))
    parts = (part.float() for part in (mean, vectors[:, :components].T, steps))
    return Basis(*parts), kept


def read_basis(folder: Path) -> tuple[Basis, str]:
    """The basis of a folder of maps, and what it was made for. UsageError if it is missing or damaged."""
    path = folder / BASIS
    try:
        with safe_open(path, "pt") as file:
            return Basis(**{name: file.get_tensor(name) for name in file.keys()}), file.metadata()["job"]  # noqa: SIM118
    except (OSError, SafetensorError, TypeError, KeyError) as error:
        raise UsageError(f"{path} is missing or damaged; remove {folder} and make its maps again") from error
