"""How the processes of a run decide together: one chooses, all check."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from models.weights import WeightsError
from runtime.distributed import DistInfo, broadcast_object
from runtime.errors import TemporaryFailure, UsageError, message_of

T = TypeVar("T")


def decide(choose: Callable[[], T], processes: DistInfo) -> T:
    """Return on every process what `choose` returns on the main one; what it raises for users is raised on all."""
    answer = _attempt(choose) if processes.is_main else None
    value, problem = broadcast_object(answer, processes)
    if problem is not None:
        raise problem
    return value


def together(action: Callable[[], T], processes: DistInfo) -> T:
    """Return what `action` returns on this process; what it raises for users on any is raised on all."""
    value, problem = _attempt(action)
    for rank, each in enumerate(gather(problem, processes)):
        if each is not None:
            raise each if rank == 0 else type(each)(f"process {rank}: {each}")
    return value


def check_same(facts: dict[str, Any], processes: DistInfo) -> None:
    """Raise UsageError on every process if one of them holds other facts than the main process."""
    ours = gather(facts, processes)
    for rank, theirs in enumerate(ours):
        for name, value in theirs.items():
            if value != ours[0][name]:
                seen, expected = (f"{each!s:.100}" for each in (value, ours[0][name]))
                raise UsageError(
                    f"process {rank} sees {name} {seen}, process 0 sees {expected}; "
                    "all processes need the same --data_path and --output_dir, on all machines"
                )


def _attempt(action: Callable[[], T]) -> tuple[T | None, UsageError | TemporaryFailure | None]:
    try:
        return action(), None
    except (UsageError, TemporaryFailure) as error:
        return None, error
    except WeightsError as error:
        return None, UsageError(message_of(error))


def gather(value: T, processes: DistInfo) -> list[T]:
    """Return the values of all processes, in their order."""
    if not processes.distributed:
        return [value]
    values = [None] * processes.world_size
    dist.all_gather_object(values, value)
    return values
