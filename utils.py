"""Processes, devices, random numbers and small meters."""

import contextlib
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from enum import IntEnum
from types import FrameType
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from errors import Stopped, TryAgain, UsageError

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process among those that train together. rank: 0..world_size-1; local_rank counts within the machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """Only the main process writes files and prints."""
        return self.rank == 0

    @property
    def distributed(self) -> bool:
        return self.world_size > 1


def find_processes() -> Processes:
    """From torchrun's environment, else from Slurm's (under plain srun), else a single process.

    Under srun, MASTER_ADDR and MASTER_PORT are set to the job's first machine and a port derived from its number.
    """
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        return Processes(int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", 0)))
    # SLURM_PROCID alone also stands in a batch script's own environment, where there is one process.
    if int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        if "MASTER_ADDR" not in env:
            hosts = ["scontrol", "show", "hostnames", env["SLURM_JOB_NODELIST"]]
            env["MASTER_ADDR"] = subprocess.run(hosts, capture_output=True, text=True, check=True).stdout.split()[0]
        env.setdefault("MASTER_PORT", str(port_of_job(env["SLURM_JOB_ID"])))
        return Processes(int(env["SLURM_PROCID"]), int(env["SLURM_STEP_NUM_TASKS"]), int(env["SLURM_LOCALID"]))
    return Processes()


def port_of_job(job_id: str) -> int:
    """A port below the range that systems hand out; different for two jobs that share a machine."""
    return 10_000 + int("".join(filter(str.isdigit, job_id))) % 20_000


def choose_device(name: str, processes: Processes) -> torch.device:
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


@contextlib.contextmanager
def process_group(processes: Processes, device: torch.device, dist_url: str, timeout: timedelta) -> Iterator[None]:
    """Joins the other processes (NCCL on CUDA, gloo elsewhere) for the duration of the block, or finds them joined."""
    if not processes.distributed or dist.is_initialized():
        yield
        return
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # as torchrun does: processes that share cores get in each other's way
    backend = "nccl" if device.type == "cuda" else "gloo"
    store = _store_of_restart(timeout) if dist_url == "env://" else None
    place = {"init_method": dist_url} if store is None else {"store": store}
    dist.init_process_group(backend, timeout=timeout, world_size=processes.world_size, rank=processes.rank, **place)
    try:
        yield
    except (Stopped, TryAgain):
        raise
    except RuntimeError as error:
        # A process that died takes its peers' collective operations down. It has its traceback printed, and the
        # launcher ends the others soon: they keep quiet until then.
        if isinstance(error, dist.DistError) or any(word in str(error) for word in ("gloo", "NCCL", "Connection")):
            time.sleep(20)
        raise
    dist.destroy_process_group()


def _store_of_restart(timeout: timedelta) -> dist.Store | None:
    """A store of their own for processes that torchrun started again on one machine; None for all others.

    torchrun's store outlives them, and holds addresses of their predecessors. Among several machines nothing tells the
    restarts apart: there TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 helps, given to torchrun.
    """
    env = os.environ
    if env.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or env.get("GROUP_WORLD_SIZE") != "1":
        return None
    if env.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return None
    shared = dist.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), is_master=False, timeout=timeout)
    return dist.PrefixStore(f"restart_{env['TORCHELASTIC_RESTART_COUNT']}", shared)


def broadcast_object(value: object, processes: Processes) -> object:
    """The main process's `value`, on every process."""
    if not processes.distributed:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def all_reduce_sum(values: Tensor, processes: Processes) -> Tensor:
    """The sum of `values` over all processes, in place."""
    if processes.distributed:
        dist.all_reduce(values)
    return values


def share_buffers(module: nn.Module, processes: Processes) -> None:
    """Give all processes the main one's buffers (running means of BatchNorm), which each keeps up by itself."""
    if processes.distributed:
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


def unite_seeds(*parts: int) -> int:
    """One 32-bit seed from several non-negative numbers; different numbers give unrelated seeds."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def seed_everything(*parts: int) -> None:
    """Seed Python, NumPy and torch (all devices) by a tuple of numbers, such as (seed, epoch, update, rank)."""
    seed = unite_seeds(*parts)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@contextlib.contextmanager
def seeded(*parts: int) -> Iterator[None]:
    """Random numbers on the host are a function of `parts` inside the block; the generators' states come back after."""
    seed = unite_seeds(*parts)
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which also queues work for every GPU
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
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


class Request(IntEnum):
    """What all processes do after an update. The largest wish of any process wins."""

    NOTHING = 0
    SAVE = 1
    STOP = 2


class Requests:
    """Brings about that all processes save, or save and stop, after one and the same update.

    SIGTERM, SIGINT, SIGUSR2 and, unless under nohup, SIGHUP ask for a stop; any of them may reach one process alone.
    So after each update the processes exchange one number over gloo, and its answer is read an update later: nobody
    waits for it, and the GPU is not synchronised. Use as a context; the signals' former handlers come back at its end.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGHUP)

    def __init__(self, processes: Processes) -> None:
        self.signals: set[signal.Signals] = set()
        self._group = dist.new_group(backend="gloo") if processes.distributed else None
        self._pending: tuple[Tensor, dist.Work] | None = None

    def __enter__(self) -> "Requests":
        self._terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]
        self._previous = {}
        for number in self.SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # which is how nohup works
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if signal.SIGINT in self.signals and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C does not wait for the checkpoint
        if number == signal.SIGHUP:  # printing to a closed terminal would fail
            with open(os.devnull, "wb") as nowhere:
                for descriptor in self._terminals:
                    os.dup2(nowhere.fileno(), descriptor)
        self.signals.add(signal.Signals(number))

    def agree(self, save: bool = False) -> Request:
        """What all do now. Every process calls this after every update; `save`: this process wishes to save."""
        wish = Request.STOP if self.signals else Request.SAVE if save else Request.NOTHING
        if self._group is None:
            return wish
        answer = Request.NOTHING
        if self._pending is not None:
            number, work = self._pending
            work.wait()
            answer = Request(int(number.item()))
        number = torch.tensor(int(wish))
        self._pending = number, dist.all_reduce(number, dist.ReduceOp.MAX, group=self._group, async_op=True)
        return answer


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
