"""How the processes of a run decide together: one chooses, all check."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from errors import UsageError
from utils import Processes, broadcast_object

T = TypeVar("T")


def decide(choose: Callable[[], T], processes: Processes) -> T:
    """Return on every process what `choose` returns on the main one; its UsageError is raised on all."""
    answer = _attempt(choose) if processes.is_main else None
    value, problem = broadcast_object(answer, processes)
    if problem is not None:
        raise UsageError(problem)
    return value


def together(action: Callable[[], T], processes: Processes) -> T:
    """Return what `action` returns on this process; if it fails on any, its UsageError is raised on all."""
    value, problem = _attempt(action)
    problems = _gather(problem, processes)
    for rank, each in enumerate(problems):
        if each is not None:
            raise UsageError(each if rank == 0 else f"process {rank}: {each}")
    return value


def check_same(facts: dict[str, Any], processes: Processes) -> None:
    """Raise UsageError on every process if one of them holds other facts than the main process."""
    ours = _gather(facts, processes)
    for rank, theirs in enumerate(ours):
        for name, value in theirs.items():
            if value != ours[0][name]:
                seen, expected = (f"{each!s:.100}" for each in (value, ours[0][name]))
                raise UsageError(
                    f"process {rank} sees {name} {seen}, process 0 sees {expected}; "
                    "all processes need the same --data_path and --output_dir, on all machines"
                )


def _attempt(action: Callable[[], T]) -> tuple[T | None, str | None]:
    try:
        return action(), None
    except UsageError as error:
        return None, str(error)


def _gather(value: object, processes: Processes) -> list[Any]:
    """The values of all processes, in their order."""
    if not processes.distributed:
        return [value]
    values = [None] * processes.world_size
    dist.all_gather_object(values, value)
    return values
