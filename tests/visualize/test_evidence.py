"""Grad-CAM and integrated gradients are what their papers define; without their libraries there is a sentence."""

import sys

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image

import models  # noqa: F401
from runtime.errors import UsageError
from visualize import evidence
from visualize.subject import load_subject

IMAGE = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=["debiformer_nano", "biformer_tiny"])
def model(request):
    torch.manual_seed(0)
    return timm.create_model(request.param, num_classes=5, depths=(1, 1, 1, 1)).eval()


def test_grad_cam_is_the_weighted_sum_of_the_last_map(model):
    pytest.importorskip("pytorch_grad_cam", reason="grad-cam is an extra")
    maps = model.forward_features(IMAGE)
    maps.retain_grad()
    model.forward_head(maps)[0, 3].backward()
    weights = maps.grad.mean((2, 3), keepdim=True)
    by_hand = (weights * maps).sum(1, keepdim=True).relu().detach()
    by_hand = (by_hand - by_hand.min()) / (by_hand.max() - by_hand.min() + 1e-7)
    by_hand = F.interpolate(by_hand, IMAGE.shape[2:], mode="bilinear", align_corners=False)[0, 0]
    found = evidence.grad_cam(model, IMAGE, 3)
    np.testing.assert_allclose(found, by_hand.numpy(), atol=1e-4)


def test_integrated_gradients_are_the_integral_from_grey_to_the_image(model):
    pytest.importorskip("captum", reason="captum is an extra")
    steps = 4
    found, error = evidence.integrated_gradients(model, IMAGE, 2, steps)
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    total = torch.zeros_like(IMAGE)
    for node, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
        image = (IMAGE * float(node)).requires_grad_()
        model(image)[0, 2].backward()
        total += float(weight) * image.grad * IMAGE
    np.testing.assert_allclose(found, total[0].sum(0).numpy(), atol=1e-5)
    with torch.no_grad():
        difference = float(model(IMAGE)[0, 2] - model(torch.zeros_like(IMAGE))[0, 2])
    assert found.sum() - difference == pytest.approx(error, abs=1e-4)


def test_panels_of_the_chosen_class_leave_no_gradients():
    pytest.importorskip("pytorch_grad_cam", reason="grad-cam is an extra")
    pytest.importorskip("captum", reason="captum is an extra")
    subject = load_subject("debiformer_nano")
    view = subject.view(Image.effect_noise((80, 80), 90).convert("RGB"))
    shown = evidence.evidence_panels(subject, view, 7)
    assert [panel.key for panel in shown] == ["grad_cam", "integrated_gradients"]
    assert all(subject.classes[7] in panel.caption for panel in shown)
    assert all(parameter.grad is None for parameter in subject.model.parameters())
    with pytest.raises(UsageError, match="given up after"):
        evidence.evidence_panels(subject, view, 7, seconds=0)


@pytest.mark.parametrize(
    ("missing", "words"), [("pytorch_grad_cam", "needs grad-cam: pip install"), ("captum.attr", "needs captum: pip")]
)
def test_missing_library_is_one_line(monkeypatch, missing, words):
    monkeypatch.setitem(sys.modules, missing, None)
    ask = evidence.grad_cam if "grad" in missing else evidence.integrated_gradients
    with pytest.raises(UsageError, match=words) as caught:
        ask(timm.create_model("debiformer_nano"), IMAGE, 0)
    assert "\n" not in str(caught.value)
