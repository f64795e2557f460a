"""Processes that train together: who they are, how they meet, what they exchange."""

import contextlib
import fcntl
import ipaddress
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from runtime.errors import Stopped, TemporaryFailure
from runtime.preemption import PreemptionHandler

SECONDS_OF_SILENCE = 60


@dataclass(frozen=True)
class DistInfo:
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


def find_processes() -> DistInfo:
    """From torchrun's environment, else from Slurm's (under plain srun), else a single process.

    Under srun, MASTER_ADDR and MASTER_PORT are set to the job's first machine and a port derived from its number.
    """
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        return DistInfo(int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", 0)))
    # SLURM_PROCID alone also stands in a batch script's own environment, where there is one process.
    if int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1 and not _in_shell_of_srun():
        if "MASTER_ADDR" not in env:
            hosts = ["scontrol", "show", "hostnames", env["SLURM_JOB_NODELIST"]]
            env["MASTER_ADDR"] = subprocess.run(hosts, capture_output=True, text=True, check=True).stdout.split()[0]
        env.setdefault("MASTER_PORT", str(port_of_job(env["SLURM_JOB_ID"])))
        return DistInfo(int(env["SLURM_PROCID"]), int(env["SLURM_STEP_NUM_TASKS"]), int(env["SLURM_LOCALID"]))
    return DistInfo()


def _in_shell_of_srun() -> bool:
    """Whether this process was started by hand in the shell of `srun --pty`, where it is alone."""
    if "SLURM_PTY_PORT" not in os.environ:
        return False
    return Path(f"/proc/{os.getppid()}/comm").read_text().strip() != "slurmstepd"


def port_of_job(job_id: str) -> int:
    """A port below the range that systems hand out, another one each time that Slurm runs the job again."""
    restarts = int(os.environ.get("SLURM_RESTART_COUNT", 0))
    return 10_000 + (int("".join(filter(str.isdigit, job_id))) + 7_919 * restarts) % 20_000


@contextlib.contextmanager
def process_group(info: DistInfo, device: torch.device, dist_url: str, timeout: timedelta) -> Iterator[None]:
    """Join the other processes (NCCL on CUDA, gloo elsewhere) for the duration of the block, or find them joined."""
    if not info.distributed or dist.is_initialized():
        yield
        return
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # as torchrun does: processes that share cores get in each other's way
    backend = "nccl" if device.type == "cuda" else "gloo"
    store = _store_of_restart(timeout) if dist_url == "env://" else None
    store = store or _meet(info, dist_url, timeout)
    choose_interface(store, info)
    dist.init_process_group(backend, timeout=timeout, world_size=info.world_size, rank=info.rank, store=store)
    try:
        yield
    except Stopped:
        raise
    except RuntimeError as error:
        # A process that died takes its peers' collective operations down. It has its traceback printed, and the
        # launcher ends the others soon: they keep quiet until then.
        if isinstance(error, dist.DistError) or any(word in str(error) for word in ("gloo", "NCCL", "Connection")):
            handler = PreemptionHandler.current
            time.sleep(20) if handler is None else handler.wait_to_be_ended(20)
        raise
    dist.destroy_process_group()


def _meet(info: DistInfo, dist_url: str, timeout: timedelta) -> dist.Store:
    """The store that all processes share. Says so when the others do not come."""
    place = dist_url if dist_url != "env://" else f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    words = f"waiting for the other {info.world_size - 1} of {info.world_size} processes to come to {place}"
    notice = threading.Timer(SECONDS_OF_SILENCE, lambda: print(words, file=sys.stderr, flush=True))
    notice.daemon = True
    if info.is_main:
        notice.start()
    try:
        store, _, _ = next(dist.rendezvous(dist_url, info.rank, info.world_size, timeout=timeout))
    except dist.DistNetworkError as error:
        if "EADDRINUSE" in str(error):
            raise TemporaryFailure(f"the port of {place} is taken; try again, or set another MASTER_PORT") from error
        raise
    finally:
        notice.cancel()
    store.set_timeout(timeout)
    return dist.PrefixStore("debiformer", store)


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


# -- network interface of gloo


def choose_interface(store: dist.Store, info: DistInfo) -> None:
    """Have gloo use the interface that leads to the other machines, unless GLOO_SOCKET_IFNAME names one.

    By itself gloo takes the address of the machine's own name, which on Debian is 127.0.1.1. The way to MASTER_ADDR is
    the right one, except on that machine, where its name may mean the same: it looks for the way to another one.
    """
    own = _own_address_towards(os.environ.get("MASTER_ADDR", ""))
    store.set(f"address/{info.rank}", own)
    addresses = [store.get(f"address/{rank}").decode() for rank in range(info.world_size)]
    abroad = [address for address in addresses if address and not _is_loopback(address)]
    if _is_loopback(own) and abroad:
        own = _own_address_towards(abroad[0])
    interface = _interface_of(own)
    if interface:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


def _own_address_towards(host: str) -> str:
    """This machine's address on the way to a host; empty if there is none, or no such host."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # sends nothing
            return probe.getsockname()[0]
    except OSError:
        return ""


def _is_loopback(address: str) -> bool:
    return bool(address) and ipaddress.ip_address(address).is_loopback


def _interface_of(address: str) -> str | None:
    """The interface that has an IPv4 address, on Linux; None if there is none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode())
            try:
                answer = fcntl.ioctl(probe.fileno(), 0x8915, request)  # SIOCGIFADDR
            except OSError:
                continue
            found = socket.inet_ntoa(answer[20:24])
            if found == address or (_is_loopback(found) and _is_loopback(address)):
                return name
    return None


# -- exchange


def broadcast_object(value: object, info: DistInfo) -> object:
    """The main process's `value`, on every process."""
    if not info.distributed:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def all_reduce_sum(values: Tensor, info: DistInfo) -> Tensor:
    """The sum of `values` over all processes, in place."""
    if info.distributed:
        dist.all_reduce(values)
    return values


def share_buffers(module: nn.Module, info: DistInfo) -> None:
    """Give all processes the main one's buffers (running means of BatchNorm), which each keeps up by itself."""
    if info.distributed:
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)
