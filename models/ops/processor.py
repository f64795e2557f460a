"""What this machine's processor is good at."""

import functools
import os
import platform
import re
from pathlib import Path

import torch

ENVIRONMENT = "DEBIFORMER_MKL"
_NEWEST_AMD_FAMILY = 25
"""The last family of AMD's processors (Zen 3 and 4) that MKL has fast code for."""


@functools.cache
def mkl_is_fast() -> bool:
    """Whether PyTorch's matrix products, which are MKL's, are as fast here as oneDNN's.

    Told by what the processor is, not measured, so that all processes of a run, and a run that goes on, compute alike;
    the environment variable DEBIFORMER_MKL (1 or 0) speaks first.
    """
    if (asked := os.environ.get(ENVIRONMENT)) is not None:
        return asked != "0"
    family = amd_family(_description())
    return torch.backends.mkl.is_available() and (family is None or family <= _NEWEST_AMD_FAMILY)


def amd_family(description: str) -> int | None:
    """The family of an AMD processor, by how Linux or Windows describes it; None for another one."""
    if "AuthenticAMD" not in description:
        return None
    found = re.search(r"family\s*:?\s*(\d+)", description, re.IGNORECASE)
    return int(found[1]) if found else None


def _description() -> str:
    try:
        return Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    except OSError:
        return platform.processor()
