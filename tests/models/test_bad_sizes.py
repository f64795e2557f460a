"""Without padding, an image size that cannot be cut into windows is refused with the sizes that can."""

import re

import pytest
import timm
import torch

import models  # noqa: F401
from models import ops
from models.backbone import check_image_size, first_stage_that_pads, stage_sides

DEBIFORMER = {"n_win": 7, "grid_strides": [(1, 8), (1, 4), (1, 2), (1,)]}
BIFORMER = {"n_win": 7, "grid_strides": [(1,), (1,), (1,), ()]}
MAXVIT = {"n_win": 7, "grid_strides": [(1,)] * 4}
SMALL_WINDOWS = {
    "debiformer_nano": {},
    "biformer_tiny": {"n_win": 2, "topk": (1, 2, 4, None)},
    "biformer_stl": {"n_win": 2, "topk": (1, 2, 4, None), "depths": (1, 1, 1, 1)},
    "maxvit_stl": {"partition_size": 2, "depths": (1, 1, 1, 1)},
}
"""Models with 2x2 windows, for which images of 64 pixels need no padding."""


def strict(name, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, auto_pad=False, **kwargs).eval()


def fits(side, windows):
    return first_stage_that_pads(side, **windows) is None


@pytest.mark.parametrize(
    ("name", "sides"),
    [("biformer_tiny", [1, 4, 31, 32, 33, 224, 225]), ("biformer_stl_nchw", [32, 33, 63, 224, 225, 255])],
)
@torch.no_grad()
def test_stage_sides_are_those_of_the_feature_maps(name, sides):
    model = timm.create_model(name, depths=(1, 1, 1, 1)).eval()
    for side in sides:
        _, maps = model.forward_intermediates(torch.randn(1, 3, side, 64))
        assert stage_sides(side, model.round_up) == tuple(m.shape[2] for m in maps)


def test_seven_windows_take_the_last_four_sizes_up_to_multiples_of_224():
    sizes = [side for side in range(1, 1000) if fits(side, DEBIFORMER)]
    assert sizes == [224 * c - missing for c in (1, 2, 3, 4) for missing in (3, 2, 1, 0)]


def test_biformer_without_windows_in_the_last_stage_takes_multiples_of_112():
    sizes = [side for side in range(1, 500) if fits(side, BIFORMER)]
    assert sizes == [112 * c - missing for c in (1, 2, 3, 4) for missing in (3, 2, 1, 0)]


def test_patches_take_the_first_four_sizes_from_multiples_on():
    for step, windows in ((112, BIFORMER), (224, MAXVIT)):
        sizes = [side for side in range(1, 700) if fits(side, {**windows, "round_up": False})]
        assert sizes == [side for side in range(step, 700) if side % step < 4]


@pytest.mark.parametrize(
    ("name", "windows"),
    [
        ("debiformer_tiny", DEBIFORMER),
        ("biformer_tiny", BIFORMER),
        ("biformer_stl", BIFORMER),
        ("biformer_stl_nchw", {"n_win": 7, "grid_strides": [()] * 4}),
        ("maxvit_stl", MAXVIT),
    ],
)
def test_models_declare_the_grids_they_cut(name, windows):
    model = timm.create_model(name)
    assert model.n_win == windows["n_win"]
    assert list(model.grid_strides) == windows["grid_strides"]


@torch.no_grad()
@pytest.mark.parametrize("name", SMALL_WINDOWS)
def test_size_is_refused_exactly_when_the_attention_would_pad(name, monkeypatch):
    model = strict(name, **SMALL_WINDOWS[name])
    padded = []
    pad = ops.pad_to_multiple

    def spy(x, multiple):
        out = pad(x, multiple)
        padded.append(out.shape != x.shape)
        return out

    monkeypatch.setattr(ops, "pad_to_multiple", spy)
    refused = set()
    for side in range(1 if model.round_up else 32, 68):
        x = torch.randn(1, 3, 64, side)
        padded.clear()
        model.auto_pad = True
        model(x)
        model.auto_pad = False
        if any(padded):
            refused.add(side)
            with pytest.raises(ValueError, match=f"64x{side}"):
                model(x)
        else:
            assert model(x).shape == (1, 1000)
    assert refused
    assert 64 not in refused


@pytest.mark.parametrize(
    ("height", "width", "stage", "axis", "nearest"),
    [
        (200, 224, 1, "height", "221"),
        (224, 300, 1, "width", "224 or 445"),
        (256, 256, 1, "height", "224 or 445"),
        (225, 100, 1, "height", "224 or 445"),
        (112, 224, 1, "height", "221"),
        (448, 336, 1, "width", "224 or 445"),
    ],
)
def test_error_names_the_size_the_stage_and_the_nearest_sizes(height, width, stage, axis, nearest):
    with pytest.raises(
        ValueError,
        match=f"^image size {height}x{width}: stage {stage} cannot .* {axis} .* 7 windows; "
        f"use a {axis} of {nearest} pixels, or auto_pad=True$",
    ):
        check_image_size(torch.empty(1, 3, height, width, device="meta"), **DEBIFORMER)


@pytest.mark.parametrize(("side", "stage"), [(28, 2), (56, 3), (112, 4), (27, 2), (111, 4)])
def test_error_names_the_first_stage_that_fails(side, stage):
    plain_windows = {"n_win": 7, "grid_strides": [(1,)] * 4}
    assert first_stage_that_pads(side, **plain_windows) == stage
    with pytest.raises(ValueError, match=f"stage {stage} "):
        check_image_size(torch.empty(1, 3, 224, side, device="meta"), **plain_windows)


@torch.no_grad()
@pytest.mark.parametrize("method", ["__call__", "forward_features", "forward_intermediates"])
@pytest.mark.parametrize("size", [(70, 64), (64, 140), (40, 40)])
@pytest.mark.parametrize("name", ["debiformer_nano", "maxvit_stl"])
def test_proposed_sizes_work_and_none_lies_between(name, size, method):
    model = strict(name, **SMALL_WINDOWS[name])
    run = getattr(model, method)
    with pytest.raises(ValueError, match="image size") as caught:
        run(torch.randn(1, 3, *size))
    axis, proposed = re.search(r"use a (height|width) of ([\d or]+) pixels", str(caught.value)).groups()
    proposed = [int(side) for side in proposed.split(" or ")]

    index = ("height", "width").index(axis)
    other = 64  # a side that fits, for the axis not in question
    for side in proposed:
        assert run(torch.randn(1, 3, *((side, other) if index == 0 else (other, side)))) is not None
    windows = {"n_win": model.n_win, "grid_strides": model.grid_strides, "round_up": model.round_up}
    closest = [side for side in range(1, 400) if fits(side, windows)]
    below, above = [s for s in closest if s < size[index]], [s for s in closest if s > size[index]]
    assert proposed == [*below[-1:], above[0]]


@torch.no_grad()
@pytest.mark.parametrize("size", [(224, 221), (222, 223)])
@pytest.mark.parametrize("name", ["debiformer_tiny", "biformer_tiny"])
def test_classifiers_take_221_to_224_pixels(name, size):
    assert strict(name)(torch.randn(1, 3, *size)).isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (5, 64), (33, 97)])
@pytest.mark.parametrize("name", ["debiformer_nano", "debiformer_tiny", "biformer_tiny"])
def test_with_padding_every_size_works(name, size):
    torch.manual_seed(0)
    assert timm.create_model(name).eval()(torch.randn(2, 3, *size)).isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("size", [(32, 32), (33, 97), (90, 63)])
@pytest.mark.parametrize("name", ["biformer_stl", "biformer_stl_nchw", "maxvit_stl"])
def test_patches_and_padding_take_every_size_from_32_pixels(name, size):
    torch.manual_seed(0)
    model = timm.create_model(name, depths=(1, 1, 1, 1)).eval()
    assert model(torch.randn(2, 3, *size)).isfinite().all()


@pytest.mark.parametrize("size", [(31, 64), (64, 16), (1, 1)])
@pytest.mark.parametrize("auto_pad", [True, False])
@pytest.mark.parametrize("name", ["biformer_stl", "biformer_stl_nchw", "maxvit_stl"])
def test_images_smaller_than_a_token_of_the_last_stage_are_refused(name, auto_pad, size):
    with torch.device("meta"):
        model = timm.create_model(name, auto_pad=auto_pad)
        with pytest.raises(ValueError, match=f"^image size {size[0]}x{size[1]}: this model needs at least 32 pixels"):
            model(torch.empty(1, 3, *size))


def test_without_later_stages_smaller_images_do():
    model = timm.create_model("biformer_stl_nchw", features_only=True, out_indices=(0, 1)).eval()
    assert [tuple(m.shape[2:]) for m in model(torch.randn(1, 3, 8, 12))] == [(2, 3), (1, 1)]
    with pytest.raises(ValueError, match="at least 8 pixels"):
        model(torch.randn(1, 3, 7, 12))
