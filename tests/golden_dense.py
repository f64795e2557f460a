"""Weights and inputs of the reference values of dense heads, drawn from names alone, and how values are compared."""

import zlib
from pathlib import Path

import numpy as np
import torch

FOLDER = Path(__file__).parent / "golden"


def array(name, shape, scale=1.0):
    return scale * np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(shape))


def drawn(key, shape):
    """The reference weight of a published state-dict key."""
    norm = key.endswith("weight") and len(shape) == 1
    return torch.from_numpy((1.0 if norm else 0.0) + array(key, shape, 0.05))


@torch.no_grad()
def fill(module, prefix):
    """Give a module whose keys are the published ones its reference weights, in float64."""
    for key, value in module.double().state_dict().items():
        if key.endswith("running_var"):
            value.fill_(1)
        elif key.endswith(("running_mean", "num_batches_tracked")):
            value.fill_(0)
        else:
            value.copy_(drawn(prefix + key, value.shape))
    return module


class Golden:
    """Reference values of one file; large ones are kept as shape, mean, deviation and 512 samples."""

    def __init__(self, name):
        self.values = np.load(FOLDER / name)

    def __getitem__(self, name):
        return self.values[name]

    def __contains__(self, name):
        return name in self.values

    def expect(self, found, name, tolerance=1e-9):
        found = np.asarray(found.detach() if torch.is_tensor(found) else found)
        if name in self.values:
            wanted = self.values[name]
            np.testing.assert_allclose(found.reshape(wanted.shape), wanted, rtol=tolerance, atol=tolerance)
            return
        assert tuple(self.values[f"{name}.shape"]) == found.shape
        flat = found.flatten()
        sample = flat[np.linspace(0, flat.size - 1, 512).astype(np.int64)]
        np.testing.assert_allclose(sample, self.values[f"{name}.sample"], rtol=tolerance, atol=tolerance)
        if f"{name}.mean_std" in self.values:
            figures = [flat.mean(), flat.std()]
            np.testing.assert_allclose(figures, self.values[f"{name}.mean_std"], rtol=tolerance, atol=tolerance)

    def expect_gradient(self, gradient, name):
        norm, total = self.values[name]
        np.testing.assert_allclose(gradient.norm().item(), norm, rtol=1e-8, atol=1e-12)
        slack = 1e-9 * norm * gradient.numel() ** 0.5 + 1e-12
        np.testing.assert_allclose(gradient.sum().item(), total, rtol=1e-8, atol=slack)
