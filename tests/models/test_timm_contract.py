"""Every registered model keeps timm's promises: what any timm script may ask of a model works."""

import copy
import functools
import itertools
import math

import pytest
import timm
import torch
from timm.models import group_parameters, load_checkpoint
from timm.models._features_fx import create_feature_extractor
from timm.models._manipulate import group_modules
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from torch import Tensor, nn

import models
from models import BiFormer, BiFormerSTL, DeBiFormer, MaxViTSTL
from models.deformable_attention import DeformableAgentAttention
from models.partition_attention import RelativePositionBias
from models.weights import checkpoint_filter_fn

ALIASES = {"debi_tiny": "debiformer_tiny", "debi_small": "debiformer_small", "debi_base": "debiformer_base"}
ALL_NAMES = [*models.MODEL_NAMES, *ALIASES]
CHEAP_NAMES = ["debiformer_nano", "debiformer_tiny", "biformer_tiny", "biformer_stl", "biformer_stl_nchw", "maxvit_stl"]

every_name = pytest.mark.parametrize("name", ALL_NAMES)
every_variant = pytest.mark.parametrize("name", models.MODEL_NAMES)
cheap_models = pytest.mark.parametrize("name", CHEAP_NAMES)


def create(name: str, **kwargs) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **kwargs).eval()


@functools.cache
def outline(name: str) -> nn.Module:
    """The model without memory for its parameters; shared, for reading only."""
    with torch.device("meta"):
        return timm.create_model(name)


def parameters_of(model: nn.Module, part: nn.Module) -> set[str]:
    """Names of the model's parameters that belong to one of its modules."""
    members = set(map(id, part.parameters()))
    return {name for name, parameter in model.named_parameters() if id(parameter) in members}


def native_images(model: nn.Module, batch: int = 1) -> Tensor:
    return torch.randn(batch, *model.default_cfg["input_size"], generator=torch.Generator().manual_seed(0))


def square_images(side: int) -> Tensor:
    return torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))


# -- forward and backward -----------------------------------------------------------------------------------------


@every_name
@torch.no_grad()
def test_forward_at_native_size(name):
    model = create(name)
    logits = model(native_images(model))
    assert logits.shape == (1, 1000)
    assert logits.isfinite().all()


@every_variant
def test_backward_reaches_every_parameter(name):
    model = create(name, num_classes=42, drop_path_rate=0.0).train()
    logits = model(native_images(model))
    assert logits.shape == (1, 42)
    logits.square().mean().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    # A bias on the keys of all agents cancels in the softmax; everything else matters.
    zero = [n for n, p in model.named_parameters() if not p.grad.any() and not n.endswith("proj_k.bias")]
    assert zero == []


@every_variant
@torch.no_grad()
def test_one_input_channel(name):
    model = create(name, in_chans=1)
    _, height, width = model.default_cfg["input_size"]
    assert model(torch.randn(1, 1, height, width)).shape == (1, 1000)


@pytest.mark.parametrize(("alias", "name"), ALIASES.items())
def test_alias_is_the_same_model(alias, name):
    a, b = create(alias), create(name)
    assert str(a) == str(b)
    assert a.default_cfg == b.default_cfg
    for (key, value), (other_key, other_value) in zip(a.state_dict().items(), b.state_dict().items(), strict=True):
        assert key == other_key
        assert torch.equal(value, other_value)


@every_name
def test_name_is_listed(name):
    assert timm.is_model(name)
    assert name in timm.list_models(name.split("_")[0] + "_*")


def test_model_names_holds_every_registered_variant_once():
    registered = {name for pattern in ("debiformer_*", "biformer_*", "*_stl*") for name in timm.list_models(pattern)}
    assert sorted(models.MODEL_NAMES) == sorted(registered)


# -- configuration and head ---------------------------------------------------------------------------------------


@every_name
def test_default_cfg_names_the_first_and_the_last_layer(name):
    model = outline(name)
    cfg = model.default_cfg
    assert {"url", "num_classes", "input_size", "pool_size", "mean", "std", "interpolation", "crop_pct"} <= set(cfg)
    state = model.state_dict()
    assert state[f"{cfg['first_conv']}.weight"].shape[1] == cfg["input_size"][0] == 3
    assert state[f"{cfg['classifier']}.weight"].shape == (cfg["num_classes"], model.num_features)
    assert model.get_classifier() is model.get_submodule(cfg["classifier"])


@every_variant
@torch.no_grad()
def test_resetting_the_classifier(name):
    model = create(name)
    features = model.forward_features(native_images(model))
    assert features.shape == (1, model.num_features, *model.default_cfg["pool_size"])
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (1, model.head_hidden_size)
    torch.testing.assert_close(pooled, features.mean((2, 3)))
    assert torch.equal(model.forward_head(features), model.head(pooled))

    model.reset_classifier(0)
    assert torch.equal(model.forward_head(features), pooled)
    assert not any(key.startswith(model.default_cfg["classifier"]) for key in model.state_dict())
    model.reset_classifier(0, "")
    assert torch.equal(model.forward_head(features), features)
    model.reset_classifier(10, "max")
    assert model.forward_head(features).shape == (1, 10)
    assert torch.equal(model.forward_head(features, pre_logits=True), features.amax((2, 3)))
    assert model.num_classes == 10


@cheap_models
@torch.no_grad()
def test_head_arguments_of_create_model(name):
    x = square_images(64)
    assert create(name, num_classes=0)(x).shape == (1, create(name).num_features)
    assert create(name, num_classes=0, global_pool="")(x).shape == (1, create(name).num_features, 2, 2)
    assert create(name, drop_rate=0.25).head_drop.p == 0.25


@every_name
def test_stochastic_depth_grows_linearly_over_all_blocks(name):
    with torch.device("meta"):
        model = timm.create_model(name, drop_path_rate=0.2)
    blocks = [block for stage in model.stages for block in stage]
    rates = [block.drop_path.drop_prob for block in blocks]
    assert rates == pytest.approx([0.2 * i / (len(blocks) - 1) for i in range(len(blocks))])


@cheap_models
def test_factory_arguments_reach_every_tensor(name):
    model = create(name, device="meta", dtype=torch.bfloat16)
    floats = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    assert {(t.device.type, t.dtype) for t in floats} == {("meta", torch.bfloat16)}
    assert next(create(name, device="cpu", dtype=None).parameters()).dtype == torch.float32


@pytest.mark.parametrize("kind", [DeBiFormer, BiFormer, BiFormerSTL, MaxViTSTL])
def test_constructors_take_factory_arguments(kind):
    model = kind(device="meta", dtype=torch.bfloat16)
    floats = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    assert {(t.device.type, t.dtype) for t in floats} == {("meta", torch.bfloat16)}
    with pytest.raises(ValueError, match=f"{kind.__name__} has an output stride of 32, not 8"):
        kind(device="meta", output_stride=8)


@cheap_models
def test_output_stride_other_than_32_is_refused(name):
    create(name, features_only=True, output_stride=32)
    with pytest.raises(ValueError, match=r"has an output stride of 32, not 16: .* decoder"):
        create(name, features_only=True, output_stride=16)


# -- features -----------------------------------------------------------------------------------------------------


@every_variant
@torch.no_grad()
def test_features_only_gives_four_maps(name):
    model = create(name, features_only=True)
    channels, reductions = model.feature_info.channels(), model.feature_info.reduction()
    assert reductions == [4, 8, 16, 32]
    outputs = model(square_images(96))
    assert len(outputs) == 4
    for out, channel, reduction in zip(outputs, channels, reductions, strict=True):
        assert out.shape == (1, channel, math.ceil(96 / reduction), math.ceil(96 / reduction))


@every_variant
def test_features_only_has_no_parameter_without_a_gradient(name):
    model = create(name, features_only=True, drop_path_rate=0.0)
    sum(out.square().mean() for out in model.train()(square_images(96))).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


@cheap_models
@pytest.mark.parametrize("out_indices", [(0,), (1, 2), (-1,), (-3, -1), (0, 1, 2, 3)])
@torch.no_grad()
def test_features_only_with_chosen_stages(name, out_indices):
    full, x = create(name), square_images(96)
    chosen = create(name, features_only=True, out_indices=out_indices)
    chosen.model.load_state_dict(full.state_dict(), strict=False)
    _, maps = full.forward_intermediates(x)
    expected = [maps[i] for i in out_indices]
    outputs = chosen(x)
    assert len(outputs) == len(expected)
    assert all(torch.equal(out, map_) for out, map_ in zip(outputs, expected, strict=True))
    assert chosen.feature_info.channels() == [map_.shape[1] for map_ in expected]
    assert chosen.feature_info.reduction() == [(4, 8, 16, 32)[i] for i in out_indices]


@pytest.mark.parametrize("name", ["debiformer_nano", "biformer_tiny"])
@pytest.mark.parametrize("feature_cls", ["fx", "hook"])
@torch.no_grad()
def test_other_feature_extractors_agree(name, feature_cls):
    """The module names in `feature_info` are the modules that produce the maps."""
    x = square_images(96)
    expected = create(name, features_only=True)(x)
    outputs = create(name, features_only=True, feature_cls=feature_cls)(x)
    assert len(outputs) == len(expected)
    assert all(torch.equal(out, map_) for out, map_ in zip(outputs, expected, strict=True))


@every_variant
@torch.no_grad()
def test_forward_intermediates(name):
    model, x = create(name), square_images(96)
    last, maps = model.forward_intermediates(x)
    assert torch.equal(last, model.forward_features(x))
    assert [m.shape[1] for m in maps] == [info["num_chs"] for info in model.feature_info]
    assert torch.equal(model.norm(maps[-1]), last)

    only = model.forward_intermediates(x, indices=[-1, 0], norm=True, intermediates_only=True)
    assert len(only) == 2
    assert torch.equal(only[0], maps[0])
    assert torch.equal(only[1], last)


@pytest.mark.parametrize("only", [False, True])
def test_forward_intermediates_counts_a_batch_once_in_training(only):
    model = create("debiformer_nano").train()
    model.forward_intermediates(square_images(64), norm=True, intermediates_only=only)
    counts = {int(m.num_batches_tracked) for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)}
    assert counts == {1}


@cheap_models
@torch.no_grad()
def test_stop_early_runs_no_later_stage(name):
    model, x = create(name), square_images(96)
    _, maps = model.forward_intermediates(x)
    ran = []
    for i, blocks in enumerate(model.stages):
        blocks[0].register_forward_hook(lambda *_, i=i: ran.append(i))
    last, early = model.forward_intermediates(x, indices=[1], stop_early=True)
    assert ran == [0, 1]
    assert torch.equal(last, maps[1])
    assert [torch.equal(m, maps[1]) for m in early] == [True]


def test_only_nchw_maps_are_offered():
    with pytest.raises(ValueError, match="NHWC"):
        create("debiformer_nano").forward_intermediates(square_images(64), output_fmt="NHWC")


@cheap_models
@torch.no_grad()
def test_pruning_keeps_what_the_chosen_maps_need(name):
    model, x = create(name), square_images(96)
    _, maps = model.forward_intermediates(x)
    assert model.prune_intermediate_layers([0, -2]) == [0, 2]
    assert len(model.stages) == len(model.downsample_layers) == 3
    last, pruned = model.forward_intermediates(x, indices=[0, 2])
    assert torch.equal(pruned[0], maps[0])
    assert torch.equal(pruned[1], maps[2])
    assert torch.equal(last, maps[2])
    assert torch.equal(model(x), maps[2])
    assert model.num_features == maps[2].shape[1]
    assert not any(key.startswith(("norm.", "head.")) for key in model.state_dict())


@cheap_models
@torch.no_grad()
def test_pruning_after_the_last_stage_keeps_the_norm_and_on_request_the_head(name):
    model, x = create(name), square_images(96)
    features, logits = model.forward_features(x), model(x)
    model.prune_intermediate_layers(1, prune_head=False)
    assert torch.equal(model(x), logits)
    model.prune_intermediate_layers(1)
    assert torch.equal(model(x), features)
    _, maps = model.forward_intermediates(x)
    model.prune_intermediate_layers(1, prune_norm=True)
    assert torch.equal(model(x), maps[-1])


# -- torch.fx -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in ("debiformer_small", "debiformer_base") else ())
        for name in models.MODEL_NAMES
    ],
)
def test_traced_graph_equals_eager_forward_and_backward(name):
    model, x = create(name, num_classes=42, drop_path_rate=0.0), square_images(128)
    traced = create_feature_extractor(model, {"head": "logits"})
    assert torch.equal(traced.eval()(x)["logits"], model.eval()(x))

    model.train()
    traced.train()(x)["logits"].square().mean().backward()
    gradients = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    model(x).square().mean().backward()
    assert [n for n, p in model.named_parameters() if not torch.equal(p.grad, gradients[n])] == []


# -- parameter groups ---------------------------------------------------------------------------------------------


@every_name
def test_layer_groups_run_from_stem_to_head(name):
    model = outline(name)
    layer = group_parameters(model, model.group_matcher(), reverse=True)
    assert set(layer) == {n for n, _ in model.named_parameters()}

    depth = [0]  # the stem; then, per stage, the convolution that opens it and one layer per block
    for i, blocks in enumerate(model.stages):
        if i > 0:
            depth.append(depth[-1] + 1)
            assert {layer[n] for n in layer if n.startswith(f"downsample_layers.{i}.")} == {depth[-1]}
        for block in blocks:
            depth.append(depth[-1] + 1)
            assert {layer[n] for n in parameters_of(model, block)} == {depth[-1]}
    assert {layer[n] for n in layer if n.startswith("downsample_layers.0.")} == {0}
    assert layer["norm.weight"] == layer["norm.bias"] == depth[-1]
    assert layer["head.weight"] == layer["head.bias"] == depth[-1] + 1


@every_name
def test_coarse_groups_are_stem_stages_and_head(name):
    model = outline(name)
    layer = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    assert layer["downsample_layers.0.0.weight"] == 0
    for i in range(4):
        members = {layer[n] for n in layer if n.startswith((f"stages.{i}.", f"downsample_layers.{i}.")) and layer[n]}
        assert members == {i + 1}
    assert layer["norm.weight"] == 4
    assert layer["head.weight"] == 5


@every_name
def test_modules_can_be_grouped_too(name):
    model = outline(name)
    groups = group_modules(model, model.group_matcher())
    assert groups[0][0].startswith("downsample_layers.0")
    assert groups[max(groups)] == ["head"]


@every_name
def test_layer_decay_scales_learning_rates_from_stem_to_head(name):
    model = outline(name)
    names = {id(p): n for n, p in model.named_parameters()}
    groups = param_groups_layer_decay(
        model, weight_decay=0.05, no_weight_decay_list=model.no_weight_decay(), layer_decay=0.5
    )
    scale = {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
    decay = {names[id(p)]: group["weight_decay"] for group in groups for p in group["params"]}
    assert set(scale) == set(names.values())
    num_layers = 1 + 3 + sum(len(blocks) for blocks in model.stages) + 1
    assert scale["downsample_layers.0.0.weight"] == 0.5 ** (num_layers - 1)
    assert scale["norm.weight"] == 0.5
    last = model.stages[3]
    assert {scale[n] for n in parameters_of(model, last[0])} == {0.5 ** len(last)}
    assert scale["head.weight"] == 1
    undecayed = {n for n, p in model.named_parameters() if p.ndim == 1 or n in model.no_weight_decay()}
    assert {n for n in decay if decay[n] == 0} == undecayed


@every_name
def test_weight_decay_spares_exactly_the_position_tables(name):
    model = outline(name)
    modules = dict(model.named_modules())
    tables = {f"{n}.rpe_table" for n, m in modules.items() if isinstance(m, DeformableAgentAttention)}
    tables |= {f"{n}.relative_position_bias_table" for n, m in modules.items() if isinstance(m, RelativePositionBias)}
    assert model.no_weight_decay() == tables
    assert tables <= {n for n, _ in model.named_parameters()}
    assert bool(tables) == name.startswith(("debi", "maxvit"))


@cheap_models
@pytest.mark.parametrize("layer_decay", [None, 0.7])
def test_optimizer_state_of_timm_loads_into_a_new_optimizer(name, layer_decay):
    first, second = (
        create_optimizer_v2(outline(name), "adamw", lr=0.1, weight_decay=0.05, layer_decay=layer_decay)
        for _ in range(2)
    )
    second.load_state_dict(first.state_dict())
    assert len(second.param_groups) == len(first.param_groups) > 1


# -- checkpoints --------------------------------------------------------------------------------------------------


@cheap_models
@torch.no_grad()
def test_state_dict_round_trip(name):
    model, other = create(name), timm.create_model(name).eval()
    x = square_images(64)
    assert not torch.equal(other(x), model(x))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))


def nest(state):
    return {"model": state, "epoch": 3}


def prefix(state):
    return {f"module.{key}": value for key, value in state.items()}


@pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(lambda state: state, id="bare"),
        pytest.param(prefix, id="module."),
        pytest.param(nest, id="model"),
        pytest.param(lambda state: nest(prefix(state)), id="model, module."),
        pytest.param(lambda state: {"state_dict": state}, id="state_dict"),
    ],
)
@pytest.mark.parametrize("name", ["debiformer_nano", "biformer_tiny"])
def test_published_wrappings_of_a_checkpoint_load(name, wrap):
    model = create(name)
    state = model.state_dict()
    found = checkpoint_filter_fn(wrap(state), model)
    assert list(found) == list(state)
    assert all(torch.equal(found[key], state[key]) for key in state)


def test_checkpoint_file_loads_for_fine_tuning(tmp_path):
    """As `pretrained` weights, with another number of classes, and through timm's load_checkpoint."""
    source = create("debiformer_nano")
    nn.init.normal_(source.head.bias)
    torch.save(nest(prefix(source.state_dict())), tmp_path / "weights.pth")

    same = create("debiformer_nano", pretrained=True, pretrained_cfg_overlay={"file": tmp_path / "weights.pth"})
    x = square_images(64)
    assert torch.equal(same(x), source(x))

    tuned = create(
        "debiformer_nano",
        pretrained=True,
        pretrained_cfg_overlay={"file": tmp_path / "weights.pth"},
        num_classes=42,
        in_chans=1,
    )
    assert tuned.head.weight.shape[0] == 42
    assert tuned.downsample_layers[0][0].weight.shape[1] == 1
    assert torch.equal(tuned.stages[3][0].attn2.rpe_table, source.stages[3][0].attn2.rpe_table)

    loaded = timm.create_model("debiformer_nano").eval()
    load_checkpoint(loaded, str(tmp_path / "weights.pth"), filter_fn=checkpoint_filter_fn)
    assert torch.equal(loaded(x), source(x))


@torch.no_grad()
def test_position_tables_are_resampled_to_another_image_size():
    """Bilinear with aligned corners: a table linear in its coordinates stays linear, and keeps its range."""
    small, large = create("debiformer_nano", img_size=64), create("debiformer_nano", img_size=(96, 128))
    state = small.state_dict()
    for key in small.no_weight_decay():
        heads, height, width = state[key].shape
        y, x = torch.linspace(-1, 1, height), torch.linspace(-1, 1, width)
        state[key] = (2 * y[:, None] + 3 * x).expand(heads, -1, -1).clone()
    found = checkpoint_filter_fn(state, large)
    for key in small.no_weight_decay():
        heads, height, width = large.state_dict()[key].shape
        assert (height, width) != state[key].shape[1:]
        y, x = torch.linspace(-1, 1, height), torch.linspace(-1, 1, width)
        torch.testing.assert_close(found[key], (2 * y[:, None] + 3 * x).expand(heads, -1, -1), atol=1e-5, rtol=0)
    large.load_state_dict(found)
    assert large(torch.randn(1, 3, 96, 128)).isfinite().all()


@torch.no_grad()
def test_position_tables_follow_the_image_size():
    tables = [stage[-1].attn2.rpe_table for stage in create("debiformer_nano", img_size=(96, 128)).stages]
    sides = [(2 * q_h - 1, 2 * q_w - 1) for q_h, q_w in [(24, 32), (12, 16), (6, 8), (3, 4)]]
    assert [tuple(table.shape[1:]) for table in tables] == sides


@every_variant
def test_model_can_be_built_without_memory(name):
    with torch.device("meta"):
        model = timm.create_model(name)
        out = model.eval()(torch.empty(2, *model.default_cfg["input_size"]))
    assert out.shape == (2, 1000)
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}


@every_variant
@torch.no_grad()
def test_model_built_without_memory_and_loaded_strictly_is_the_same(name):
    """As Hugging Face's from_pretrained and FSDP build models: nothing may be left as the memory was."""
    model, twin = create(name), copy.deepcopy(outline(name)).eval().to_empty(device="cpu")
    for tensor in itertools.chain(twin.parameters(), twin.buffers()):
        tensor.fill_(torch.nan if tensor.is_floating_point() else -1)
    twin.load_state_dict(model.state_dict(), strict=True)
    x = native_images(model)
    assert torch.equal(twin(x), model(x))
    assert {n for n, _ in twin.named_buffers()} <= set(twin.state_dict())
