"""Which implementation runs an attention: "reference", "torch" or "triton"; "export" in programs for other runtimes.

None asks for the fastest that can run; the environment variable DEBIFORMER_BACKEND then speaks first. The choice is
logged once per outcome. A backend asked for by name that cannot run is an error that says why. While torch.onnx exports
a module, it is always "export".
"""

import contextlib
import functools
import importlib.util
import logging
import os
import shutil
from collections.abc import Iterator

import torch
from torch import Tensor

BACKENDS = ("reference", "torch", "triton", "export")
ENVIRONMENT = "DEBIFORMER_BACKEND"
WORKSPACE = 64 * 2**20
"""Bytes of gathered windows, logits or biases that an attention may hold at a time, beyond its inputs and outputs."""

_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TRITON_LARGEST_HEAD = 128
"""Channels per head that the triton backend takes at most."""
_logger = logging.getLogger(__name__)
_logged: set[str] = set()


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Within the block, attentions that are free to choose take this backend; None leaves the choice as it is."""
    before = os.environ.get(ENVIRONMENT)
    if name is not None:
        os.environ[ENVIRONMENT] = name
    try:
        yield
    finally:
        os.environ.pop(ENVIRONMENT, None)
        if before is not None:
            os.environ[ENVIRONMENT] = before


def choose_backend(requested: str | None, q: Tensor, num_heads: int | None = None) -> str:
    """The backend that will run an attention with queries like `q` (..., C), split into `num_heads` heads.

    Without heads: that of what is done with a map besides.

    requested: a name in `BACKENDS`, or None. ValueError for an unknown name, or one that cannot run here.
    """
    if torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export():  # ONNX knows no operators of this project
        return "export"
    # Decided here, where a symbolic width is guarded; `_choose` takes constants.
    size_obstacle = (
        f"its heads have at most {TRITON_LARGEST_HEAD} channels"
        if num_heads is not None and q.shape[-1] > TRITON_LARGEST_HEAD * num_heads
        else None
    )
    return _choose(requested, q.device, q.dtype, size_obstacle)


# torch.compile calls this while it traces and takes the answer as a constant: it must not trace into the checks.
@torch.compiler.assume_constant_result
def _choose(requested: str | None, device: torch.device, dtype: torch.dtype, size_obstacle: str | None) -> str:
    asker = "backend"
    if requested is None and os.environ.get(ENVIRONMENT):
        requested, asker = os.environ[ENVIRONMENT], ENVIRONMENT
    if requested is not None and requested not in BACKENDS:
        raise ValueError(f"{asker} must be one of {', '.join(BACKENDS)}, not {requested!r}")

    unhindered = requested is not None and requested != "triton"
    obstacle = None if unhindered else size_obstacle or triton_obstacle(device, dtype)
    if requested == "triton" and obstacle:
        raise ValueError(f"{asker} 'triton' cannot run: {obstacle}; use 'torch' or leave the choice open")
    if requested is not None:
        _log_once(f"attention backend: {requested} ({asker})")
        return requested
    if device.type != "cuda":
        obstacle = "Triton is for GPUs"  # its interpreter runs only when asked for
    name, reason = ("torch", obstacle) if obstacle else ("triton", "fastest here")
    _log_once(f"attention backend: {name} ({reason})")
    return name


def triton_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the triton backend cannot run on such tensors, whatever their sizes; None if it can."""
    if dtype not in _TRITON_DTYPES:
        return f"it computes in float32, bfloat16 and float16, not in {str(dtype).removeprefix('torch.')}"
    if os.environ.get("TRITON_INTERPRET") == "1" and device.type in ("cpu", "cuda"):
        return None if importlib.util.find_spec("triton") else "Triton is not installed"
    if device.type != "cuda":
        return f"Triton does not run on {device.type} tensors (with TRITON_INTERPRET=1, slowly, on cpu)"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs a GPU of compute capability 8.0"
    return _installation_obstacle()


@functools.cache
def _installation_obstacle() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if not (os.environ.get("CC") or any(map(shutil.which, ("cc", "gcc", "clang")))):
        return "Triton needs a C compiler and found none"
    return None


def _log_once(message: str) -> None:
    if message not in _logged:
        _logged.add(message)
        _logger.info(message)
