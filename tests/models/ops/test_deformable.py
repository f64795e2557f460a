"""Agents: where they go, what they read and the bias they get, against plain loops with bilinear taps, in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from models import ops

examples = settings(derandomize=True, max_examples=15, deadline=None, database=None)
side = st.integers(1, 4)
seeds = st.integers(0, 99)


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def random_positions(*shape, seed=0):
    """Positions (..., 2) in [-1, 1], the ends included as often as they are after clamping."""
    return (1.5 * normal(*shape, 2, seed=seed)).clamp(-1, 1)


def bilinear_tap(image, y, x):
    """Value of image (rows, columns) at (y, x) in [-1, 1], -1 and 1 the centres of the outer pixels, zeros outside."""
    rows, columns = image.shape
    y, x = (y + 1) / 2 * (rows - 1), (x + 1) / 2 * (columns - 1)
    value = 0.0
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(x), math.floor(x) + 1):
            if 0 <= row < rows and 0 <= column < columns:
                value += (1 - abs(y - row)) * (1 - abs(x - column)) * float(image[row, column])
    return value


def sampled_by_loops(x, positions):
    b, _, _, c = x.shape
    _, ha, wa, g, _ = positions.shape
    out = torch.empty(b, ha, wa, c, dtype=x.dtype)
    for i in range(b):
        for row in range(ha):
            for column in range(wa):
                for channel in range(c):
                    y, z = positions[i, row, column, channel // (c // g)].tolist()
                    out[i, row, column, channel] = bilinear_tap(x[i, :, :, channel], y, z)
    return out


def bias_by_loops(table, positions, height, width):
    b, n, g, _ = positions.shape
    heads = table.shape[0]
    out = torch.empty(b, heads, height * width, n, dtype=table.dtype)
    for i in range(b):
        for head in range(heads):
            for token in range(height * width):
                token_y = token // width / (height - 1) * 2 - 1 if height > 1 else -1.0
                token_x = token % width / (width - 1) * 2 - 1 if width > 1 else -1.0
                for agent in range(n):
                    y, x = positions[i, agent, head // (heads // g)].tolist()
                    out[i, head, token, agent] = bilinear_tap(table[head], (token_y - y) / 2, (token_x - x) / 2)
    return out


def attention_by_loops(q, k, v, table, positions, num_heads, scale):
    b, height, width, c = q.shape
    channels = c // num_heads
    bias = bias_by_loops(table, positions.flatten(1, 2), height, width)
    keys, values = k.flatten(1, 2), v.flatten(1, 2)
    out = torch.empty_like(q)
    for i in range(b):
        for token in range(height * width):
            for head in range(num_heads):
                own = slice(head * channels, (head + 1) * channels)
                query = q[i, token // width, token % width, own]
                weights = [
                    torch.exp(scale * torch.dot(query, keys[i, agent, own]) + bias[i, head, token, agent])
                    for agent in range(keys.shape[1])
                ]
                total = sum(weights)
                out[i, token // width, token % width, own] = sum(
                    weight / total * value for weight, value in zip(weights, values[i, :, own], strict=True)
                )
    return out


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)


# -- positions ----------------------------------------------------------------------------------------------------


@examples
@given(height=side, width=side, groups=st.integers(1, 3), seed=seeds)
def test_agents_sit_at_cell_centres_plus_their_offset(height, width, groups, seed):
    offsets = normal(2, height, width, groups, seed=seed)
    positions = ops.agent_positions(offsets)
    assert positions.shape == (2, height, width, groups, 2)
    for i in range(height):
        for j in range(width):
            offset = offsets[:, i, j]
            close(positions[:, i, j, :, 0], ((i + 0.5) / height * 2 - 1 + offset).clamp(-1, 1))
            close(positions[:, i, j, :, 1], ((j + 0.5) / width * 2 - 1 + offset).clamp(-1, 1))


def test_zero_offsets_of_a_two_by_four_grid():
    positions = ops.agent_positions(torch.zeros(1, 2, 4, 1))[0, :, :, 0]
    assert positions[:, 0, 0].tolist() == [-0.5, 0.5]
    assert positions[0, :, 1].tolist() == [-0.75, -0.25, 0.25, 0.75]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_positions_are_never_half_precision(dtype):
    assert ops.agent_positions(torch.zeros(1, 56, 56, 1, dtype=dtype)).dtype == torch.float32


# -- sampling -----------------------------------------------------------------------------------------------------


@examples
@given(h=side, w=side, ha=side, wa=side, groups=st.integers(1, 3), channels=st.integers(1, 2), seed=seeds)
def test_sampling_equals_loops(h, w, ha, wa, groups, channels, seed):
    x, positions = normal(2, h, w, groups * channels, seed=seed), random_positions(2, ha, wa, groups, seed=seed + 1)
    close(ops.sample_agents(x, positions), sampled_by_loops(x, positions))


def test_positions_at_the_ends_read_the_corners():
    x = normal(1, 3, 5, 2)
    corners = torch.tensor([[[-1.0, -1.0], [-1.0, 1.0]], [[1.0, -1.0], [1.0, 1.0]]], dtype=torch.float64)
    agents = ops.sample_agents(x, corners[None, :, :, None].expand(1, 2, 2, 2, 2))
    close(agents, x[:, ::2, ::4])


def test_every_group_reads_its_own_channels_at_its_own_positions():
    x = normal(1, 4, 4, 6)
    positions = random_positions(1, 2, 3, 3)
    alone = [ops.sample_agents(x[..., 2 * g : 2 * g + 2], positions[:, :, :, g : g + 1]) for g in range(3)]
    close(ops.sample_agents(x, positions), torch.cat(alone, dim=-1))


def test_sampling_keeps_the_precision_of_the_map():
    x, positions = normal(1, 4, 4, 2).bfloat16(), random_positions(1, 2, 2, 1).float()
    assert ops.sample_agents(x, positions).dtype == torch.bfloat16


def test_gradients_of_sampling():
    x, positions = normal(2, 3, 4, 4).requires_grad_(), (0.4 * normal(2, 2, 2, 2, 2, seed=1)).requires_grad_()
    assert gradcheck(ops.sample_agents, (x, positions))


# -- relative position bias ---------------------------------------------------------------------------------------


@examples
@given(h=side, w=side, agents=st.integers(1, 4), groups=st.integers(1, 2), q=st.integers(1, 5), seed=seeds)
def test_bias_equals_loops(h, w, agents, groups, q, seed):
    """Also of agents outside the map, whose displacement may leave the table."""
    table, positions = (
        normal(2 * groups, 2 * q - 1, 2 * q + 1, seed=seed),
        1.5 * normal(2, agents, groups, 2, seed=-seed),
    )
    close(ops.relative_position_bias(table, positions, h, w), bias_by_loops(table, positions, h, w))


def test_agent_on_a_token_reads_the_table_by_whole_cells():
    """At the size a table is made for, one token step is one cell, and zero displacement its centre."""
    q = 4
    table = normal(1, 2 * q - 1, 2 * q - 1)
    tokens = torch.linspace(-1, 1, q, dtype=torch.float64)
    positions = torch.stack(torch.meshgrid(tokens, tokens, indexing="ij"), dim=-1).view(1, q * q, 1, 2)
    bias = ops.relative_position_bias(table, positions, q, q).view(q, q, q, q)  # token y, x, agent y, x
    y, x, agent_y, agent_x = torch.meshgrid(*[torch.arange(q)] * 4, indexing="ij")
    close(bias, table[0, y - agent_y + q - 1, x - agent_x + q - 1])


def test_heads_follow_their_groups_in_order():
    table, positions = normal(4, 5, 5), random_positions(1, 3, 2)
    bias = ops.relative_position_bias(table, positions, 2, 3)
    for group in range(2):
        own = slice(2 * group, 2 * group + 2)
        close(bias[:, own], ops.relative_position_bias(table[own], positions[:, :, group : group + 1], 2, 3))


def test_gradients_of_the_bias():
    table, positions = normal(2, 5, 3).requires_grad_(), (0.4 * normal(2, 2, 2, 2, seed=1)).requires_grad_()
    assert gradcheck(lambda t, p: ops.relative_position_bias(t, p, 2, 3), (table, positions))


# -- attention ----------------------------------------------------------------------------------------------------


@examples
@given(h=side, w=side, ha=side, wa=side, groups=st.integers(1, 2), heads=st.integers(1, 2), seed=seeds)
def test_deformable_attention_equals_loops(h, w, ha, wa, groups, heads, seed):
    heads *= groups
    c = 2 * heads
    q, k, v = normal(2, h, w, c, seed=seed), normal(2, ha, wa, c, seed=seed + 1), normal(2, ha, wa, c, seed=seed + 2)
    table, positions = normal(heads, 5, 7, seed=seed), random_positions(2, ha, wa, groups, seed=seed)
    arguments = (q, k, v, table, positions, heads, 0.6)
    close(ops.deformable_attention(*arguments), attention_by_loops(*arguments))


def test_one_agent_gives_every_token_its_value():
    q, v = normal(1, 2, 3, 4), normal(1, 1, 1, 4, seed=1)
    out = ops.deformable_attention(q, v, v, normal(2, 3, 3), random_positions(1, 1, 1, 1), 2, 1.0)
    close(out, v.expand_as(q))


def test_gradients_of_deformable_attention():
    q, k, v = normal(1, 2, 3, 4), normal(1, 2, 2, 4, seed=1), normal(1, 2, 2, 4, seed=2)
    table, positions = normal(2, 5, 5), 0.4 * normal(1, 2, 2, 2, 2, seed=3)
    inputs = [x.requires_grad_() for x in (q, k, v, table, positions)]
    assert gradcheck(lambda *x: ops.deformable_attention(*x, num_heads=2, scale=0.5), inputs)


def test_agents_at_no_number_read_no_number():
    agents = ops.sample_agents(torch.ones(1, 3, 4, 2), torch.full((1, 1, 1, 1, 2), torch.nan))
    assert agents.isnan().all()
