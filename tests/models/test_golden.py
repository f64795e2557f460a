"""The models agree with golden values of their definition, outputs and gradients, in float64."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import timm
import torch
from golden.compare import CLASSIFIERS, keys_and_shapes, load, relative_error, sample
from golden.fill import fill, images
from torch import Tensor, nn

import models  # noqa: F401

TOLERANCE = 1e-9


def observe(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Run the model forward and backward; return what a golden file holds, under the same names."""
    found = {}

    def watch(module: nn.Module, record: Callable[[Any], dict[str, Tensor]]) -> None:
        module.register_forward_hook(lambda _module, _args, out: found.update(record(out)))

    for i, blocks in enumerate(model.stages):
        watch(blocks[-1], partial(describe_stage, f"stage{i}"))
    for name, module in model.named_modules():
        if name.endswith(".router"):
            watch(module, lambda out, name=name: {f"{name}.weight": out[0].softmax(-1), f"{name}.idx": out[1]})
        elif name.endswith((".attn", ".attn1", ".attn2")):
            watch(module, lambda out, name=name: {f"{name}.out.sample": sample(out, 256)})

    found["logits"] = model(x)
    found["logits"].square().mean().backward()
    for name, parameter in model.named_parameters():
        found[f"grad.{name}"] = torch.stack([parameter.grad.norm(), parameter.grad.sum()])
    return found


def describe_stage(name: str, x: Tensor) -> dict[str, Tensor]:
    return {
        f"{name}.shape": torch.tensor(x.shape),
        f"{name}.mean": x.mean((0, 2, 3)),
        f"{name}.std": x.std((0, 2, 3)),
        f"{name}.sample": sample(x, 256),
    }


class Run:
    """A golden file and the same entries of the model that it describes."""

    def __init__(self, name: str) -> None:
        self.expected = load(f"{name}_224")
        self.keys = self.expected.pop("keys").tolist()
        for entry in [entry for entry in self.expected if entry.endswith(".router.idx")]:
            _, windows, topk = self.expected[entry].shape
            if topk == windows:  # nothing is chosen where every window reads all
                del self.expected[entry], self.expected[entry.replace(".idx", ".weight")]
        batch, seed = CLASSIFIERS[name]
        self.model = fill(timm.create_model(name), seed)
        self.actual = observe(self.model, images(batch, 224, 224, seed))

    def errors(self, *kinds: str) -> dict[str, float]:
        """Relative errors of the golden entries whose name contains one of `kinds`."""
        names = [name for name in self.expected if any(kind in name for kind in kinds)]
        assert names
        return {name: relative_error(self.actual[name], self.expected[name]) for name in names}


@pytest.fixture(scope="module", params=CLASSIFIERS)
def run(request) -> Run:
    return Run(request.param)


with_attention = pytest.mark.parametrize("run", ["debiformer_tiny", "biformer_tiny"], indirect=True)
"""The files that look inside the attention."""


def assert_small(errors: dict[str, float]) -> None:
    assert {name: error for name, error in errors.items() if not error < TOLERANCE} == {}


def test_state_dict_has_the_released_keys_and_shapes(run):
    assert keys_and_shapes(run.model) == sorted(run.keys)


def test_no_golden_entry_is_left_out(run):
    assert set(run.expected) <= set(run.actual)


def test_logits(run):
    assert_small(run.errors("logits"))


def test_stage_outputs(run):
    assert_small(run.errors("stage0", "stage1", "stage2", "stage3"))


@with_attention
def test_attention_outputs(run):
    assert_small(run.errors(".out.sample"))


@with_attention
def test_routing_keeps_the_same_windows_in_the_same_order(run):
    names = [name for name in run.expected if name.endswith(".router.idx")]
    assert names
    for name in names:
        np.testing.assert_array_equal(run.actual[name].numpy(), run.expected[name], err_msg=name)


@with_attention
def test_routing_weights(run):
    assert_small(run.errors(".router.weight"))


def test_gradient_of_every_parameter(run):
    names = [f"grad.{name}" for name, _ in run.model.named_parameters()]
    assert set(names) == {name for name in run.expected if name.startswith("grad.")}

    largest = max(run.expected[name][0] for name in names)
    for name in names:
        (norm, total), (golden_norm, golden_total) = run.actual[name].tolist(), run.expected[name]
        # A constant added to all keys cancels in the softmax: this gradient is rounding noise around zero.
        scale = largest if name.endswith(".proj_k.bias") else golden_norm
        assert abs(norm - golden_norm) < TOLERANCE * scale, name
        assert abs(total - golden_total) < TOLERANCE * largest, name  # a sum may cancel
