"""The dense backbone agrees with its golden values, takes any image size and loads a classifier's weights."""

import pytest
import timm
import torch
from golden.compare import keys_and_shapes, load, relative_error, sample
from golden.fill import fill, images

import models  # noqa: F401
from models.pyramid import FeaturePyramid


@pytest.fixture(scope="module")
def golden():
    return load("debiformer_tiny_dense_nwin8_200x264")


@pytest.fixture(scope="module")
def golden_pyramid(golden):
    return fill(FeaturePyramid(timm.create_model("debiformer_tiny", n_win=int(golden["n_win"]))), seed=10)


def nano_pyramid(**kwargs) -> FeaturePyramid:
    torch.manual_seed(0)
    return FeaturePyramid(timm.create_model("debiformer_nano", **kwargs))


def test_state_dict_has_the_released_keys_and_shapes(golden, golden_pyramid):
    assert keys_and_shapes(golden_pyramid) == sorted(golden["keys"].tolist())


def test_outputs_equal_the_golden_values(golden, golden_pyramid):
    with torch.no_grad():
        outputs = golden_pyramid(images(1, 200, 264, seed=10))
    assert len(outputs) == 4
    for i, out in enumerate(outputs):
        assert list(out.shape) == golden[f"out{i}.shape"].tolist()
        assert relative_error(out.mean((0, 2, 3)), golden[f"out{i}.mean"]) < 1e-9
        assert relative_error(sample(out, 512), golden[f"out{i}.sample"]) < 1e-9


@pytest.mark.parametrize(("height", "width"), [(64, 64), (50, 97), (33, 1)])
@pytest.mark.parametrize("name", ["debiformer_nano", "biformer_tiny"])
def test_maps_have_the_strides_4_8_16_32_at_any_size(name, height, width):
    model = timm.create_model(name)
    outputs = FeaturePyramid(model).eval()(torch.randn(1, 3, height, width))
    for out, info, stride in zip(outputs, model.feature_info, (4, 8, 16, 32), strict=True):
        assert out.shape == (1, info["num_chs"], -(-height // stride), -(-width // stride))


def test_maps_are_normalised_over_channels():
    for out in nano_pyramid().eval()(torch.randn(2, 3, 64, 64)):
        torch.testing.assert_close(out.mean(1), torch.zeros_like(out[:, 0]), atol=1e-5, rtol=0)
        torch.testing.assert_close(out.var(1, correction=0), torch.ones_like(out[:, 0]), atol=1e-2, rtol=0)


def test_stages_are_shared_with_the_classifier_not_copied():
    model = timm.create_model("debiformer_nano")
    pyramid = FeaturePyramid(model)
    shared = {id(p) for p in pyramid.parameters()} & {id(p) for p in model.parameters()}
    left_out = {name for name, p in model.named_parameters() if id(p) not in shared}
    assert left_out == {"norm.weight", "norm.bias", "head.weight", "head.bias"}


def test_classifier_checkpoint_loads_with_the_extra_norms_left_at_their_start():
    classifier = timm.create_model("debiformer_nano")
    pyramid = nano_pyramid(n_win=4)
    missing, unexpected = pyramid.load_state_dict(classifier.state_dict(), strict=False)
    assert {key.split(".")[0] for key in missing} == {"extra_norms"}
    assert {key.split(".")[0] for key in unexpected} == {"norm", "head"}
    for norm in pyramid.extra_norms:
        assert torch.equal(norm.ln.weight, torch.ones_like(norm.ln.weight))
        assert torch.equal(norm.ln.bias, torch.zeros_like(norm.ln.bias))


def test_every_parameter_receives_a_gradient():
    pyramid = nano_pyramid()
    sum(out.square().mean() for out in pyramid(torch.randn(1, 3, 60, 70))).backward()
    assert [name for name, p in pyramid.named_parameters() if p.grad is None] == []


def test_gradient_checkpointing_of_the_wrapped_model_is_kept():
    """The blocks run twice, and the gradients are those of a plain run."""
    plain, recomputing = nano_pyramid().double(), nano_pyramid(grad_checkpointing=True).double()
    calls = []
    recomputing.stages[0][0].register_forward_pre_hook(lambda *_: calls.append(1))
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    for pyramid in (plain, recomputing):
        sum(out.square().mean() for out in pyramid(x)).backward()
    assert len(calls) == 2
    for (name, p), q in zip(plain.named_parameters(), recomputing.parameters(), strict=True):
        assert relative_error(q.grad, p.grad) < 1e-9 or name.endswith("proj_k.bias"), name
