"""Maps are tested against the model itself: parts add up to outputs, and curves tell a true map from chance."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

import models  # noqa: F401
from visualize import capture, evidence, proof
from visualize.panels import Panel
from visualize.shapes import Heat, Scene
from visualize.subject import load_subject

IMAGE = torch.randn(1, 3, 72, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["debiformer_nano", "biformer_tiny", "maxvit_stl"])
def test_contributions_and_the_rest_sum_to_the_output_of_every_layer(name):
    torch.manual_seed(0)
    found = capture(timm.create_model(name, depths=(2, 1, 1, 1)), IMAGE)
    for layer in found.layers:
        row, column = layer.maps.tokens[0] - 1, layer.maps.tokens[1] // 2
        parts = layer.maps.contributions(row, column)
        assert parts.shape[0] == layer.maps.num_heads
        total = parts.sum((0, 1, 2)) + layer.maps.rest[row, column]
        torch.testing.assert_close(total, layer.output[row, column], atol=1e-6, rtol=1e-6)
        assert parts.norm() > 0


class LeftHalf(nn.Module):
    """Sure of class 0 the more of the left half it sees."""

    def forward(self, image):
        seen = image[..., : image.shape[-1] // 2].mean((1, 2, 3))
        return torch.stack([8 * seen, torch.full_like(seen, 4.0)], dim=1)


def test_true_map_falls_and_rises_faster_than_chance_and_a_false_one_slower():
    true = np.zeros((16, 16))
    true[:, :8] = 1 + np.random.default_rng(0).random((16, 8))
    of_true, of_false = proof.curves(LeftHalf(), torch.ones(1, 3, 16, 16), 0, [true, -true])
    area = proof.Curves.area
    assert area(of_true.deletion) < area(of_true.random_deletion) < area(of_false.deletion)
    assert area(of_true.insertion) > area(of_true.random_insertion) > area(of_false.insertion)
    np.testing.assert_array_equal(of_true.random_deletion, of_false.random_deletion)
    whole, nothing = (1 / (1 + np.exp(4 - 8 * seen)) for seen in (1, 0))
    for curve in (of_true.deletion, of_true.insertion[::-1]):
        np.testing.assert_allclose(curve[[0, -1]], [whole, nothing], rtol=1e-5)


def test_counterfactual_does_without_the_strongest_fifth():
    left = np.zeros((10, 10))
    left[:, :2] = 1
    assert float(proof.without(LeftHalf(), torch.ones(1, 3, 10, 10), left)[0]) == pytest.approx(1 / (1 + np.exp(-0.8)))


def test_trials_say_what_became_of_the_class():
    subject = load_subject("debiformer_nano")
    view = Image.effect_noise((64, 64), 90).convert("RGB")
    panel = Panel("map", "Map", "", (Scene(heat=Heat(np.eye(8), 8)),), np.asarray(view))
    (shown,) = evidence.trials(subject, view, 7, [panel])
    assert f"“{subject.classes[7]}”" in shown.note
    assert shown.body.count("<polyline") == 4
    assert "by chance" in shown.caption
