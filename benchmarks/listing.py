"""How long a run's processes take to list a folder of images, and what the list costs a worker in memory."""

import os
import statistics
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing import start_processes
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from runtime.distributed import DistInfo, process_group
from tasks import find_task
from tasks.options import Options

from .markdown import table

CLASSES = 1000
TARGETS = {"second start, s": 1.0, "list in a worker, MB": 20.0}


def make_empty(folder: Path, count: int) -> None:
    """Write `count` empty files, named as ImageNet's, in train/, and one per class in val/."""
    for split, files in (("train", count), ("val", CLASSES)):
        for number in range(CLASSES):
            name = f"n{number:08d}"
            (folder / split / name).mkdir(parents=True)
            for image in range(number, files, CLASSES):
                os.close(os.open(folder / split / name / f"{name}_{image:06d}.JPEG", os.O_CREAT | os.O_WRONLY))


def private_mb() -> float:
    """Memory of this process that no other one shares, in MB (Linux)."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


class ReadNames(IterableDataset):
    """Reads all names and classes of a source, and yields its process's private memory before and after, in MB."""

    def __init__(self, source: Dataset) -> None:
        self.source = source

    def __iter__(self) -> Iterator[tuple[float, float]]:
        before, worker = private_mb(), get_worker_info()
        for index in range(worker.id, len(self.source), worker.num_workers):
            _ = self.source[index]
        yield before, private_mb()


def start(options: Options, folder: Path, processes: int) -> float:
    """Seconds until all of so many processes, which have met, have their sources."""
    meeting = folder / f"meet{time.time_ns()}"
    start_processes(_start, (options, processes, meeting), processes, start_method="fork")
    return max(float(path.read_text()) for path in folder.glob(f"{meeting.name}.*"))


def _start(rank: int, options: Options, processes: int, meeting: Path) -> None:
    info = DistInfo(rank, processes)
    with process_group(info, torch.device("cpu"), f"file://{meeting}", timedelta(minutes=10)):
        task = find_task(options.task)(options, info)
        dist.barrier()
        began = time.perf_counter()
        task.sources()
        Path(f"{meeting}.{rank}").write_text(str(time.perf_counter() - began))


def measure_listing(options: Options, folder: Path, count: int, processes: int, workers: int) -> dict[str, Any]:
    """Measure the first and the second start of a run on `count` empty files, and the memory of its workers."""
    make_empty(folder, count)
    time.sleep(3)  # a folder that has just changed is read again
    os.environ["DEBIFORMER_HOME"] = str(folder / "cache")
    seconds = [start(options, folder, processes) for _ in range(3)]
    train, _ = find_task(options.task)(options).sources()
    memory = list(DataLoader(ReadNames(train), batch_size=None, num_workers=workers))
    return {
        "files": count,
        "processes": processes,
        "workers": workers,
        "first start, s": seconds[0],
        "second start, s": statistics.mean(seconds[1:]),
        "worker in all, MB": max(after for _, after in memory),
        "list in a worker, MB": max(after - before for before, after in memory),
    }


def listing_section(found: dict[str, Any]) -> str:
    """The figures for reading."""
    rows = []
    for name in ("first start, s", "second start, s", "worker in all, MB", "list in a worker, MB"):
        target = TARGETS.get(name)
        verdict = "" if target is None else f"{target:g}, {'reached' if found[name] <= target else 'missed'}"
        rows.append([name, f"{found[name]:.2f}", verdict])
    head = (
        f"The list of {found['files']:,} empty files in {CLASSES} folders, for {found['processes']} processes on this "
        f"machine; then the private memory of each of {found['workers']} workers of one that has read all names, and "
        "how much of it came with that."
    )
    return f"{head}\n\n{table(['listing', 'measured', 'target'], rows)}"
