"""The variants are the published ones, in what neither shapes nor golden values of the small ones show."""

import pytest
import timm
import torch

import models
from models.attention import BiLevelRoutingAttention, FullAttention, Router
from models.deformable_attention import DeformableAgentAttention
from models.stl import PartitionAttention, PooledRoutingAttention

DEPTHS = {
    "debiformer_tiny": (1, 1, 4, 1),
    "debiformer_small": (2, 2, 9, 3),
    "debiformer_base": (2, 2, 9, 2),
    "biformer_tiny": (2, 2, 8, 2),
    "biformer_small": (4, 4, 18, 4),
    "biformer_base": (4, 4, 18, 4),
    "biformer_stl": (2, 2, 6, 2),
    "biformer_stl_nchw": (2, 2, 6, 2),
    "maxvit_stl": (2, 2, 6, 2),
}
DROP_PATH_RATES = {"debiformer_small": 0.3, "debiformer_base": 0.4}
OFFSET_GROUPS = {"debiformer_tiny": (1, 2, 4, 8), "debiformer_small": (1, 2, 4, 8), "debiformer_base": (1, 2, 3, 6)}


@pytest.fixture(params=DEPTHS)
def variant(request):
    with torch.device("meta"):
        return request.param, timm.create_model(request.param)


def modules_of(stage, kind):
    return [module for module in stage.modules() if isinstance(module, kind)]


def test_depths_and_default_stochastic_depth(variant):
    name, model = variant
    assert tuple(len(blocks) for blocks in model.stages) == DEPTHS[name]
    assert model.stages[-1][-1].drop_path.drop_prob == pytest.approx(DROP_PATH_RATES.get(name, 0.0))


def test_routing_uses_7_windows_and_the_published_top_k(variant):
    name, model = variant
    if name == "maxvit_stl":
        assert modules_of(model, Router) == []
        return
    for stage, topk in zip(model.stages, (1, 4, 16, None), strict=True):
        attentions = modules_of(stage, (BiLevelRoutingAttention, PooledRoutingAttention))
        assert len(attentions) == (len(stage) if topk else 0)
        assert {attention.router.topk for attention in attentions} == ({topk} if topk else set())
    for stage, topk in zip(model.stages, (4, 8, 16, 49), strict=True):
        attentions = modules_of(stage, DeformableAgentAttention)
        assert {attention.router.topk for attention in attentions} == ({topk} if name.startswith("debi") else set())
    assert {router.n_win for router in modules_of(model, Router)} == {7}


def test_heads_are_32_channels_wide_but_for_plain_attention_with_8_heads(variant):
    _, model = variant
    for stage, info in zip(model.stages, model.feature_info, strict=True):
        kinds = (BiLevelRoutingAttention, DeformableAgentAttention, PooledRoutingAttention, PartitionAttention)
        for module in modules_of(stage, kinds):
            assert info["num_chs"] == 32 * module.num_heads
        for module in modules_of(stage, FullAttention):
            assert module.num_heads == 8


def test_agents_lie_on_the_published_grids(variant):
    name, model = variant
    grids = zip((8, 4, 2, 1), (9, 7, 5, 3), OFFSET_GROUPS.get(name, (None,) * 4), (56, 28, 14, 7), strict=True)
    for stage, (stride, kernel, groups, side) in zip(model.stages, grids, strict=True):
        for module in modules_of(stage, DeformableAgentAttention):
            convolution = module.conv_offset_q[0]
            assert convolution.stride == (stride, stride)
            assert convolution.kernel_size == (kernel, kernel)
            assert module.conv_offset_q.groups == groups
            assert module.lepe1.stride == (stride, stride)
            assert module.rpe_table.shape == (module.num_heads, 2 * side - 1, 2 * side - 1)


@pytest.mark.parametrize("name", ["debiformer_tiny", "biformer_tiny", "biformer_stl", "biformer_stl_nchw"])
def test_norms_use_the_published_epsilons(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    for key, module in model.named_modules():
        if isinstance(module, torch.nn.LayerNorm):
            assert module.eps == (1e-5 if ".conv_offset_q." in key else 1e-6), key
        elif isinstance(module, torch.nn.BatchNorm2d):
            assert module.eps == 1e-5, key


def test_maxvit_has_layer_norms_of_two_epsilons_and_no_other_norm():
    model = timm.create_model("maxvit_stl")
    for key, module in model.named_modules():
        if isinstance(module, torch.nn.LayerNorm):
            assert module.eps == (1e-5 if key.startswith("stages.") else 1e-6), key
    assert modules_of(model, torch.nn.BatchNorm2d) == []


def test_maxvit_takes_turns_between_windows_and_grids():
    for stage in timm.create_model("maxvit_stl").stages:
        assert [(block.attn.size, block.attn.grid) for block in stage] == [(7, False), (7, True)] * (len(stage) // 2)


def test_only_the_pointwise_variant_of_stl_reads_values_for_lepe_and_has_no_linear_layer_but_its_head():
    for name, pointwise in (("biformer_stl", False), ("biformer_stl_nchw", True)):
        model = timm.create_model(name)
        assert {attention.lepe_on_values for attention in modules_of(model, FullAttention)} == {pointwise}
        assert (modules_of(model, torch.nn.Linear) == [model.head]) == pointwise


def test_debiformer_starts_with_narrow_position_tables():
    torch.manual_seed(0)
    for name, parameter in timm.create_model("debiformer_tiny").named_parameters():
        if name.endswith("rpe_table"):
            assert 0.009 < parameter.std() < 0.011, name


@pytest.mark.parametrize("name", ["biformer_tiny", "biformer_stl", "biformer_stl_nchw", "maxvit_stl"])
def test_biformer_starts_with_narrow_linear_layers_without_bias(name):
    torch.manual_seed(0)
    for key, module in timm.create_model(name).named_modules():
        if isinstance(module, torch.nn.Linear) or getattr(module, "kernel_size", None) == (1, 1):
            assert 0.019 < module.weight.std() < 0.021, key
            assert module.bias is None or not module.bias.any(), key


@pytest.mark.parametrize("topk", [0, -1, 5])
def test_top_k_outside_the_number_of_windows_is_refused(topk):
    with pytest.raises(ValueError, match=rf"1\.\.4 \(2x2 windows\), not {topk}"):
        Router(n_win=2, topk=topk, scale=1.0)


@pytest.mark.parametrize("topk", [1, 4])
def test_top_k_may_be_one_or_all_windows(topk):
    logits, idx = Router(n_win=2, topk=topk, scale=1.0)(torch.randn(3, 2, 6, 8), torch.randn(3, 4, 2, 8))
    assert logits.shape == idx.shape == (3, 4, topk)


@pytest.mark.parametrize(("dim", "heads", "groups"), [(64, 2, 3), (64, 2, 4), (66, 4, 4)])
def test_offset_groups_must_divide_the_width_and_the_heads(dim, heads, groups):
    with pytest.raises(ValueError, match=r"do not divide the width|offset groups must divide the width"):
        DeformableAgentAttention(dim, heads, 2, 1, groups, 1, 3, 2, rpe_size=(4, 4))


def test_unknown_top_k_of_a_model_is_refused_too():
    with pytest.raises(ValueError, match="top-k"):
        timm.create_model("debiformer_nano", n_win=1)


def test_published_variants_are_all_covered():
    assert set(models.MODEL_NAMES) == {*DEPTHS, "debiformer_nano"}
