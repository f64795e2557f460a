"""Devices, random numbers, deterministic algorithms."""

import contextlib
import os
import random
import re
from collections.abc import Iterator
from datetime import timedelta

import numpy as np
import torch
from torch import nn

from runtime.distributed import DistInfo
from runtime.errors import UsageError

AMP_DTYPES = {"none": None, "fp16": torch.float16, "bf16": torch.bfloat16}
"""What autocast computes in, by --amp."""


def choose_device(name: str, processes: DistInfo) -> torch.device:
    """The device of this process for --device `name`; auto takes a GPU if there is one. UsageError if it is missing."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device {name!r} is not a device; use auto, cuda, cuda:N, mps or cpu") from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UsageError(f"--device {name}: no CUDA GPU is visible; use --device cpu")
        index = processes.local_rank if device.index is None else device.index
        if torch.cuda.device_count() == 1 and "SLURM_JOB_ID" in os.environ:
            index = 0  # the cluster shows each process its own GPU only
        if index >= torch.cuda.device_count():
            raise UsageError(f"GPU {index} was asked for, but only {torch.cuda.device_count()} are visible")
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise UsageError("--device mps: not available on this machine; use --device cpu")
    return device


def unite_seeds(*parts: int) -> int:
    """One 32-bit seed from several non-negative numbers; different numbers give unrelated seeds."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def seed_everything(*parts: int) -> None:
    """Seed Python, NumPy and torch (all devices) by a tuple of numbers, such as (seed, epoch, update, rank)."""
    seed = unite_seeds(*parts)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


_spare = np.random.MT19937()


@contextlib.contextmanager
def seeded(*parts: int) -> Iterator[None]:
    """Random numbers on the host are a function of `parts` inside the block; the generators' states come back after."""
    seed = unite_seeds(*parts)
    states = random.getstate(), np.random.get_bit_generator(), torch.get_rng_state()
    np.random.set_bit_generator(_spare)  # copying NumPy's state takes longer than all else here
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which also queues work for every GPU
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_bit_generator(states[1])
        torch.set_rng_state(states[2])


@contextlib.contextmanager
def deterministic_algorithms(enabled: bool) -> Iterator[None]:
    """Same computation, same bits, in the block, if `enabled`; begin before CUDA is used.

    UsageError, naming the operation, where torch has no deterministic algorithm.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = not enabled
    if enabled:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS chooses by what is free
        torch.use_deterministic_algorithms(True)
    try:
        yield
    except RuntimeError as error:
        found = re.search(r"(\S+) does not have a deterministic implementation", str(error))
        if not enabled or found is None:
            raise
        raise UsageError(
            f"--deterministic: torch has no deterministic algorithm for {found[1]} on this device; leave the option out"
        ) from error
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]


def count_parameters(module: nn.Module) -> int:
    """How many numbers a module's parameters hold."""
    return sum(parameter.numel() for parameter in module.parameters())


def format_seconds(seconds: float) -> str:
    """1:02:03 for 3723."""
    return str(timedelta(seconds=round(seconds)))


def peak_memory(device: torch.device) -> float:
    """Most memory held so far, in MB: of the GPU, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource  # Unix only

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
