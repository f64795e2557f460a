"""What all benchmarks share: the machine in words, interleaved timings, roofs, peak memory, results as files."""

import datetime
import gc
import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

RESULTS = Path(__file__).parent / "results"
LIMITS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
"""Variables by which PyTorch, oneDNN and MKL use fewer instructions than the processor has."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def describe_machine(device: torch.device) -> dict[str, Any]:
    """The machine, its software and today's date, as JSON takes it."""
    versions: dict[str, str | None] = {"torch": torch.__version__}
    for package in ("timm", "triton"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "date": datetime.date.today().isoformat(),
        "device": device.type,
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "limits": {name: os.environ[name] for name in LIMITS if name in os.environ},
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        **versions,
    }


def machine_line(machine: Mapping[str, Any]) -> str:
    """The description as one line of text."""
    limits = "".join(f" {name}={value}" for name, value in machine.get("limits", {}).items())
    where = f"{machine['cpu']}, {machine['threads']} threads, {machine['instructions']}{limits}"
    if machine["gpu"]:
        where = f"{machine['gpu']}, CUDA {machine['cuda']}, Triton {machine['triton']}"
    return f"{where}; torch {machine['torch']}, timm {machine['timm']}, Python {machine['python']}; {machine['date']}"


def _cpu_name() -> str:
    """Name, family and model where the system tells them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = facts.get("model name", platform.machine())
    return f"{name} (family {facts['cpu family']})" if "cpu family" in facts else name


# -- time ---------------------------------------------------------------------------------------------------------


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved_seconds(
    tasks: Mapping[Any, Callable[[], object]],
    repeats: int,
    device: torch.device,
    warmup: int = 2,
    at_least: float = 0.0,
) -> dict[Any, list[float]]:
    """Seconds per call of every task, `repeats` times: one task after the other, then all of them again.

    So what slows the machine for a while slows all tasks alike. at_least: seconds that one measurement lasts; a shorter
    task is called several times without waiting in between.
    """
    calls = {}
    for name, task in tasks.items():
        for _ in range(warmup):
            task()
        calls[name] = max(1, round(at_least / _seconds(task, 1, device))) if at_least else 1
    seconds = {name: [] for name in tasks}
    for _ in range(repeats):
        for name, task in tasks.items():
            seconds[name].append(_seconds(task, calls[name], device))
    return seconds


def _seconds(task: Callable[[], object], calls: int, device: torch.device) -> float:
    synchronize(device)
    began = time.perf_counter()
    for _ in range(calls):
        task()
    synchronize(device)
    return (time.perf_counter() - began) / calls


# -- roofs --------------------------------------------------------------------------------------------------------


def copy_bandwidth(device: torch.device, repeats: int = 9, size: int | None = None) -> float:
    """Bytes per second that a copy of an array larger than the caches reads and writes, the fastest of `repeats`."""
    size = size or (2**30 if device.type == "cuda" else 2**28)
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    seconds = interleaved_seconds({"copy": lambda: target.copy_(source)}, repeats, device)["copy"]
    return 2 * source.nbytes / min(seconds)


def matrix_rate(device: torch.device, dtype: torch.dtype, repeats: int = 9, side: int | None = None) -> float:
    """Floating-point operations per second of a large square matrix product, the fastest of `repeats`.

    On a CPU the faster of two libraries: the one behind matmul, and the one behind 1x1 convolutions.
    """
    side = side or (8192 if device.type == "cuda" else 2048)
    a, b = torch.randn(2, side, side, device=device).to(dtype)
    tasks = {"matmul": lambda: a @ b}
    if device.type == "cpu":
        image = a.view(1, 1, side, side).permute(0, 3, 1, 2)
        kernel = b[..., None, None]
        tasks["conv"] = lambda: F.conv2d(image, kernel)
    with torch.inference_mode():
        seconds = interleaved_seconds(tasks, repeats, device)
    return 2 * side**3 / min(map(min, seconds.values()))


# -- memory -------------------------------------------------------------------------------------------------------


def peak_bytes(step: Callable[[], object], device: torch.device) -> int | None:
    """Memory that a step holds at most above what is held before, in bytes; None where it cannot be told.

    On CUDA what PyTorch has allocated; on a CPU under Linux the resident memory of the process, which is trustworthy
    only for the first step of a fresh process (see `benchmarks.memory`).
    """
    gc.collect()
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    if platform.system() != "Linux":
        return None
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark becomes what is resident now
    before = _resident("VmRSS")
    step()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{field}:")[2].split()[0]) * 1024


# -- results ------------------------------------------------------------------------------------------------------


def stem(name: str, result: Mapping[str, Any], processor: str = "") -> str:
    """NAME-DEVICE, and -PROCESSOR where a result is of another one than the page of that name."""
    return "-".join(filter(None, (name, result["machine"]["device"], processor)))


def write_result(name: str, result: Mapping[str, Any], markdown: str, folder: Path, processor: str = "") -> None:
    """A result as a .json file, and a .md file for reading."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{stem(name, result, processor)}.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / f"{stem(name, result, processor)}.md").write_text(markdown + "\n")


def read_result(name: str, device: str, folder: Path = RESULTS) -> dict[str, Any] | None:
    """A result that `write_result` wrote, None if there is none."""
    path = folder / f"{name}-{device}.json"
    return json.loads(path.read_text()) if path.exists() else None
