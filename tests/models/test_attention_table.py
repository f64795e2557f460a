"""Models with another attention than the published one."""

import pytest
import timm
import torch
from golden.fill import fill
from torch import nn

import models
from models.arguments import check_arguments
from models.attention import BiLevelRoutingAttention, FullAttention
from models.attention_table import ATTENTIONS, build_attention, register_attention
from models.deformable_attention import DeformableAgentAttention


class Still(nn.Module):
    """Remembers what it was built with."""

    def __init__(self, dim, num_heads, n_win=None, topk=None, agent_stride=None):
        super().__init__()
        self.built_with = (dim, num_heads, n_win, topk, agent_stride)
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return x * self.weight


def attentions_of(model):
    found = {}
    for name, module in model.named_modules():
        if name.endswith(("attn", "attn1", "attn2")):
            found[name.removeprefix("stages.").replace(".blocks", "")] = module
    return found


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("debiformer_nano", Still),
        ("debiformer_nano", "full"),
        ("debiformer_nano", "deformable_agent"),
        ("debiformer_nano", "bi_level_routing"),
        ("debiformer_nano", "pooled_routing"),
        ("biformer_tiny", Still),
        ("biformer_tiny", "full"),
        ("biformer_stl", lambda dim, num_heads: Still(dim, num_heads)),
        ("biformer_stl_nchw", "full"),
    ],
)
def test_attn_layer_replaces_every_attention(name, layer):
    model = timm.create_model(name, num_classes=3, depths=(1, 1, 1, 1), attn_layer=layer)
    kind = ATTENTIONS[layer] if isinstance(layer, str) else Still
    found = attentions_of(model)
    assert len(found) == (8 if name.startswith("debi") else 4)
    assert all(type(module) is kind for module in found.values())
    model(torch.randn(1, 3, 64, 64)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_attn_layer_chooses_per_stage_and_position():
    layers = {"attn_layer": ["full", None, None, None], "attn2_layer": (None, Still, None, "full")}
    model = timm.create_model("debiformer_nano", depths=(1, 1, 1, 1), **layers)
    kinds = {name: type(module) for name, module in attentions_of(model).items()}
    assert kinds == {
        "0.0.attn1": FullAttention,
        "0.0.attn2": FullAttention,
        "1.0.attn1": BiLevelRoutingAttention,
        "1.0.attn2": Still,
        "2.0.attn1": BiLevelRoutingAttention,
        "2.0.attn2": DeformableAgentAttention,
        "3.0.attn1": DeformableAgentAttention,
        "3.0.attn2": FullAttention,
    }


def test_attention_is_given_the_settings_that_it_names():
    model = timm.create_model("debiformer_nano", depths=(1, 1, 1, 1), attn_layer=Still)
    built = {name: module.built_with for name, module in attentions_of(model).items()}
    assert built["0.0.attn1"] == (32, 1, 2, 1, 8)
    assert built["0.0.attn2"] == (32, 1, 2, 2, 8)
    assert built["3.0.attn1"] == built["3.0.attn2"] == (128, 4, 2, 4, 1)
    assert build_attention(lambda dim, num_heads, **rest: (dim, rest), 8, 2, topk=None, n_win=7) == (8, {"n_win": 7})


@pytest.mark.parametrize("name", [name for name in models.MODEL_NAMES if name != "maxvit_stl"])
def test_naming_the_published_attention_changes_nothing(name):
    small = {"depths": (1, 1, 1, 1)}
    routing = "pooled_routing" if name.endswith("nchw") else "bi_level_routing"
    if name.startswith("debi"):
        chosen = {"attn1_layer": [routing] * 3 + ["deformable_agent"], "attn2_layer": "deformable_agent"}
    else:
        chosen = {"attn_layer": [routing] * 3 + ["full"]}
    published, named = (fill(timm.create_model(name, **small, **each)).eval() for each in ({}, chosen))
    x = torch.randn(1, 3, 64, 64, dtype=next(named.parameters()).dtype)
    assert torch.equal(published(x), named(x))
    assert published.state_dict().keys() == named.state_dict().keys()
    assert [set(strides) for strides in published.grid_strides] == [set(strides) for strides in named.grid_strides]


def test_image_sizes_are_refused_only_for_attention_that_cuts_windows():
    x = torch.randn(1, 3, 56, 56)
    with pytest.raises(ValueError, match="stage 2 cannot cut"):
        timm.create_model("debiformer_nano", auto_pad=False)(x)
    timm.create_model("debiformer_nano", auto_pad=False, attn_layer="full")(x)


@pytest.mark.parametrize(
    ("name", "layer", "words"),
    [
        ("debiformer_nano", "ful", "unknown attention 'ful'; did you mean full"),
        ("debiformer_nano", "x", "unknown attention 'x'; known: .*deformable_agent, full"),
        ("debiformer_nano", 3, "unknown attention '3'"),
        ("debiformer_nano", ["full"], "attn_layer takes one value for each of the 4 stages"),
        ("biformer_tiny", "bi_level_routing", "bi_level_routing needs topk, which its place"),
        ("biformer_tiny", "deformable_agent", "deformable_agent needs agent_mlp_ratio, agent_stride"),
    ],
)
def test_choices_that_cannot_be_are_named(name, layer, words):
    with pytest.raises(ValueError, match=words):
        timm.create_model(name, attn_layer=layer)


def test_one_name_is_one_attention():
    with pytest.raises(ValueError, match="there is an attention 'full' already"):
        register_attention("full")(Still)


@pytest.mark.parametrize("name", ["debiformer_nano", "biformer_tiny", "biformer_stl"])
def test_arguments_let_names_of_attention_through_but_no_class(name):
    check_arguments(name, {"attn_layer": "full"})
    check_arguments(name, {"attn_layer": ["full", None, None, "full"]})
    with pytest.raises(ValueError, match="argument attn_layer takes a number"):
        check_arguments(name, {"attn_layer": FullAttention})
