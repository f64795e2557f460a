"""Peak memory of one step: on a CPU the first one of a fresh process, whose resident memory tells."""

import concurrent.futures
import multiprocessing
from collections.abc import Callable
from functools import partial

import torch

from runtime.errors import UsageError

from .measure import peak_bytes
from .workloads import LARGE_MAPS, Case, build_step

Builder = Callable[[torch.device], Callable[[], None]]
"""Makes a step on a device; it can be pickled."""


def peak_memory(what: Case | str | Builder, device: torch.device) -> int | None:
    """Bytes above what stood before the step: weights, optimizer state and images; None where it cannot be told.

    what: a step, a name in `LARGE_MAPS`, or what makes a step. On CUDA a step is made beforehand: libraries and kernels
    load in it.
    """
    if device.type != "cpu":
        return _peak(what, device, warmup=1)
    # A server process with the imports done, of which every measurement is a fork: it starts at once, without threads.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(_peak_in_child, what, torch.get_num_threads()).result()
        except concurrent.futures.process.BrokenProcessPool as error:
            raise UsageError(f"{what} did not fit the memory; take a smaller batch or input size") from error


def _peak_in_child(what: Case | str | Builder, threads: int) -> int | None:
    torch.set_num_threads(threads)
    return _peak(what, torch.device("cpu"), warmup=0)


def _peak(what: Case | str | Builder, device: torch.device, warmup: int) -> int | None:
    build = partial(build_step, what) if isinstance(what, Case) else LARGE_MAPS.get(what, what)
    step = build(device)
    for _ in range(warmup):
        step()
    return peak_bytes(step, device)
