"""The folder of a run: who may write there, and which of its states stay."""

import contextlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from runtime.checkpoint import (
    BEST,
    KEPT,
    LAST,
    PREVIOUS,
    TEMPORARY,
    kept_in,
    load_latest,
    name_also,
    save_checkpoint,
    temporary_beside,
)
from runtime.errors import UsageError
from runtime.lock import lock, unlock


class RunFolder:
    """The folder that one run at a time writes to. The main process opens it, which locks it, and closes it.

    A folder that does not exist is made by `make`, when there is something to write.
    save_every, keep: keep the state after every so many epochs (0: never), and how many of these (0: all).
    """

    def __init__(self, path: Path, save_every: int = 0, keep: int = 0) -> None:
        self.path, self.save_every, self.keep = path, save_every, keep
        self._made, self._lock = False, None
        # The place of the state at LAST, None if that is damaged; what another run left there is older than any other.
        self._last: tuple[int, int] | None = (-1, 0)

    def open(self) -> None:
        """Lock the folder if it exists. UsageError if another run holds it, or if it cannot be written to."""
        if self.path.exists():
            self.make()

    def close(self) -> None:
        """Unlock the folder, if this process has locked it."""
        if self._lock is not None:
            with contextlib.suppress(OSError):
                unlock(self.path, self._lock)
        self._made, self._lock = False, None

    def make(self) -> None:
        """Make the folder if need be, and lock it. UsageError if it cannot be, or if another run has been quicker."""
        if self._made:
            return
        fresh = not self.path.exists()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path):
                pass
            self._lock = lock(self.path)
        except OSError as error:
            message = f"cannot write to {self.path}: {error.strerror}; choose another --output_dir"
            raise UsageError(message) from error
        if self._lock is not None:
            for left_over in self.path.glob(f".*.pth.*{TEMPORARY}"):  # by a process that was killed while it wrote
                left_over.unlink(missing_ok=True)
        if fresh and (self.path / LAST).exists():
            raise UsageError(f"another run has begun in {self.path}; start again to go on from it")
        self._made = True

    def newest(self) -> tuple[dict[str, Any], Path] | None:
        """Load the newest readable checkpoint, and say its path; None without one. WeightsError if none is readable."""
        return load_latest(self.path)

    def set_position(self, path: str | Path, epoch: int, position: int) -> None:
        """Say which checkpoint the run goes on from: its path, epoch and image."""
        self._last = (epoch, position) if Path(path) == self.path / LAST else None

    def save(self, checkpoint: dict[str, Any]) -> None:
        """Write the newest state. The one at the end of the epoch before stays beside it, as PREVIOUS.

        States within an epoch, and those before and after its evaluation, replace each other.
        """
        place, last, previous = (checkpoint["epoch"], checkpoint["position"]), self._last, self.path / PREVIOUS
        rotate = last is not None and last != place and (last[1] == 0 or not previous.exists())
        save_checkpoint(checkpoint, self.path / LAST, previous if rotate else None)
        self._last = place
        if self.save_every and place[1] == 0 and checkpoint["evaluated"] and place[0] % self.save_every == 0:
            self._keep(place[0])

    def save_best(self, checkpoint: dict[str, Any]) -> None:
        """Write the best weights."""
        save_checkpoint(checkpoint, self.path / BEST)

    def _keep(self, epochs: int) -> None:
        target = self.path / KEPT.format(epochs)
        try:
            name_also(self.path / LAST, target, _copy)
        except OSError as error:
            raise UsageError(f"cannot write {target}: {error.strerror}; free space or lower --keep") from error
        if self.keep:
            for old in kept_in(self.path)[self.keep :]:
                old.unlink(missing_ok=True)


def _copy(path: Path, target: Path) -> None:
    temporary = temporary_beside(target)
    shutil.copyfile(path, temporary)
    os.replace(temporary, target)
