"""Watching a model changes nothing about it."""

import pytest
import timm
import torch

import models
from runtime.errors import UsageError
from visualize.capture import capture, check_readable

IMAGE = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return timm.create_model("debiformer_nano", num_classes=10).eval()


def hooks_of(model):
    return [hooks for m in model.modules() for hooks in (m._forward_hooks, m._forward_pre_hooks) if hooks]


def test_capture_leaves_model_and_output_as_they_were(model):
    with torch.no_grad():
        before = model(IMAGE)
    found = capture(model, IMAGE)
    assert torch.equal(found.logits, before[0])
    assert hooks_of(model) == []
    with torch.no_grad():
        assert torch.equal(model(IMAGE), before)


@pytest.mark.parametrize("training", [True, False])
def test_mode_is_kept_and_nothing_is_learnt(model, training):
    model.train(training)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    capture(model, IMAGE)
    assert model.training == training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_hooks_go_when_the_model_fails(model):
    with pytest.raises(RuntimeError):
        capture(model, torch.zeros(1, 5, 64, 64))
    assert hooks_of(model) == []


def test_compiled_model_is_watched_too(model):
    plain = capture(model, IMAGE)
    model.compile(backend="eager")
    found = capture(model, IMAGE)
    assert len(found.layers) == len(plain.layers)
    assert torch.equal(found.logits, plain.logits)


@pytest.mark.parametrize("name", models.MODEL_NAMES)
def test_every_family_shows_its_layers_in_order(name):
    model = timm.create_model(name, depths=(1, 2, 1, 1), img_size=64)
    try:
        check_readable(model, name)
    except UsageError:
        assert "former" not in name
        return
    found = capture(model, IMAGE)
    assert found.depths == {1: 1, 2: 2, 3: 1, 4: 1}
    places = [(layer.stage, layer.block) for layer in found.layers]
    assert places == sorted(places)
    per_block = 2 if name.startswith("debiformer") else 1
    assert [layer.name for layer in found.block(2, -1)] == [layer.name for layer in found.layers][
        2 * per_block : 3 * per_block
    ]


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ((5, 0), "no stage 5.* 1, 2, 3, 4"),
        ((0, 0), "no stage 0"),
        ((3, 2), "no block 2; use 0..1"),
        ((3, -3), "block -3"),
    ],
)
def test_places_that_do_not_exist(model, place, words):
    with pytest.raises(UsageError, match=words):
        capture(model, IMAGE).block(*place)


def test_model_without_routing_is_refused():
    with pytest.raises(UsageError, match="resnet18 has no routing"):
        check_readable(timm.create_model("resnet18"), "resnet18")
