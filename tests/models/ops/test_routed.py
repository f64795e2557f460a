"""Routing and routed attention against plain loops, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from models import ops

examples = settings(derandomize=True, max_examples=25, deadline=None, database=None)


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def random_idx(b, p, k, seed=0):
    """Different window numbers for each window."""
    return torch.rand(b, p, p, generator=torch.Generator().manual_seed(seed)).topk(k).indices


def attend_rows(q, k, v, idx, *options):
    """Maps whose windows are their rows: (B, P, w, C)."""
    return ops.routed_attention(q, k, v, idx, (q.shape[1], 1), *options)


def attention_by_loops(q, k, v, idx, num_heads, scale):
    b, p, w_q, c = q.shape
    width = c // num_heads
    out = torch.empty_like(q)
    for i in range(b):
        for window in range(p):
            for token in range(w_q):
                for head in range(num_heads):
                    own = slice(head * width, (head + 1) * width)
                    weights, values = [], []
                    for routed in idx[i, window].tolist():
                        for key, value in zip(k[i, routed], v[i, routed], strict=True):
                            weights.append(torch.exp(scale * torch.dot(q[i, window, token, own], key[own])))
                            values.append(value[own])
                    total = sum(weights)
                    out[i, window, token, own] = sum(
                        weight / total * value for weight, value in zip(weights, values, strict=True)
                    )
    return out


@examples
@given(
    b=st.integers(1, 2),
    p=st.integers(1, 4),
    w=st.integers(1, 3),
    w_q=st.integers(1, 4),
    data=st.data(),
    num_heads=st.integers(1, 3),
    width=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_routed_attention_equals_loops(b, p, w, w_q, data, num_heads, width, seed):
    """Any number of query tokens per window."""
    c, k = num_heads * width, data.draw(st.integers(1, p))
    q, keys, values = normal(b, p, w_q, c, seed=seed), normal(b, p, w, c, seed=seed + 1), normal(b, p, w, c, seed=-seed)
    idx = random_idx(b, p, k, seed)
    out = attend_rows(q, keys, values, idx, num_heads, 0.7)
    torch.testing.assert_close(out, attention_by_loops(q, keys, values, idx, num_heads, 0.7), rtol=1e-12, atol=1e-12)


def test_one_routed_window_is_attention_to_that_window():
    q, k, v = normal(1, 3, 2, 4), normal(1, 3, 5, 4, seed=1), normal(1, 3, 5, 4, seed=2)
    idx = torch.tensor([[[2], [2], [0]]])
    expected = torch.stack([(q[0, p] @ k[0, i].T * 0.5).softmax(-1) @ v[0, i] for p, i in enumerate([2, 2, 0])])[None]
    torch.testing.assert_close(attend_rows(q, k, v, idx, 1, 0.5), expected, rtol=1e-12, atol=1e-12)


def test_all_windows_in_any_order_are_full_attention():
    b, p, w, c = 2, 4, 3, 6
    q, k, v = (normal(b, p, w, c, seed=seed) for seed in range(3))
    flat_q, flat_k, flat_v = (x.reshape(b, p * w, c) for x in (q, k, v))
    expected = ((flat_q @ flat_k.mT * 0.3).softmax(-1) @ flat_v).view(b, p, w, c)
    orders = torch.stack([torch.randperm(p, generator=torch.Generator().manual_seed(i)) for i in range(b * p)])
    out = attend_rows(q, k, v, orders.view(b, p, p), 1, 0.3)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


def test_windows_of_rows_and_columns_are_those_of_to_windows():
    q, k, v = (normal(2, 6, 4, 4, seed=seed) for seed in range(3))
    idx = random_idx(2, 6, 2)
    expected = attend_rows(*(ops.to_windows(x, (3, 2)) for x in (q, k, v)), idx, 2, 0.5)
    out = ops.routed_attention(q, k, v, idx, (3, 2), 2, 0.5)
    torch.testing.assert_close(ops.to_windows(out, (3, 2)), expected, rtol=1e-12, atol=1e-12)


def test_gradients_of_routed_attention():
    q, k, v = (normal(2, 3, w, 4, seed=w).requires_grad_() for w in (1, 2, 2))
    idx = torch.tensor([[[0, 2], [2, 1], [1, 0]], [[1, 2], [0, 2], [2, 1]]])
    assert gradcheck(lambda *x: attend_rows(*x, idx, 2, 0.5), (q, k, v))


def test_inputs_may_be_views():
    b, p, w, c = 2, 4, 3, 4
    q, k, v = normal(b, p, w, 3 * c).chunk(3, dim=-1)
    idx = random_idx(b, p, 2)
    out = attend_rows(q, k, v, idx, 2, 1.0)
    assert torch.equal(out, attend_rows(q.contiguous(), k.contiguous(), v.contiguous(), idx, 2, 1.0))


@examples
@given(b=st.integers(1, 2), p=st.integers(1, 6), c=st.integers(1, 4), data=st.data(), seed=st.integers(0, 99))
def test_routing_keeps_the_windows_of_highest_affinity_in_order(b, p, c, data, seed):
    topk = data.draw(st.integers(1, p))
    q, k = normal(b, p, c, seed=seed), normal(b, p, c, seed=seed + 1)
    logits, idx = ops.route_windows(q, k, topk, scale=0.5)
    assert logits.shape == idx.shape == (b, p, topk)
    assert idx.dtype == torch.int64
    for i in range(b):
        for window in range(p):
            affinities = [0.5 * float(torch.dot(q[i, window], k[i, other])) for other in range(p)]
            order = sorted(range(p), key=lambda other, a=affinities: -a[other])[:topk]
            assert idx[i, window].tolist() == order
            assert logits[i, window].tolist() == pytest.approx([affinities[other] for other in order], rel=1e-12)


def test_routing_takes_no_part_in_autograd():
    q, k = normal(1, 4, 3).requires_grad_(), normal(1, 4, 3, seed=1).requires_grad_()
    logits, _ = ops.route_windows(q, k, 2, 1.0)
    assert not logits.requires_grad
