"""Small scenes to learn, and five steps of training."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import debiformer
import pytest
import torch
from torch import Tensor, nn

assert Path(debiformer.__file__).is_relative_to(sys.prefix), "these tests are of the installed package"
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def scenes() -> SimpleNamespace:
    """Two images with a rectangle of either class on noise.

    images (2, 3, 96, 64), regions (2, 96, 64) of 0 (background), 1 and 2, boxes (2, 2, 4) of both.
    """
    boxes = torch.tensor([[[4, 8, 28, 40], [36, 50, 60, 90]], [[30, 60, 56, 88], [6, 6, 34, 50]]])
    images, regions = 0.1 * torch.randn(2, 3, 96, 64), torch.zeros(2, 96, 64, dtype=torch.int64)
    for image, region, pair in zip(images, regions, boxes.tolist(), strict=True):
        for label, (x1, y1, x2, y2) in enumerate(pair, start=1):
            image[label, y1:y2, x1:x2] += 1
            region[y1:y2, x1:x2] = label
    return SimpleNamespace(images=images, regions=regions, boxes=boxes.float())


def train(model: nn.Module, loss_of: Callable[[], Tensor], rate: float = 1e-3) -> None:
    """Train five steps; the loss has to fall, and the whole backbone to take part. Leaves the model in evaluation."""
    model.train()
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=rate), []
    for _ in range(5):
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        untouched = [name for name, p in model.named_parameters() if "stages" in name and p.grad is None]
        assert untouched == []
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0], losses
    model.eval()
