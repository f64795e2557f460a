"""A lock on a folder that ends with the process that holds it."""

import errno
import fcntl
import os
import socket
import time
from pathlib import Path

from runtime.errors import UsageError, note

NAME = ".lock"
SECONDS_TO_NOTICE_DEATH = 120
"""NFS servers let go of a dead machine's locks after about 90 seconds."""

_held: set[int] = set()


def lock(folder: Path) -> int | None:
    """Lock a folder by flock on a file in it. Returns what `unlock` takes; None where nothing can be locked.

    UsageError naming the holder if another process has it. Machines exclude each other as far as the folder's file
    system carries flock: NFS does, unless mounted with `nolock` or `local_lock`.
    """
    path, deadline = folder / NAME, None
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(descriptor, 1000).decode(errors="replace")
            os.close(descriptor)
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                note(f"{folder} cannot be locked ({error.strerror}): start no second run there")
                return None
            host, _, process = holder.partition(" ")
            # Here, the lock of a dead process is gone. That of a machine may take a while.
            deadline = deadline or time.monotonic() + (0 if host in ("", socket.gethostname()) else _patience(folder))
            if time.monotonic() >= deadline:
                by = f" (process {process} on {host})" if host else ""
                raise UsageError(
                    f"a run is going on in {folder}{by}; wait for its end, or choose another --output_dir"
                ) from error
            time.sleep(0.5)
            continue
        if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"{socket.gethostname()} {os.getpid()}".encode())
            _held.add(descriptor)
            return descriptor
        os.close(descriptor)  # its last holder has just removed it


def unlock(folder: Path, descriptor: int) -> None:
    """Let go of a lock and remove its file."""
    (folder / NAME).unlink(missing_ok=True)
    _held.discard(descriptor)
    os.close(descriptor)


def _patience(folder: Path) -> int:
    note(f"a run on another machine holds {folder}; waiting whether it is alive")
    return SECONDS_TO_NOTICE_DEATH


def _let_go_in_child() -> None:
    """Close the lock in a forked process: a data loading worker may outlive a killed run and would keep its lock."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_let_go_in_child)
