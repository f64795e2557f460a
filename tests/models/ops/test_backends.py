"""Every backend against the reference in float64, outputs and all gradients; and what each promises besides.

Without a GPU the triton backend runs in Triton's interpreter; with one, the same tests run compiled, marked `gpu`.
"""

import onnxruntime
import pytest
import torch
from attention_cases import (
    DEFORMABLE,
    DEVICES,
    DTYPES,
    ROUTED,
    Deformable,
    Routed,
    error,
    on_device,
    outputs_and_gradients,
    truth,
)
from torch.library import opcheck

from models.ops import deformable, routed

ALL = [*ROUTED, *DEFORMABLE]
SMALL = [pytest.param(Routed(2, (2, 2), (3, 1), (1, 5), 2, 16, 2), id="routed")]
SMALL += [pytest.param(Deformable(2, (3, 4), (2, 3), 2, 16, 1, (3, 4)), id="deformable")]
on_devices = pytest.mark.parametrize("device", DEVICES)
by_fast_backends = pytest.mark.parametrize("backend", ["torch", "triton"])


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


# -- precision ----------------------------------------------------------------------------------------------------


@on_devices
@by_fast_backends
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("case", ALL)
def test_errors_are_at_most_twice_those_of_pytorch(case, dtype, backend, device):
    """PyTorch's own kernel for CPUs errs more where it is given a bias, as "torch" does."""
    factor = 4 if (backend, device) == ("torch", "cpu") else 2
    expected = truth(case, dtype)
    pytorch = outputs_and_gradients(case, "reference", dtype, device)
    actual = outputs_and_gradients(case, backend, dtype, device)
    for name, a, p, e in zip(("out", "q", "k", "v", "table", "positions"), actual, pytorch, expected, strict=False):
        assert a.dtype == p.dtype
        assert a.shape == p.shape
        assert error(a, e) <= factor * error(p, e) + 0.1 * torch.finfo(dtype).eps * float(e.norm()), name


@pytest.mark.parametrize("case", ALL)
@pytest.mark.parametrize("workspace", [1, 20_000, 2**26])
def test_torch_equals_the_reference_in_double_precision_in_any_workspace(case, workspace):
    actual = outputs_and_gradients(case, "torch", torch.float64, workspace=workspace)
    for a, e in zip(actual, truth(case, torch.float64), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("case", ALL)
def test_export_equals_the_reference_in_double_precision(case):
    """All but the gradient of positions: agents at the map's ends read at a cell, where hats have no derivative."""
    actual, expected = outputs_and_gradients(case, "export", torch.float64), truth(case, torch.float64)
    for a, e in list(zip(actual, expected, strict=True))[:5]:
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-12)


@on_devices
@pytest.mark.parametrize("case", DEFORMABLE)
def test_workspace_of_the_table_gradient_changes_nothing_but_rounding(case, device):
    whole, parts = (outputs_and_gradients(case, "triton", torch.float32, device, workspace=n) for n in (2**26, 1))
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@on_devices
@by_fast_backends
@pytest.mark.parametrize("case", ALL)
def test_two_runs_give_the_same_bits(case, backend, device):
    first, second = (outputs_and_gradients(case, backend, torch.float32, device) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


# -- layouts and masks --------------------------------------------------------------------------------------------


@on_devices
@by_fast_backends
@pytest.mark.parametrize("case", SMALL)
def test_inputs_may_be_parts_of_one_tensor(case, backend, device):
    """q, k and v as one projection yields them: the same numbers as apart, in forward and backward."""
    tensors, fixed = on_device(case.inputs(0), device)
    tensors = [x.float() for x in tensors]
    if isinstance(case, Deformable):
        joined = torch.cat(tensors[1:3], dim=-1).requires_grad_()
        views = [tensors[0], *joined.chunk(2, dim=-1)]
    else:
        tensors[0] = tensors[1]
        joined = torch.cat(tensors, dim=-1).requires_grad_()
        views = list(joined.chunk(3, dim=-1))
    apart = [x.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for x in views]
    grads = []
    for start in (views, apart):
        out = case.call([*start, *tensors[3:]], fixed, backend)
        grads.append([out, *torch.autograd.grad(out.square().sum(), joined if start is views else apart[-2:])])
    assert torch.equal(grads[0][0], grads[1][0])
    assert torch.equal(grads[0][1][..., -case.heads * case.head_dim :], grads[1][-1])


@on_devices
@pytest.mark.parametrize(("windows", "topk"), [(1, 1), (9, 1), (9, 9), (40, 30)])
def test_every_window_is_told_who_reads_it(windows, topk, device):
    from models.ops.routed_triton import invert_routes

    idx = torch.randint(windows, (2, windows, topk), generator=torch.Generator().manual_seed(topk))
    readers, first = (x.tolist() for x in invert_routes(idx.to(device)))
    assert first[0] == 0
    assert first[-1] == len(readers) == idx.numel()
    for image in range(2):
        for window in range(windows):
            j = image * windows + window
            expected = [p for p in range(windows) for i in idx[image, p].tolist() if i == window]
            assert readers[first[j] : first[j + 1]] == expected


# -- memory -------------------------------------------------------------------------------------------------------


@on_devices
@by_fast_backends
@pytest.mark.parametrize("case", SMALL)
def test_backward_keeps_the_inputs_and_no_copies_of_windows_or_biases(case, backend, device):
    tensors, fixed = on_device(case.inputs(0), device)
    tensors = [x.float().requires_grad_() for x in tensors]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        out = case.call(tensors, fixed, backend)
    inputs = {x.data_ptr() for x in tensors}
    extra = [x for x in kept if x.data_ptr() not in inputs and x.is_floating_point()]
    rows = out.numel() // case.head_dim
    assert sum(x.numel() for x in extra) <= out.numel() + rows  # the output, and one number per query and head


# -- operators ----------------------------------------------------------------------------------------------------


@on_devices
@by_fast_backends
@pytest.mark.parametrize("case", SMALL)
def test_operators_keep_what_torch_asks_of_them(case, backend, device):
    tensors, fixed = on_device(case.inputs(0), device)
    tensors = [x.float().requires_grad_() for x in tensors]
    windows = case.windows if isinstance(case, Routed) else ()
    operator = (routed if isinstance(case, Routed) else deformable)._attend
    opcheck(operator.registered, (*tensors, *fixed, *windows, case.heads, 0.25, backend, 2**20))


@on_devices
@by_fast_backends
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("case", SMALL)
def test_compiled_graphs_hold_one_operator(case, dynamic, backend, device):
    tensors, fixed = on_device(case.inputs(0), device)
    tensors = [x.float() for x in tensors]
    called = []

    def record(graph, _):
        called.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *x: case.call(list(x), fixed, backend), backend=record, fullgraph=True, dynamic=dynamic
    )
    assert torch.equal(compiled(*tensors), case.call(tensors, fixed, backend))
    assert sum("debiformer" in str(target) for target in called) == 1
    assert not any("attention" in str(target) and "debiformer" not in str(target) for target in called)


@on_devices
@by_fast_backends
@pytest.mark.parametrize("case", SMALL)
def test_exported_programs_hold_one_operator(case, backend, device):
    tensors, fixed = on_device(case.inputs(0), device)
    tensors = tuple(x.float() for x in tensors)

    class Attention(torch.nn.Module):
        def forward(self, *x):
            return case.call(list(x), fixed, backend)

    program = torch.export.export(Attention(), tensors)
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert [name for name in names if "getitem" not in name] == [
        f"debiformer.{type(case).__name__.lower()}_attention.default"
    ]
    assert torch.equal(program.module()(*tensors), case.call(list(tensors), fixed, backend))


@pytest.mark.parametrize("case", SMALL)
def test_torch_onnx_takes_operators_apart(case, tmp_path):
    tensors, fixed = case.inputs(0)
    tensors = tuple(x.float() for x in tensors)

    class Attention(torch.nn.Module):
        def forward(self, *x):
            return case.call(list(x), fixed, "torch")

    torch.onnx.export(Attention().eval(), tensors, tmp_path / "attention.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "attention.onnx", providers=["CPUExecutionProvider"])
    given = {part.name: x.numpy() for part, x in zip(session.get_inputs(), tensors, strict=True)}
    actual = torch.from_numpy(session.run(None, given)[0])
    torch.testing.assert_close(actual, case.call(list(tensors), fixed, "torch"), rtol=1e-5, atol=1e-5)
