"""The choice of a backend: what is taken when nothing is asked for, what is refused and why, what is logged."""

import logging

import pytest
import timm
import torch
from golden.compare import relative_error
from golden.fill import fill, images
from support import command

import models  # noqa: F401
from models import ops
from models.ops import backend as backends

CUDA = pytest.param("cuda", marks=pytest.mark.gpu)


def attend(dtype=torch.float32, head_dim=16, device="cpu", **options):
    x = torch.ones(1, 4, 1, 2 * head_dim, dtype=dtype, device=device)
    idx = torch.zeros(1, 4, 1, dtype=torch.int64, device=device)
    return ops.routed_attention(x, x, x, idx, (4, 1), 2, 1.0, **options)


@pytest.fixture
def messages(monkeypatch, caplog):
    """What is logged, as if by a fresh process."""
    monkeypatch.setattr(backends, "_logged", set())
    monkeypatch.delenv("DEBIFORMER_BACKEND", raising=False)
    caplog.set_level(logging.INFO, logger="models.ops.backend")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "models.ops.backend"]


def test_automatic_choice_is_logged_once_with_its_reason(messages, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for _ in range(3):
        attend()
    assert messages() == ["attention backend: torch (Triton is for GPUs)"]


def test_interpreter_is_never_chosen_by_itself(messages, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    attend()
    assert messages() == ["attention backend: torch (Triton is for GPUs)"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_triton_is_chosen_on_a_gpu(messages):
    attend(device="cuda")
    attend(torch.float64, device="cuda")
    assert [message.split()[2] for message in messages()] == ["triton", "torch"]


@pytest.mark.parametrize("name", ["reference", "torch"])
def test_environment_overrides_the_automatic_choice_and_an_argument_overrides_it(name, messages, monkeypatch):
    monkeypatch.setenv("DEBIFORMER_BACKEND", name)
    attend()
    assert messages() == [f"attention backend: {name} (DEBIFORMER_BACKEND)"]
    other = {"reference": "torch", "torch": "reference"}[name]
    attend(backend=other)
    assert messages()[1:] == [f"attention backend: {other} (backend)"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"backend": "triton", "dtype": torch.float64}, "backend 'triton' cannot run: .* not in float64; use 'torch'"),
        ({"backend": "triton", "head_dim": 129}, "cannot run: its heads have at most 128 channels"),
        ({"backend": "cuda"}, "backend must be one of reference, torch, triton, export, not 'cuda'"),
    ],
)
def test_backend_that_cannot_run_is_refused_with_the_reason(arguments, reason):
    with pytest.raises(ValueError, match=reason):
        attend(**arguments)


def test_triton_on_the_cpu_is_refused_without_its_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="cannot run: Triton does not run on cpu tensors"):
        attend(backend="triton")
    monkeypatch.setenv("DEBIFORMER_BACKEND", "triton")
    with pytest.raises(ValueError, match="DEBIFORMER_BACKEND 'triton' cannot run"):
        attend()
    monkeypatch.setenv("DEBIFORMER_BACKEND", "fast")
    with pytest.raises(
        ValueError, match="DEBIFORMER_BACKEND must be one of reference, torch, triton, export, not 'fast'"
    ):
        attend()


def test_large_heads_and_double_precision_go_to_torch_by_themselves(messages):
    attend(head_dim=129)
    attend(torch.float64)
    assert {message.split()[2] for message in messages()} == {"torch"}


@pytest.mark.parametrize("device", [CUDA if torch.cuda.is_available() else "cpu"])
@pytest.mark.parametrize("name", ["torch", "triton"])
def test_models_give_the_same_outputs_and_gradients_with_every_backend(name, device, monkeypatch):
    """debiformer_nano holds both attentions; float32 against the reference backend in float64."""
    size = {"n_win": 2, "embed_dims": (16, 32, 48, 64), "depths": (1, 1, 1, 1), "num_classes": 5}

    def run(backend, dtype):
        monkeypatch.setenv("DEBIFORMER_BACKEND", backend)
        model = fill(timm.create_model("debiformer_nano", **size)).to(device, dtype)
        out = model(images(1, 32, 32).to(device, dtype))
        out.square().mean().backward()
        return out.cpu(), {key: parameter.grad.cpu() for key, parameter in model.named_parameters()}

    (expected, expected_grads), (actual, grads) = run("reference", torch.float64), run(name, torch.float32)
    assert relative_error(actual, expected) < 1e-5
    largest = max(grad.norm() for grad in expected_grads.values())
    for key, grad in expected_grads.items():
        assert (grads[key].double() - grad).norm() < 1e-4 * grad.norm() + 1e-6 * largest, key


@torch.no_grad()
@pytest.mark.parametrize("size", [(64, 64), (70, 37)])
@pytest.mark.parametrize("name", ["debiformer_nano", "biformer_tiny", "biformer_stl_nchw"])
def test_models_give_the_same_outputs_as_programs_for_export(name, size):
    model = fill(timm.create_model(name, embed_dims=(16, 32, 48, 64), depths=(1, 1, 1, 1), num_heads=(1, 2, 3, 4)))
    model = model.double()
    x = images(2, *size)
    with backends.use_backend("reference"):
        expected = model(x)
    with backends.use_backend("export"):
        torch.testing.assert_close(model(x), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.slow
def test_kernels_compile_for_a_gpu_and_keep_their_numbers_in_registers():
    """Compiling needs no GPU. Each line: kernel, bytes of shared memory, bytes spilled from registers."""
    done = command("tests/models/ops/compile_kernels.py", TRITON_INTERPRET="0", PYTHONPATH=".:tests")
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len({kernel for kernel, *_ in lines}) == 24
    for kernel, shared, spilled, *_ in lines:
        # What a program may use on every GPU since compute capability 8.0, or on those that are asked.
        assert int(shared) <= (112 if kernel == "masked.backward" else 99) * 1024, kernel
        assert int(spilled) == 0, kernel
