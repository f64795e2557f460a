"""Maps of attention reproduce what forward makes of the values."""

import pytest
import torch
from golden.fill import fill

from models import ops
from models.attention import FullAttention
from models.layers import to_nchw, to_nhwc
from models.partition_attention import PartitionAttention
from models.stl import PooledRoutingAttention

SIZES = [(6, 6), (7, 8), (3, 3)]


def random_map(height, width, channels):
    generator = torch.Generator().manual_seed(height)
    return torch.randn(1, height, width, channels, dtype=torch.float64, generator=generator)


def read(maps, values, row, column):
    """What a token reads of the values (H, W, C), by the maps of its heads."""
    heads = maps.token_attention(row, column)
    parts = values.chunk(maps.num_heads, -1)
    return torch.cat([torch.einsum("yx,yxc->c", head, part) for head, part in zip(heads, parts, strict=True)])


def check(module, x, values, lepe, project):
    maps, out = module.attention_maps(x), module(x)[0]
    assert maps.tokens == x.shape[1:3]
    for row in range(x.shape[1]):
        for column in range(x.shape[2]):
            assert maps.token_attention(row, column).sum((1, 2)).tolist() == pytest.approx([1.0] * maps.num_heads)
            expected = project((read(maps, values, row, column) + lepe[row, column])[None, None, None])
            torch.testing.assert_close(out[row, column], expected.flatten(), rtol=1e-10, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("grid", [False, True])
def test_partition_maps_reproduce_forward(size, grid):
    module, x = fill(PartitionAttention(64, 3, grid)), random_map(*size, 64)
    values = to_nhwc(module.qkv(to_nchw(ops.pad_to_multiple(x, 3)))).chunk(3, -1)[2][0]
    check(module, x, values, torch.zeros_like(values), lambda t: module.proj(to_nchw(t)))


@torch.no_grad()
@pytest.mark.parametrize("size", [(8, 8), (7, 7), (3, 3)], ids=str)
def test_pooled_routing_maps_reproduce_forward(size):
    module, x = fill(PooledRoutingAttention(8, 2, n_win=3, topk=2)), random_map(*size, 8)
    v = module.qkv_linear(x).chunk(3, -1)[2]
    lepe = module.lepe(v)[0]
    window = ops.split_side(size[0], 3)[0]
    check(module, x, ops.pad_to_multiple(v, window)[0], lepe, module.output_linear)


@torch.no_grad()
def test_plain_maps_reproduce_forward():
    module, x = fill(FullAttention(12, 3)), random_map(4, 5, 12)
    lepe = module.lepe(x)[0]
    check(module, x, module.qkv(x).chunk(3, -1)[2][0], lepe, module.proj)


def test_maps_are_of_one_image_in_float32_at_least():
    module = FullAttention(8, 2)
    with pytest.raises(ValueError, match=r"those of one image.* batch of 2"):
        module.attention_maps(torch.zeros(2, 4, 4, 8))
    maps = module.bfloat16().attention_maps(torch.zeros(1, 4, 4, 8, dtype=torch.bfloat16))
    assert maps.token_attention(0, 0).dtype == torch.float32


def test_pooled_maps_need_as_many_rows_as_columns_of_windows():
    with pytest.raises(ValueError, match="4x3 windows cannot be shown"):
        PooledRoutingAttention(8, 2, n_win=3, topk=2).attention_maps(torch.zeros(1, 7, 6, 8))
