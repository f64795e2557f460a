"""--deterministic: the same bits in every run, or a sentence that names the operation."""

import pytest
import torch
from support import complaint
from timm.models import register_model
from torch import nn

import main
from runtime.checkpoint import LAST

STATES: list[tuple[bool, bool]] = []


class Settings(nn.Module):
    """Notes torch's settings when it runs; broken: uses an operation without a deterministic algorithm."""

    num_classes = 4

    def __init__(self, broken: bool = False) -> None:
        super().__init__()
        self.head, self.broken = nn.Linear(3, 4), broken

    def forward(self, images):
        STATES.append((torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark))
        if self.broken:
            torch.zeros(2).put_(torch.tensor([0]), torch.ones(1))
        return self.head(images.mean((2, 3)))


@register_model
def deterministic_settings(pretrained=False, broken=False, **kwargs):
    return Settings(broken)


def settings():
    return torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark


@pytest.mark.parametrize("deterministic", [True, False])
def test_deterministic_sets_torch_for_the_run_alone(small_options, deterministic):
    STATES.clear()
    options = small_options("--model", "deterministic_settings", "--deterministic", str(deterministic))
    options.model_kwargs, before = {}, settings()
    main.run(options)
    assert set(STATES) == {(deterministic, not deterministic)}
    assert settings() == before


def test_deterministic_names_the_operation_that_is_not(small_options):
    options = small_options("--model", "deterministic_settings", "--deterministic")
    options.model_kwargs, before = {"broken": True}, settings()
    words = complaint(main.run, options)
    assert words.startswith("--deterministic: ")
    assert "put_" in words
    assert settings() == before


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
)
def test_deterministic_runs_end_with_the_same_bits(small_options, device):
    weights = []
    for run in ("one", "two"):
        options = small_options("--deterministic", "--device", device)
        options.output_dir += run
        main.run(options)
        weights.append(torch.load(f"{options.output_dir}/{LAST}", weights_only=True)["model"])
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
