"""Where a run stands when it starts: its folder, and the checkpoint it goes on from. The main process decides."""

import contextlib
import os
import shlex
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from models.weights import load_checkpoint
from runtime.agreement import check_same, decide, together
from runtime.checkpoint import TrainingState
from runtime.distributed import DistInfo
from runtime.errors import UsageError, note
from runtime.run_folder import RunFolder


def name_folder(output_dir: str, model: str, processes: DistInfo) -> Path:
    """Return --output_dir, or a folder named by model and time."""
    if not output_dir and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0:
        raise UsageError("--max-restarts needs --output_dir, so that restarted processes find their checkpoint")
    return decide(lambda: Path(output_dir or f"outputs/cls/{model}/{datetime.now():%Y%m%d-%H%M%S}"), processes)


@contextlib.contextmanager
def open_folder(folder: RunFolder, processes: DistInfo) -> Iterator[RunFolder]:
    """Lock the folder during the block, on the main process. UsageError on all processes if another run does."""
    decide(folder.open, processes)
    try:
        yield folder
    finally:
        folder.close()


def find_checkpoint(
    folder: RunFolder, resume: str, auto_resume: bool, processes: DistInfo
) -> tuple[dict[str, Any], str | Path] | None:
    """Load the newest checkpoint of the run's folder, else --resume, and say where it is. None if there is neither."""
    found = None

    def choose() -> str | Path | None:
        nonlocal found
        found = folder.newest() if auto_resume else None
        if found is None and resume:
            # A Path would spoil an address.
            found = load_checkpoint(resume), resume if "://" in resume else Path(resume)
        elif found is not None and resume and Path(resume).resolve() != found[1].resolve():
            note(f"going on from {found[1]}, not from --resume {resume}; --no_auto_resume does the opposite")
        return found and found[1]

    path = decide(choose, processes)
    if path is None:
        return None
    return together(lambda: found or (load_checkpoint(path), path), processes)


def go_on(
    state: TrainingState,
    checkpoint: dict[str, Any],
    path: str | Path,
    folder: RunFolder,
    processes: DistInfo,
    midway: bool = True,
) -> None:
    """Load the state from a checkpoint. UsageError if it does not fit, or if the processes would not go on alike.

    midway: whether the data can be entered within an epoch; else the epoch begins again.
    """
    together(lambda: state.restore(checkpoint, path), processes)
    place = {"epoch": state.epoch, "image": state.position}
    check_same({**place, "the classes": state.classes, "the data": state.data}, processes)
    if processes.is_main:
        folder.set_position(path, state.epoch, state.position)
    if not midway and state.position:
        state.position = 0
        state.history.forget_epoch(state.epoch)
        if processes.is_main:
            print("Streamed data cannot be entered midway: the epoch begins again")
    if processes.is_main:
        owed = "" if state.evaluated else f"; epoch {state.epoch} is evaluated first"
        print(f"Continuing from {path}: epoch {state.epoch + 1}, image {state.position}{owed}")


def how_to_go_on(folder: Path, program: Path, processes: DistInfo) -> str:
    """Return a command that goes on with the run of a folder."""
    command = f"python {os.path.relpath(program)} --recipe {shlex.quote(str(folder / 'options.yaml'))}"
    return f"To go on{', with the same launcher' if processes.distributed else ''}: {command}"
