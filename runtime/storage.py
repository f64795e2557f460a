"""Reading from storage that fails for a while."""

import errno
import time
from collections.abc import Callable
from typing import TypeVar

from runtime.errors import TemporaryFailure

T = TypeVar("T")

TRANSIENT = frozenset(
    getattr(errno, name)
    for name in (
        *("EIO", "ESTALE", "ETIMEDOUT", "EAGAIN", "EREMOTEIO", "ENETDOWN", "ENETUNREACH", "ENETRESET", "EHOSTDOWN"),
        *("EHOSTUNREACH", "ECONNRESET", "ECONNABORTED", "ECONNREFUSED", "ENOTCONN", "ESHUTDOWN", "ENOLINK"),
    )
    if hasattr(errno, name)
)
"""What network file systems answer while a server is away or fails over."""

PAUSES = (1, 2, 4, 8, 16)
"""Seconds between attempts."""


def is_transient(error: BaseException | None) -> bool:
    """Whether the same may succeed later."""
    return isinstance(error, OSError) and error.errno in TRANSIENT


def read_patiently(read: Callable[[], T], what: str) -> T:
    """Call `read`, again after growing pauses while the storage fails; TemporaryFailure, naming `what`, in the end."""
    for pause in (*PAUSES, None):
        try:
            return read()
        except OSError as error:
            if not is_transient(error):
                raise
            if pause is None:
                raise TemporaryFailure(f"cannot read {what}: the storage fails ({error})") from error
            time.sleep(pause)
    raise AssertionError
