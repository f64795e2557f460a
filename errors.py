"""Ends of a run that need no traceback: one line and an exit code."""

import argparse
import contextlib
import difflib
import re
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import NoReturn


class UsageError(ValueError):
    """Something the user gave is wrong. The message names it and the remedy; the exit code is 2."""

    def __init__(self, message: str) -> None:
        # A DataLoader worker re-raises with its traceback as the message: keep the sentence meant for the user.
        sentence = message.rsplit("UsageError: ", 1)[-1].strip()
        super().__init__(" ".join(sentence.splitlines()))  # names in a damaged file may hold line breaks


class NonFiniteLoss(RuntimeError):
    """Training diverged. The exit code is 1."""


class Stopped(RuntimeError):
    """Signals ended the run after its checkpoint was written: running the same command again goes on.

    signals: those that reached this process.
    """

    def __init__(self, message: str, signals: Collection[signal.Signals]) -> None:
        super().__init__(message)
        self.signals = frozenset(signals)


class TemporaryFailure(RuntimeError):
    """Something outside the run failed that may not fail again. The exit code is 75."""


WORKER_DIED = re.compile(r"DataLoader worker \(pid\S* [\d, ]+\) (?:is killed|exited)")


@contextlib.contextmanager
def explain_dead_workers() -> Iterator[None]:
    """TemporaryFailure, with the remedy, if a process that loads images dies inside the block."""
    try:
        yield
    except (RuntimeError, ConnectionError) as error:
        told = error
        if isinstance(error, ConnectionError):  # to a worker that has just died, which torch tells by a signal
            try:
                time.sleep(1)
            except RuntimeError as later:
                told = later
        if not WORKER_DIED.search(str(told)):
            raise
        raise TemporaryFailure(
            "a process that loads images has died, most likely for want of memory; lower --num_workers or ask for more "
            "memory. The same command goes on from the last checkpoint"
        ) from error


EXIT_CODES = {UsageError: 2, NonFiniteLoss: 1, Stopped: 75, TemporaryFailure: 75}
"""75 is EX_TEMPFAIL: try again."""


def exit_on_error(program: str, main: Callable[[], object]) -> None:
    """Run `main`; the errors of this module end the process with one line on stderr instead of a traceback."""
    try:
        main()
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr, flush=True)
        sys.exit(128 + signal.SIGINT)
    except tuple(EXIT_CODES) as error:
        print(f"{program}: {'' if isinstance(error, Stopped) else 'error: '}{error}", file=sys.stderr, flush=True)
        sys.exit(EXIT_CODES[type(error)])


class OneLineParser(argparse.ArgumentParser):
    """A command line whose errors are one line, without the screenful of usage that argparse prints before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def listed(names: Iterable[object], most: int = 3) -> str:
    """The first names, sorted, and how many more there are."""
    names = sorted(map(str, names))
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def did_you_mean(name: str, known: Iterable[str], otherwise: str, mark: str = "") -> str:
    """'did you mean MARKx?' with the known name most like `name`; `otherwise` if none is like it."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"did you mean {mark}{close[0]}?" if close else otherwise
