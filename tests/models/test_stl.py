"""The attention of the STL models against their definition spelled out token by token."""

import pytest
import torch
import torch.nn.functional as F
from golden.fill import fill
from timm.layers.pos_embed_rel import RelPosBiasTf

from models.layers import to_nchw, to_nhwc
from models.partition_attention import PartitionAttention, RelativePositionBias
from models.stl import PooledRoutingAttention


def random_map(height, width, channels):
    return torch.randn(
        2, height, width, channels, dtype=torch.float64, generator=torch.Generator().manual_seed(height * width)
    )


def attend(q, k, v, num_heads, scale):
    """Plain attention of tokens (n, C) over tokens (n', C)."""
    out = []
    for queries, keys, values in zip(
        q.chunk(num_heads, -1), k.chunk(num_heads, -1), v.chunk(num_heads, -1), strict=True
    ):
        out.append((scale * queries @ keys.T).softmax(-1) @ values)
    return torch.cat(out, dim=-1)


@torch.no_grad()
@pytest.mark.parametrize(("height", "width"), [(8, 8), (9, 13), (4, 11), (3, 2), (1, 5)])
def test_routing_attention_with_windows_of_a_fraction_of_the_map(height, width):
    dim, heads, n_win, topk = 8, 2, 4, 3
    module, x = fill(PooledRoutingAttention(dim, heads, n_win, topk)), random_map(height, width, dim)
    qkv = F.linear(x, module.qkv_linear.weight[:, :, 0, 0], module.qkv_linear.bias)
    window_h, window_w = max(height // n_win, 1), max(width // n_win, 1)
    corners = [(y, z) for y in range(0, height, window_h) for z in range(0, width, window_w)]
    expected = torch.empty_like(x)
    for image in range(2):
        q, k, v = qkv[image].split(dim, -1)

        def cut(tensor, corner):
            return tensor[corner[0] : corner[0] + window_h, corner[1] : corner[1] + window_w].reshape(-1, dim)

        def padded(tensor, corner):
            tokens = cut(tensor, corner)
            return torch.cat([tokens, tokens.new_zeros(window_h * window_w - len(tokens), dim)])

        means = torch.stack([cut(k, corner).mean(0) for corner in corners])
        for corner in corners:
            ranked = (means @ cut(q, corner).mean(0)).argsort(descending=True)[:topk].tolist()
            keys, values = (torch.cat([padded(t, corners[i]) for i in ranked]) for t in (k, v))
            out = attend(cut(q, corner), keys, values, heads, dim**-0.5)
            target = expected[image, corner[0] : corner[0] + window_h, corner[1] : corner[1] + window_w]
            target.copy_(out.view(target.shape))
    lepe = to_nhwc(F.conv2d(to_nchw(qkv[..., 2 * dim :]), module.lepe.weight, module.lepe.bias, padding=2, groups=dim))
    expected = F.linear(expected + lepe, module.output_linear.weight[:, :, 0, 0], module.output_linear.bias)
    torch.testing.assert_close(module(x), expected, rtol=1e-12, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("grid", [False, True])
@pytest.mark.parametrize(("height", "width"), [(3, 3), (6, 9), (3, 12)])
def test_partition_attention_in_windows_and_over_grids(height, width, grid):
    dim, size, heads = 64, 3, 2
    module, x = fill(PartitionAttention(dim, size, grid)), random_map(height, width, dim)
    q, k, v = F.linear(x, module.qkv.weight[:, :, 0, 0], module.qkv.bias).split(dim, -1)
    table = module.rel_pos.relative_position_bias_table
    # Rows (columns) of a partition: neighbours in a window, one of each third of the map in a grid.
    step_h, step_w = (height // size, width // size) if grid else (1, 1)
    expected = torch.empty_like(x)
    for y in range(height):
        for z in range(width):
            top, left = (y % step_h, z % step_w) if grid else (y // size * size, z // size * size)
            rows, columns = ([start + i * step for i in range(size)] for start, step in ((top, step_h), (left, step_w)))
            row, column = rows.index(y), columns.index(z)
            for head in range(heads):
                mine = slice(32 * head, 32 * head + 32)
                keys, values = (t[:, rows][:, :, columns][..., mine].flatten(1, 2) for t in (k, v))
                bias = table[head, size - 1 - row : 2 * size - 1 - row, size - 1 - column : 2 * size - 1 - column]
                logits = 32**-0.5 * torch.einsum("bc,bnc->bn", q[:, y, z, mine], keys) + bias.flatten()
                expected[:, y, z, mine] = torch.einsum("bn,bnc->bc", logits.softmax(-1), values)
    expected = F.linear(expected, module.proj.weight[:, :, 0, 0], module.proj.bias)
    torch.testing.assert_close(module(x), expected, rtol=1e-12, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("window_size", [(7, 7), (2, 5)])
def test_relative_position_bias_is_that_of_timm(window_size):
    bias, reference = RelativePositionBias(window_size, num_heads=3), RelPosBiasTf(window_size, num_heads=3)
    reference.load_state_dict(bias.state_dict())
    assert torch.equal(bias.get_bias(), reference.get_bias())
