"""Stop signals: a run that is told to stop leaves a checkpoint, or leaves everything as it was.

At import this needs the standard library alone, so that a program can handle signals before imports that take seconds.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from enum import IntEnum
from types import FrameType
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    import torch.distributed as dist
    from torch import Tensor

    from runtime.distributed import DistInfo

SAVE_TIMEOUT = timedelta(hours=6)
"""How long processes wait for the main one's checkpoint."""


class Request(IntEnum):
    """What all processes do after an update. The largest wish of any process wins."""

    NOTHING = 0
    SAVE = 1
    STOP = 2


class PreemptionHandler:
    """Handle SIGTERM, SIGINT, SIGUSR2 and SIGHUP, which ask for a stop.

    SIGINT and SIGHUP stay ignored where the parent ignored them (`nohup command &`).

    Between `install` and `begin_training`, a signal ends the process at once. Afterwards, signals are only noted. As
    one may reach a single process, all exchange one number over gloo after each update (`sync`), and its answer is read
    an update later: nobody waits for it, and the GPU is not synchronised.

    Args:
        early_exit: the exit code after an early signal; 75 (EX_TEMPFAIL, "try again") for all by default.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGHUP)
    current: ClassVar[PreemptionHandler | None] = None

    def __init__(self, early_exit: Callable[[signal.Signals], int] = lambda number: os.EX_TEMPFAIL) -> None:
        self.signals: set[signal.Signals] = set()
        self._early_exit = early_exit
        self._installed = False
        self._terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]
        self._interrupts = 0
        self._previous: dict[signal.Signals, object] = {}
        self._watched: int | None = None  # the pipe through which signals reach the watching thread
        self._lock = threading.Lock()
        self._group: dist.ProcessGroup | None = None
        self._pending: tuple[Tensor, dist.Work] | None = None

    # -- before training

    def install(self) -> None:
        """Handle signals from now to the end of the process. A program's first call, before its other imports."""
        self._installed = True
        self.begin_early()
        self.take_over()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self.SIGNALS)
        atexit.register(self._ignore)
        os.register_at_fork(before=_block, after_in_parent=_unblock, after_in_child=_leave_blocked)

    def take_over(self) -> None:
        """Set the handlers (again, where others have set theirs)."""
        PreemptionHandler.current = self
        for number in self.SIGNALS:
            ignored = signal.getsignal(number) == signal.SIG_IGN
            if not (ignored and number in (signal.SIGINT, signal.SIGHUP)):
                previous = signal.signal(number, self._note)
                if previous != self._note:
                    self._previous[number] = previous

    def hand_back(self) -> None:
        """Undo `take_over`."""
        self.end_early()
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
        PreemptionHandler.current = None

    def begin_early(self) -> None:
        """From now on a signal ends this process at once, if it is installed; so does one that was noted before."""
        if not self._installed:
            return
        if self.signals:
            self._leave(next(iter(self.signals)))
        if self._watched is None:
            # A thread, because Python runs no handler while the main thread waits in C code, for other processes say.
            reader, self._watched = os.pipe()
            os.set_blocking(self._watched, False)
            threading.Thread(target=self._watch, args=(reader,), daemon=True).start()
            signal.set_wakeup_fd(self._watched, warn_on_full_buffer=False)

    def end_early(self) -> None:
        """From now on signals are only noted."""
        with self._lock:
            if self._watched is not None:
                signal.set_wakeup_fd(-1)
                os.close(self._watched)
                self._watched = None

    def _watch(self, reader: int) -> None:
        while numbers := os.read(reader, 64):
            for number in set(numbers) & set(self.SIGNALS):
                with self._lock:
                    if self._watched is not None:
                        self._leave(signal.Signals(number))
        os.close(reader)

    def _leave(self, number: signal.Signals) -> None:
        if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
            program = os.path.basename(sys.argv[0])
            with contextlib.suppress(OSError, ValueError):
                sys.stdout.flush()
                os.write(2, f"{program}: {number.name} before training began; nothing has changed\n".encode())
        os._exit(self._early_exit(number))

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            self._interrupts += 1
            once = 2 if "TORCHELASTIC_RUN_ID" in os.environ else 1  # torchrun passes the terminal's Ctrl-C on
            if self._interrupts > once:
                raise KeyboardInterrupt  # a second Ctrl-C does not wait for the checkpoint
        if number == signal.SIGHUP:  # printing to a closed terminal would fail
            with open(os.devnull, "wb") as nowhere:
                for descriptor in self._terminals:
                    os.dup2(nowhere.fileno(), descriptor)
        self.signals.add(signal.Signals(number))

    def _ignore(self) -> None:
        # Python gives up its handlers before the process ends; what is ignored stays ignored.
        if PreemptionHandler.current is self:
            for number in self.SIGNALS:
                signal.signal(number, signal.SIG_IGN)

    # -- during training

    def begin_training(self, info: DistInfo) -> None:
        """From here on, processes stop together. Every process calls this."""
        self._pending = self._group = None
        if info.distributed:
            import torch.distributed as dist

            self._group = dist.new_group(backend="gloo", timeout=SAVE_TIMEOUT)
        self.end_early()
        try:
            self.barrier()
        except RuntimeError:
            if self.signals:  # which has ended another process that was not here yet
                self._leave(next(iter(self.signals)))
            raise

    def sync(self, save: bool = False) -> Request:
        """Return what all processes do now. Each calls this after every update; save: this process wishes to save."""
        wish = Request.STOP if self.signals else Request.SAVE if save else Request.NOTHING
        if self._group is None:
            return wish
        import torch
        import torch.distributed as dist

        answer = Request.NOTHING
        if self._pending is not None:
            number, work = self._pending
            work.wait()
            answer = Request(int(number.item()))
        number = torch.tensor(int(wish))
        self._pending = number, dist.all_reduce(number, dist.ReduceOp.MAX, group=self._group, async_op=True)
        return answer

    def wait_to_be_ended(self, seconds: float) -> None:
        """Wait for the launcher to end this process, as it does when another one has failed: then leave with 1."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.signals and self._watched is None:  # where a thread watches, it ends the process
                sys.exit(1)
            time.sleep(0.1)

    def barrier(self) -> None:
        """Wait for all processes, however long the main one takes to write its checkpoint."""
        if self._group is not None:
            import torch.distributed as dist

            dist.barrier(group=self._group)


@contextlib.contextmanager
def handle_signals() -> Iterator[PreemptionHandler]:
    """Use the process's handler during a run; where it has none, one that ends nothing early and is removed after."""
    handler = PreemptionHandler.current
    passing = handler is None
    if passing:
        handler = PreemptionHandler()
        handler.take_over()
    handler.begin_early()
    try:
        yield handler
    finally:
        handler.end_early()
        if passing:
            handler.hand_back()


# Processes that load images leave stop signals to the one they load for, which needs them to reach its checkpoint.


def _block() -> None:
    if PreemptionHandler.current is not None:
        signal.pthread_sigmask(signal.SIG_BLOCK, PreemptionHandler.SIGNALS)


def _unblock() -> None:
    if PreemptionHandler.current is not None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, PreemptionHandler.SIGNALS)


def _leave_blocked() -> None:
    if PreemptionHandler.current is not None:
        signal.set_wakeup_fd(-1)
