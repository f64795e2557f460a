"""Which of three implementations runs an attention: "reference", "torch" or "triton".

None asks for the fastest that can run; the environment variable DEBIFORMER_BACKEND then speaks first. The choice is
logged once per outcome. A backend asked for by name that cannot run is an error that says why.
"""

import importlib.util
import logging
import os
import shutil

import torch
from torch import Tensor

BACKENDS = ("reference", "torch", "triton")
ENVIRONMENT = "DEBIFORMER_BACKEND"
WORKSPACE = 64 * 2**20
"""Bytes of gathered windows, logits or biases that an attention may hold at a time, beyond its inputs and outputs."""

_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_TRITON_LARGEST_HEAD = 128
_logger = logging.getLogger(__name__)
_logged: set[str] = set()


def choose_backend(requested: str | None, q: Tensor, num_heads: int) -> str:
    """The backend that will run an attention with queries like `q` (..., C), split into `num_heads` heads.

    requested: a name in `BACKENDS`, or None. ValueError for an unknown name, or one that cannot run here.
    """
    return _choose(requested, q.device, q.dtype, int(q.shape[-1]) // num_heads)


# torch.compile calls this while it traces and takes the answer as a constant: it must not trace into the checks.
@torch.compiler.assume_constant_result
def _choose(requested: str | None, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    asker = "backend"
    if requested is None and os.environ.get(ENVIRONMENT):
        requested, asker = os.environ[ENVIRONMENT], ENVIRONMENT
    if requested is not None and requested not in BACKENDS:
        raise ValueError(f"{asker} must be one of {', '.join(BACKENDS)}, not {requested!r}")

    obstacle = None if requested in ("reference", "torch") else triton_obstacle(device, dtype, head_dim)
    if requested == "triton" and obstacle:
        raise ValueError(f"{asker} 'triton' cannot run: {obstacle}; use 'torch' or leave the choice open")
    if requested is not None:
        _log_once(f"attention backend: {requested} ({asker})")
        return requested
    if device.type != "cuda" and not obstacle:
        obstacle = "Triton's interpreter runs only when asked for"
    name, reason = ("torch", obstacle) if obstacle else ("triton", "fastest here")
    _log_once(f"attention backend: {name} ({reason})")
    return name


def triton_obstacle(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why the triton backend cannot run on such tensors; None if it can."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if dtype not in _TRITON_DTYPES:
        return f"it computes in float32, bfloat16 and float16, not in {str(dtype).removeprefix('torch.')}"
    if head_dim > _TRITON_LARGEST_HEAD:
        return f"its heads have up to {_TRITON_LARGEST_HEAD} channels, not {head_dim}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if interpreted:
        return None
    if device.type != "cuda":
        return f"Triton does not run on {device.type} tensors (with TRITON_INTERPRET=1, slowly, on cpu)"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs a GPU of compute capability 8.0"
    if not (os.environ.get("CC") or any(map(shutil.which, ("cc", "gcc", "clang")))):
        return "Triton needs a C compiler and found none"
    return None


def _log_once(message: str) -> None:
    if message not in _logged:
        _logged.add(message)
        _logger.info(message)
