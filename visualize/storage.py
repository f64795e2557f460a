"""The demo page's files: reports and uploads, in a private folder that goes when the page does."""

import fcntl
import hashlib
import os
import shutil
import tempfile
import threading
import time
from contextlib import suppress
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import IO

LIFETIME = 3600.0
"""Seconds until a file goes, whether or not its visitor is still there."""
MOST_BYTES = 500 * 2**20
"""Of all files together; the oldest go first."""
SWEEP_SECONDS = 60.0
PREFIX, LOCK = "visualize-", ".lock"


class Storage:
    """A folder that no other user may open (0700), made on entering and removed on leaving.

    Folders of pages that were killed before they could remove them go first.
    """

    def __enter__(self) -> "Storage":
        remove_abandoned()
        self.folder = Path(tempfile.mkdtemp(prefix=PREFIX))
        self._lock = _locked(self.folder / LOCK)
        self._numbers = count()
        self._closed = threading.Event()
        threading.Thread(target=self._keep_swept, name="sweep", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()

    def visitor(self, session: str) -> Path:
        """A visitor's folder. A session's name is whatever its browser says, and must not be taken for a path."""
        return self.folder / hashlib.sha256(session.encode()).hexdigest()

    def write_report(self, session: str, text: str) -> Path:
        """Replace a visitor's report. Each has a path of its own, so that no browser takes an older one for it."""
        path = self.visitor(session) / str(next(self._numbers)) / "report.html"
        self.forget(session)
        path.parent.parent.mkdir()
        path.parent.mkdir()
        path.write_text(text, encoding="utf-8")
        return path

    def forget(self, session: str) -> None:
        """Remove a visitor's files."""
        shutil.rmtree(self.visitor(session), ignore_errors=True)

    def discard(self, path: str | Path) -> None:
        """Remove a file if it is one of this folder."""
        path = Path(path).resolve()
        if path.is_relative_to(self.folder.resolve()):
            path.unlink(missing_ok=True)

    def sweep(self, lifetime: float = LIFETIME, most_bytes: int = MOST_BYTES) -> None:
        """Remove files older than `lifetime` seconds, and the oldest of the rest while they are more than `most_bytes`.

        Empty folders stay for as long: a file may be on its way into them.
        """
        files, folders = [], []
        for path in self.folder.rglob("*"):
            with suppress(FileNotFoundError):
                found = path.stat()
                (folders if path.is_dir() else files).append((found.st_mtime, found.st_size, path))
        limit, total = time.time() - lifetime, sum(size for _, size, _ in files)
        for changed, size, path in sorted(files):
            if changed >= limit and total <= most_bytes:
                break
            if path.name != LOCK:
                path.unlink(missing_ok=True)
                total -= size
        for changed, _, path in folders[::-1]:
            if changed < limit:
                with suppress(OSError):  # not empty
                    path.rmdir()

    def _keep_swept(self) -> None:
        while not self._closed.wait(SWEEP_SECONDS):
            self.sweep()


def _locked(path: Path) -> IO[str]:
    """A new file that is locked from the moment it has its name."""
    file = path.with_suffix(".new").open("w")
    fcntl.flock(file, fcntl.LOCK_EX)
    Path(file.name).rename(path)
    return file


def remove_abandoned() -> None:
    """Remove folders of pages that ended without doing so: this user's, with a lock that nobody holds."""
    for lock in Path(tempfile.gettempdir()).glob(f"{PREFIX}*/{LOCK}"):
        try:
            if lock.lstat().st_uid != os.getuid():
                continue
            with lock.open() as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(lock.parent, ignore_errors=True)
        except OSError:  # in use, or gone by now
            continue
