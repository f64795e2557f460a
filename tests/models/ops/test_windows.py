"""Windows: where every token goes, and that nothing is lost."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models import ops

examples = settings(derandomize=True, max_examples=25, deadline=None, database=None)
small = st.integers(1, 4)


def numbered_map(*shape):
    """A map whose every number is different."""
    size = torch.Size(shape)
    return torch.arange(size.numel()).view(size)


@examples
@given(b=small, n_win=small, h=small, w=small, c=small)
def test_windows_and_their_tokens_are_row_major(b, n_win, h, w, c):
    x = numbered_map(b, n_win * h, n_win * w, c)
    windows = ops.to_windows(x, n_win)
    assert windows.shape == (b, n_win**2, h * w, c)
    for row in range(n_win):
        for column in range(n_win):
            for y in range(h):
                for z in range(w):
                    token = windows[:, row * n_win + column, y * w + z]
                    assert torch.equal(token, x[:, row * h + y, column * w + z])


@examples
@given(b=small, n_win=small, h=small, w=small, c=small)
def test_from_windows_undoes_to_windows(b, n_win, h, w, c):
    x = numbered_map(b, n_win * h, n_win * w, c)
    assert torch.equal(ops.from_windows(ops.to_windows(x, n_win), n_win, n_win * h, n_win * w), x)


def test_rows_and_columns_of_windows_may_differ():
    x = numbered_map(2, 4, 9, 5)
    windows = ops.to_windows(x, (2, 3))
    assert windows.shape == (2, 6, 6, 5)
    assert torch.equal(windows[:, 4], x[:, 2:4, 3:6].flatten(1, 2))
    assert torch.equal(ops.from_windows(windows, (2, 3), 4, 9), x)


@examples
@given(side=st.integers(1, 200), n_win=st.integers(1, 16))
def test_split_side_is_covered_by_at_least_so_many_windows(side, n_win):
    window, count = ops.split_side(side, n_win)
    assert (count - 1) * window < side <= count * window
    assert count >= min(side, n_win)
    assert window == max(1, side // n_win)


@examples
@given(height=st.integers(1, 9), width=st.integers(1, 9), window_h=small, window_w=small)
def test_pooled_windows_are_means_of_what_lies_on_the_map(height, width, window_h, window_w):
    window_h, window_w = min(window_h, height), min(window_w, width)
    x = numbered_map(2, height, width, 3).double()
    expected = [
        x[:, y : y + window_h, z : z + window_w].mean((1, 2))
        for y in range(0, height, window_h)
        for z in range(0, width, window_w)
    ]
    torch.testing.assert_close(ops.pool_windows(x, (window_h, window_w)), torch.stack(expected, dim=1))


def test_windows_of_a_transposed_view():
    x = numbered_map(2, 3, 4, 6).permute(0, 2, 3, 1)  # (B, H, W, C) as a view of (B, C, H, W)
    assert torch.equal(ops.to_windows(x, 2), ops.to_windows(x.contiguous(), 2))


@examples
@given(height=st.integers(1, 9), width=st.integers(1, 9), multiple=st.integers(1, 5), trailing=st.integers(0, 2))
def test_padding_adds_the_least_zeros_right_and_bottom(height, width, multiple, trailing):
    x = numbered_map(2, height, width, *(3,) * trailing) + 1
    padded = ops.pad_to_multiple(x, multiple)
    for side, before in zip(padded.shape[1:3], (height, width), strict=True):
        assert side % multiple == 0
        assert before <= side < before + multiple
    assert padded.shape[3:] == x.shape[3:]
    assert padded.dtype == x.dtype
    assert torch.equal(padded[:, :height, :width], x)
    assert padded.count_nonzero() == x.count_nonzero()


def test_height_and_width_may_be_padded_to_different_multiples():
    assert ops.pad_to_multiple(torch.zeros(1, 5, 5, 2), (4, 3)).shape == (1, 8, 6, 2)


def test_map_that_fits_is_returned_itself():
    x = torch.randn(1, 4, 6, 3)
    assert ops.pad_to_multiple(x, 2) is x


def test_padding_is_cropped_in_the_gradient():
    x = torch.randn(1, 3, 5, 2, requires_grad=True)
    ops.pad_to_multiple(x, 4).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
