"""Deterministic weights and inputs for the golden values in this folder.

Every tensor of a state_dict is drawn from its own generator, seeded by the CRC-32
of its key, so two implementations that agree on keys and shapes get the same
weights without a checkpoint being shipped. All draws are float64.
"""

import math
import zlib

import numpy as np
import torch


def _rng(name: str, seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64([zlib.crc32(name.encode()), seed]))


def draw(name: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """The float64 value of the state_dict entry `name` of shape `shape`."""
    rng = _rng(name, seed)
    if name.endswith("num_batches_tracked"):
        return np.zeros(shape)
    if name.endswith("running_var"):
        return rng.uniform(0.5, 1.5, shape)
    if name.endswith("running_mean"):
        return 0.1 * rng.standard_normal(shape)
    if name.endswith("rpe_table"):
        return 0.5 * rng.standard_normal(shape)
    if len(shape) <= 1:  # norm scales sit around 1, biases around 0
        centre = 1.0 if name.endswith("weight") or "gamma" in name else 0.0
        return centre + 0.1 * rng.standard_normal(shape)
    fan_in = math.prod(shape[1:])
    gain = 0.3 if "conv_offset_q.3" in name else 1.0  # keep most offsets inside the clamp
    return gain * rng.standard_normal(shape) / math.sqrt(fan_in)


@torch.no_grad()
def fill(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Overwrite every parameter and buffer of `model` in place; returns it in float64, eval mode."""
    model.double()
    for name, tensor in model.state_dict().items():
        tensor.copy_(torch.from_numpy(np.asarray(draw(name, tuple(tensor.shape), seed))))
    return model.eval()


def images(batch: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    """A (batch, 3, height, width) float64 input: smooth structure plus noise."""
    rng = _rng(f"images{height}x{width}", seed)
    y, x = np.mgrid[0:height, 0:width]
    waves = np.stack([np.sin(0.05 * (k + 1) * x + 0.03 * (k + 2) * y) for k in range(3)])
    return torch.from_numpy(waves[None] + 0.5 * rng.standard_normal((batch, 3, height, width)))
