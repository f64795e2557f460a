"""One model, many ways to run it: precision, memory format, compilation, padding and recomputation change nothing."""

import copy

import pytest
import timm
import torch
from golden.compare import CLASSIFIERS, load, relative_error
from golden.fill import fill, images
from torch._dynamo.testing import CompileCounter

import models
from models import ops
from models.attention import BiLevelRoutingAttention
from models.deformable_attention import DeformableAgentAttention
from models.stl import PartitionAttention


@pytest.fixture(scope="module", params=CLASSIFIERS)
def golden_model(request):
    """A float64 model with the weights of the golden file, its golden input and its golden logits."""
    batch, seed = CLASSIFIERS[request.param]
    model = fill(timm.create_model(request.param), seed)
    return model, images(batch, 224, 224, seed), load(f"{request.param}_224")["logits"]


def nano(**kwargs):
    """A small model in float64 with non-trivial weights, normalisation statistics and position tables."""
    return fill(timm.create_model("debiformer_nano", **kwargs))


def gradients(model, x):
    """Gradients of a loss by parameter name; the model is left without any."""
    model.zero_grad()
    model(x).square().mean().backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


# -- precision and memory format ----------------------------------------------------------------------------------


@torch.no_grad()
def test_float32_is_close_to_the_golden_logits(golden_model):
    model, x, logits = golden_model
    assert relative_error(copy.deepcopy(model).float()(x.float()), logits) < 1e-5


@torch.no_grad()
def test_channels_last_images_give_the_golden_logits(golden_model):
    model, x, logits = golden_model
    assert relative_error(model(x.contiguous(memory_format=torch.channels_last)), logits) < 1e-9


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.1), (torch.float16, 0.01)])
def test_half_precision_stays_near_float64(dtype, tolerance):
    x = images(2, 64, 64)
    out = nano().to(dtype)(x.to(dtype))
    assert out.dtype == dtype
    assert relative_error(out, nano()(x)) < tolerance


def test_autocast_forward_and_backward_stay_near_float32():
    model, x = nano().float(), images(2, 64, 64).float()
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
    out.float().square().mean().backward()
    assert relative_error(out, expected) < 0.1
    assert all(p.grad.isfinite().all() for p in model.parameters())


# -- compilation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("auto_pad", [True, False])
def test_nano_is_one_graph_without_breaks(auto_pad):
    torch._dynamo.reset()
    model, graphs = nano(auto_pad=auto_pad), CompileCounter()
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    for seed in (0, 1):
        x = images(2, 64, 64, seed)
        assert relative_error(compiled(x), model(x)) < 1e-9
    assert graphs.frame_count == 1


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in ("debiformer_small", "debiformer_base") else ())
        for name in models.MODEL_NAMES
    ],
)
def test_every_variant_trains_in_one_graph_without_breaks(name):
    torch._dynamo.reset()
    model, graphs = timm.create_model(name, drop_path_rate=0.1).train(), CompileCounter()
    torch.compile(model, backend=graphs, fullgraph=True)(torch.randn(2, 3, 64, 64)).sum().backward()
    assert graphs.frame_count == 1
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.slow
def test_compiled_model_gives_the_golden_logits():
    torch._dynamo.reset()
    model = torch.compile(fill(timm.create_model("debiformer_tiny")), fullgraph=True)
    with torch.no_grad():
        out = model(images(2, 224, 224))
    assert relative_error(out, load("debiformer_tiny_224")["logits"]) < 1e-9


@pytest.mark.slow
def test_compiled_training_gives_the_gradients():
    torch._dynamo.reset()
    model = nano(num_classes=4, depths=(1, 1, 1, 1)).train()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    gradients = []
    for run in (model, torch.compile(model, fullgraph=True, dynamic=False)):
        model.zero_grad()
        torch.nn.functional.cross_entropy(run(x), torch.tensor([1, 3])).backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    assert relative_error(gradients[1], gradients[0]) < 1e-12


# -- padding ------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "height", "width"),
    [
        ("debiformer_tiny", 224, 224),
        ("debiformer_tiny", 221, 223),
        ("biformer_tiny", 224, 224),
        ("biformer_tiny", 112, 109),
        ("biformer_stl", 224, 115),
        ("biformer_stl_nchw", 96, 200),
        ("maxvit_stl", 226, 224),
        ("debiformer_nano", 64, 125),
    ],
)
def test_auto_pad_changes_nothing_where_nothing_is_missing(name, height, width):
    torch.manual_seed(0)
    model, x = timm.create_model(name, auto_pad=False).eval(), torch.randn(1, 3, height, width)
    strict = model(x)
    model.auto_pad = True
    assert torch.equal(model(x), strict)


@torch.no_grad()
@pytest.mark.parametrize(("height", "width"), [(13, 16), (16, 9), (1, 2), (15, 15)])
@pytest.mark.parametrize(
    "attention",
    [
        pytest.param(lambda: BiLevelRoutingAttention(16, 4, n_win=4, topk=3), id="routing"),
        pytest.param(
            lambda: DeformableAgentAttention(16, 4, 4, 3, 2, 2, 5, agent_mlp_ratio=2, rpe_size=(8, 8)), id="deformable"
        ),
        pytest.param(lambda: PartitionAttention(32, size=4, grid=False), id="windows"),
        pytest.param(lambda: PartitionAttention(32, size=4, grid=True), id="grid"),
    ],
)
def test_attention_pads_a_map_with_zeros_right_and_bottom_and_crops_the_output(attention, height, width):
    module = fill(attention())
    width_of = 32 if isinstance(module, PartitionAttention) else 16
    x = torch.randn(2, height, width, width_of, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    padded = x.new_zeros(2, -(-height // 4) * 4, -(-width // 4) * 4, width_of)
    padded[:, :height, :width] = x
    out = module(x)
    assert out.shape == x.shape
    torch.testing.assert_close(out, module(padded)[:, :height, :width], rtol=1e-12, atol=1e-12)


# -- recomputation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "side"),
    [("debiformer_nano", 64), ("debiformer_tiny", 96), ("biformer_tiny", 96), ("biformer_stl", 64), ("maxvit_stl", 64)],
)
def test_gradient_checkpointing_gives_the_same_gradients(name, side):
    model, x = fill(timm.create_model(name)).train(), images(2, side, side)
    expected = gradients(model, x)
    model.set_grad_checkpointing()
    actual = gradients(model, x)
    largest = max(grad.abs().max() for grad in expected.values())
    for parameter, grad in expected.items():
        scale = largest if parameter.endswith("proj_k.bias") else grad.abs().max()  # proj_k.bias: noise around zero
        assert (actual[parameter] - grad).abs().max() < 1e-9 * scale, parameter


@pytest.mark.parametrize(
    ("enable", "runs"),
    [(True, [2, 2, 2, 2]), (False, [1, 1, 1, 1]), ((True, False, True, False), [2, 1, 2, 1])],
)
def test_gradient_checkpointing_recomputes_the_chosen_stages(enable, runs):
    model, counts = nano().train(), [0, 0, 0, 0]

    def count(stage):
        counts[stage] += 1

    for i, blocks in enumerate(model.stages):
        blocks[0].register_forward_pre_hook(lambda *_, i=i: count(i))
    model.set_grad_checkpointing(enable)
    gradients(model, images(1, 64, 64))
    assert counts == runs


def test_nothing_is_recomputed_in_evaluation():
    model, calls = nano(grad_checkpointing=True), []
    model.stages[0][0].register_forward_pre_hook(lambda *_: calls.append(1))
    gradients(model, images(1, 64, 64))
    assert len(calls) == 1


@pytest.mark.slow
@torch.no_grad()
def test_padding_compiles_at_every_size():
    torch._dynamo.reset()

    def padded(x):
        return ops.pad_to_multiple(x, 4).sum((1, 2))

    compiled = torch.compile(padded, fullgraph=True)
    for side in (16, 18, 13):  # the second size makes the sides symbols
        x = images(2, side, side).permute(0, 2, 3, 1)
        torch.testing.assert_close(compiled(x), padded(x))
