"""Maps against attention computed by hand from the layers' weights and inputs, in float64.

Nothing of `ops`, `models` or `visualize` computes the expected values: they follow the papers' equations.
"""

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import models  # noqa: F401 (registers the models)
from runtime.errors import UsageError
from visualize import maps
from visualize.capture import capture

EXACT = {"rtol": 1e-9, "atol": 1e-12}
SIZES = [(96, 96), (72, 56)]
"""Whole windows in every stage, and one that is padded in tokens and agents."""


def build(name, **kwargs):
    """A model in float64 whose biases, tables and offsets are large enough to matter."""
    torch.manual_seed(3)
    model = timm.create_model(name, **kwargs).double().eval()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if path.endswith("rpe_table"):
                parameter.normal_()
            elif parameter.ndim > 1:
                parameter.mul_(2)
            elif path.endswith("bias"):
                parameter.normal_(std=0.3)
    return model


def look(model, size):
    """A capture of a random image, and every attention module's input (H, W, C) by path."""
    image = torch.randn(1, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    inputs = {}
    handles = [
        module.register_forward_pre_hook(lambda module, args, path=path: inputs.update({path: args[0][0].detach()}))
        for path, module in model.named_modules()
        if path.endswith(("attn", "attn1", "attn2"))
    ]
    found = capture(model, image)
    for handle in handles:
        handle.remove()
    return found, inputs


@pytest.fixture(scope="module", params=SIZES, ids=["whole", "padded"])
def debiformer(request):
    model = build("debiformer_nano", n_win=3)
    return model, *look(model, request.param)


@pytest.fixture(scope="module", params=SIZES, ids=["whole", "padded"])
def biformer(request):
    kwargs = {"embed_dims": (16, 16, 24, 32), "depths": (1, 2, 1, 1), "num_heads": (2, 2, 3, 4), "n_win": 3}
    model = build("biformer_tiny", topk=(1, 4, 9, None), **kwargs)
    return model, *look(model, request.param)


# -- by hand


def linear(x, weight, bias=None):
    out = x @ weight.flatten(1).T
    return out if bias is None else out + bias


def pad(x, multiple):
    missing = [-side % multiple for side in x.shape[:2]]
    return F.pad(x.movedim((0, 1), (-2, -1)), (0, missing[1], 0, missing[0])).movedim((-2, -1), (0, 1))


def window_slices(x, n_win, window):
    height, width = x.shape[0] // n_win, x.shape[1] // n_win
    row, column = divmod(window, n_win)
    return slice(row * height, (row + 1) * height), slice(column * width, (column + 1) * width)


def check_routing(idx, q, k, n_win, topk):
    """Each row of idx names the windows of the highest affinity, best first; among equal ones any will do."""
    means_q, means_k = ([x[window_slices(x, n_win, i)].mean((0, 1)) for i in range(n_win**2)] for x in (q, k))
    assert idx.shape == (n_win**2, topk)
    for one, row in zip(means_q, idx.tolist(), strict=True):
        affinities = [float(one @ other) * q.shape[-1] ** -0.5 for other in means_k]
        assert len(set(row)) == topk
        assert [affinities[i] for i in row] == pytest.approx(sorted(affinities, reverse=True)[:topk], rel=1e-9)


def attend(query, k, windows, n_win, num_heads, scale):
    """(m, H, W): softmax over the tokens of the windows, one by one."""
    height, width, c = k.shape
    out = torch.zeros(num_heads, height, width, dtype=torch.float64)
    for head in range(num_heads):
        own = slice(head * c // num_heads, (head + 1) * c // num_heads)
        for window in windows:
            rows, columns = window_slices(k, n_win, window)
            out[head, rows, columns] = torch.exp(scale * (k[rows, columns, own] @ query[own]))
        out[head] /= out[head].sum()
    return out


def bilinear(table, y, x):
    """Read (H, W) at fractional indices, zero outside."""
    total = 0.0
    y0, x0 = math.floor(float(y)), math.floor(float(x))
    for i, j in ((y0, x0), (y0, x0 + 1), (y0 + 1, x0), (y0 + 1, x0 + 1)):
        if 0 <= i < table.shape[0] and 0 <= j < table.shape[1]:
            total = total + table[i, j] * max(0.0, 1 - abs(y - i)) * max(0.0, 1 - abs(x - j))
    return total


def depthwise(x, conv, stride=1):
    weight = conv.weight
    nchw = x.permute(2, 0, 1)[None]
    return F.conv2d(nchw, weight, conv.bias, stride, weight.shape[-1] // 2, groups=len(weight))[0].permute(1, 2, 0)


def agents_by_hand(module, x):
    """Positions (Ha, Wa, g, 2), agent queries, q, k, v, agents, as the definition has them."""
    s, c = module.router.n_win, x.shape[-1]
    x = pad(x, s)
    height, width = x.shape[:2]
    q, k, v = linear(x, module.qkv_conv.qkv.weight, module.qkv_conv.qkv.bias).split(c, -1)
    conv, norm, _, project = module.conv_offset_q
    groups, stride = module.conv_offset_q.groups, conv.stride[0]
    offsets = []
    for group in q.split(c // groups, -1):
        moved = F.conv2d(group.permute(2, 0, 1)[None], conv.weight, None, stride, conv.padding, groups=c // groups)
        moved = F.layer_norm(moved[0].permute(1, 2, 0), (c // groups,), norm.norm.weight, norm.norm.bias, 1e-5)
        offsets.append(linear(F.gelu(moved), project.weight)[..., 0])
    ha, wa = offsets[0].shape
    positions = torch.empty(ha, wa, groups, 2, dtype=torch.float64)
    agents = torch.empty(ha, wa, c, dtype=torch.float64)
    for a in range(ha):
        for b in range(wa):
            for g in range(groups):
                y = min(1.0, max(-1.0, (a + 0.5) / ha * 2 - 1 + float(offsets[g][a, b])))
                xx = min(1.0, max(-1.0, (b + 0.5) / wa * 2 - 1 + float(offsets[g][a, b])))
                positions[a, b, g] = torch.tensor([y, xx], dtype=torch.float64)
                own = slice(g * c // groups, (g + 1) * c // groups)
                agents[a, b, own] = bilinear(x[..., own], (y + 1) / 2 * (height - 1), (xx + 1) / 2 * (width - 1))
    lepe = depthwise(v, module.lepe1, stride)
    return pad(positions, s), pad(agents, s), pad(lepe, s), q, k, v


def conv_mlp(mlp, x):
    h = linear(x, mlp.linear1[0].weight, mlp.linear1[0].bias)
    h = F.gelu(h + depthwise(h, mlp.dwc))
    return linear(h, mlp.linear2[0].weight, mlp.linear2[0].bias)


def window_at(row, column, sides, n_win):
    return row // (sides[0] // n_win) * n_win + column // (sides[1] // n_win)


@torch.no_grad()
def dbra_by_hand(module, x, idx, tokens):
    """Reads (m, Ha, Wa, H, W), positions, and for each of `tokens` its attention to agents (m, Ha, Wa)."""
    s, m, c = module.router.n_win, module.num_heads, x.shape[-1]
    scale = c**-0.5
    positions, agents, lepe, q, k, v = agents_by_hand(module, x)
    height, width = q.shape[:2]
    ha, wa = agents.shape[:2]
    agent_q = linear(agents, module.proj_q.weight, module.proj_q.bias)
    check_routing(idx, agent_q, k, s, module.router.topk)
    reads = torch.empty(m, ha, wa, height, width, dtype=torch.float64)
    read = torch.empty_like(agents)
    for a in range(ha):
        for b in range(wa):
            reads[:, a, b] = attend(agent_q[a, b], k, idx[window_at(a, b, (ha, wa), s)].tolist(), s, m, scale)
            for head in range(m):
                own = slice(head * c // m, (head + 1) * c // m)
                read[a, b, own] = torch.einsum("yx,yxc->c", reads[head, a, b], v[..., own])
    agents = agents + linear(read + lepe, module.unifyheads1.weight, module.unifyheads1.bias)
    agents = agents + conv_mlp(module.mlp, F.layer_norm(agents, (c,), module.norm2.weight, module.norm2.bias, 1e-6))
    agents = F.layer_norm(agents, (c,), module.norm.weight, module.norm.bias, 1e-6)
    keys = linear(agents, module.proj_k.weight, module.proj_k.bias)
    to_agents = torch.empty(len(tokens), m, ha, wa, dtype=torch.float64)
    for number, (row, column) in enumerate(tokens):
        y, xx = row / max(height - 1, 1) * 2 - 1, column / max(width - 1, 1) * 2 - 1
        for head in range(m):
            own = slice(head * c // m, (head + 1) * c // m)
            group = head // (m // positions.shape[2])
            table = module.rpe_table[head]
            for a in range(ha):
                for b in range(wa):
                    dy, dx = (y - positions[a, b, group, 0]) / 2, (xx - positions[a, b, group, 1]) / 2
                    bias = bilinear(table, (dy + 1) / 2 * (len(table) - 1), (dx + 1) / 2 * (table.shape[1] - 1))
                    to_agents[number, head, a, b] = scale * (q[row, column, own] @ keys[a, b, own]) + bias
    return reads, positions, to_agents.flatten(2).softmax(-1).view_as(to_agents)


def some_tokens(layer):
    height, width = layer.maps.tokens
    return sorted({(0, 0), (height - 1, width - 1), (height // 2, width // 3)})


# -- tests


@torch.no_grad()
def check_bra(module, layer, x):
    x = pad(x, layer.maps.n_win)
    q, k, _ = linear(x, module.qkv.qkv.weight, module.qkv.qkv.bias).chunk(3, -1)
    check_routing(layer.maps.idx, q, k, layer.maps.n_win, module.router.topk)
    for row, column in some_tokens(layer):
        window = window_at(row, column, q.shape[:2], layer.maps.n_win)
        weights = attend(
            q[row, column],
            k,
            layer.maps.idx[window].tolist(),
            layer.maps.n_win,
            layer.maps.num_heads,
            q.shape[-1] ** -0.5,
        )
        torch.testing.assert_close(layer.maps.token_attention(row, column), weights, **EXACT)


def test_bra_routes_and_attends_as_by_hand(debiformer):
    model, found, inputs = debiformer
    layers = [layer for layer in found.layers if not layer.agents]
    assert [layer.stage for layer in layers] == [1, 2, 3, 3]
    for layer in layers:
        check_bra(model.get_submodule(layer.name), layer, inputs[layer.name])


def test_agents_as_by_hand(debiformer):
    """Positions, routing, agent to window, token to agent, and their product."""
    model, found, inputs = debiformer
    layers = [layer for layer in found.layers if layer.agents]
    assert [layer.stage for layer in layers] == [1, 2, 3, 3, 4, 4]
    for layer in layers:
        tokens = some_tokens(layer)
        module = model.get_submodule(layer.name)
        reads, positions, to_agents = dbra_by_hand(module, inputs[layer.name], layer.maps.idx, tokens)
        torch.testing.assert_close(layer.maps.positions, positions, **EXACT)
        torch.testing.assert_close(layer.maps.agent_reads(), reads, **EXACT)
        for number, (row, column) in enumerate(tokens):
            torch.testing.assert_close(layer.maps.token_to_agents()[:, row, column], to_agents[number], **EXACT)
            expected = torch.zeros(reads.shape[-2:], dtype=torch.float64)
            for a in range(reads.shape[1]):
                for b in range(reads.shape[2]):
                    expected += to_agents[number, :, a, b].mean() * reads[:, a, b].mean(0)
            composed = layer.maps.token_attention(row, column).mean(0)
            torch.testing.assert_close(composed, expected, **EXACT)
            assert float(composed.sum()) == pytest.approx(1, abs=1e-12)


def test_one_head_of_the_tokens_composed_with_the_mean_of_the_agents(debiformer):
    _, found, _ = debiformer
    layer = found.block(3)[-1]
    heads = layer.maps.token_attention(1, 1)
    reads = layer.maps.agent_reads().mean(0)
    for head, to_agents in zip(heads, layer.maps.token_to_agents()[:, 1, 1], strict=True):
        expected = sum(to_agents[a, b] * reads[a, b] for a in range(reads.shape[0]) for b in range(reads.shape[1]))
        torch.testing.assert_close(head, expected, **EXACT)
        assert float(head.sum()) == pytest.approx(1, abs=1e-12)
    assert not torch.allclose(heads[0], heads[1])


def test_biformer_as_by_hand(biformer):
    model, found, inputs = biformer
    assert all(not layer.agents for layer in found.layers)
    *routed, full = found.layers
    for layer in routed:
        check_bra(model.get_submodule(layer.name), layer, inputs[layer.name])
    module, x = model.get_submodule(full.name), inputs[full.name]
    q, k, _ = linear(x, module.qkv.weight).chunk(3, -1)
    assert full.maps.n_win == 1
    for row, column in some_tokens(full):
        expected = attend(q[row, column], k, [0], 1, full.maps.num_heads, (q.shape[-1] // full.maps.num_heads) ** -0.5)
        torch.testing.assert_close(full.maps.token_attention(row, column), expected, **EXACT)


def test_shares_of_the_agents_are_means_over_the_tokens_of_the_picture(debiformer):
    _, found, _ = debiformer
    for layer in found.layers:
        if not layer.agents:
            continue
        height, width = layer.maps.tokens
        everything = layer.maps.token_to_agents()
        expected = sum(everything[:, i, j] for i in range(height) for j in range(width)) / (height * width)
        torch.testing.assert_close(layer.maps.agent_shares(), expected, **EXACT)


def test_agents_are_drawn_where_they_read(debiformer):
    """-1 and 1 are the centres of the first and last token, padding included; references are cell centres."""
    _, found, _ = debiformer
    layer = found.block(1)[-1]
    sides = torch.tensor(layer.maps.q.shape[:2])
    corners = maps.pixel_positions(layer, torch.tensor([[-1.0, -1.0], [1.0, 1.0]], dtype=torch.float64))
    half = layer.stride / 2 - 0.5
    assert corners[0].tolist() == [half, half]
    assert corners[1].tolist() == [float(side - 1) * layer.stride + half for side in sides.flip(0)]
    start, end = maps.agent_pixels(layer)
    assert start.shape == end.shape == (*layer.maps.agents, layer.maps.groups, 2)
    offsets = end - start
    inside = (layer.maps.positions[: layer.maps.agents[0], : layer.maps.agents[1]].abs() < 1).all(-1)
    per_pixel = offsets[inside] / (sides.flip(0) - 1) / layer.stride
    torch.testing.assert_close(per_pixel[:, 0], per_pixel[:, 1], **EXACT)  # one number moves both coordinates


def test_windows_are_boxes_of_whole_tokens(debiformer):
    _, found, _ = debiformer
    for layer in found.layers:
        boxes = [maps.window_box(layer, window) for window in range(layer.maps.n_win**2)]
        area = sum((right - left) * (bottom - top) for left, top, right, bottom in boxes)
        assert area == layer.maps.q.shape[0] * layer.maps.q.shape[1] * layer.stride**2
        row, column = layer.maps.tokens[0] - 1, layer.maps.tokens[1] // 2
        left, top, right, bottom = boxes[layer.maps.window_of(row, column)]
        assert left <= column * layer.stride < right
        assert top <= row * layer.stride < bottom


@settings(derandomize=True, max_examples=30, deadline=None, database=None)
@given(x=st.integers(-400, 400), y=st.integers(-400, 400))
def test_queries_are_tokens_or_sentences(debiformer_whole, x, y):
    layer = debiformer_whole.layers[0]
    if 0 <= x < 64 and 0 <= y < 64:
        assert maps.token_at(layer, (64, 64), x, y) == (y // 4, x // 4)
    else:
        with pytest.raises(UsageError, match=f"{x},{y} lies outside of the 64x64"):
            maps.token_at(layer, (64, 64), x, y)


@pytest.fixture(scope="module")
def debiformer_whole():
    return capture(timm.create_model("debiformer_nano"), torch.zeros(1, 3, 64, 64))
