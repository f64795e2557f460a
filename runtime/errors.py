"""Ends of a run that need no traceback: one line and an exit code."""

import argparse
import contextlib
import difflib
import io
import re
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import NoReturn


class UsageError(ValueError):
    """Something the user gave is wrong. The message names it and the remedy; the exit code is 2."""

    def __init__(self, message: str) -> None:
        super().__init__(_sentence(message, "UsageError"))


class TemporaryFailure(RuntimeError):
    """Something outside failed for now, such as storage: the same command may succeed later. The exit code is 75."""

    def __init__(self, message: str) -> None:
        super().__init__(_sentence(message, "TemporaryFailure"))


def _sentence(message: str, kind: str) -> str:
    # A DataLoader worker re-raises with its traceback as the message: keep the sentence meant for the user.
    sentence = message.rsplit(f"{kind}: ", 1)[-1].strip()
    return printable(" ".join(sentence.splitlines()), most=2000)  # names in a damaged file may hold line breaks


class NonFiniteLoss(RuntimeError):
    """Training diverged. The exit code is 1."""


class Stopped(RuntimeError):
    """Signals ended the run after its checkpoint was written: running the same command again goes on.

    signals: those that reached this process.
    """

    def __init__(self, message: str, signals: Collection[signal.Signals]) -> None:
        super().__init__(message)
        self.signals = frozenset(signals)


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


MODEL_OPTIONS = {"num_classes": "--num_classes", "img_size": "--input_size"}
"""Arguments of a model that have an option of their own."""


def message_of(error: Exception) -> str:
    """The message of an error for a command line: what `arguments` it names of a model are told as options."""
    arguments = getattr(error, "arguments", None)
    if not arguments:
        return str(error)
    options = []
    for name, value in arguments.items():
        values = value if isinstance(value, tuple) else (value,)
        if name in MODEL_OPTIONS:
            options.append(f"{MODEL_OPTIONS[name]} {values[0]}")
        else:
            options.append(f"--model_kwargs {name}={','.join(map(str, values))}")
    options += [f"--finetune, which {error.finetuning}"] if error.finetuning else []
    return f"{error.problem}: pass {', or '.join(options)}"


EXIT_CODES = {UsageError: 2, NonFiniteLoss: 1, Stopped: 75, TemporaryFailure: 75}
"""75 is EX_TEMPFAIL: try again. Exceptions of other modules may bring their own as `exit_code`."""

NOT_UTF8 = re.compile("[\udc80-\udcff]")
"""Bytes of a file's name that Python could not decode."""


def exit_on_error(program: str, main: Callable[[], object]) -> None:
    """Run `main`; errors with an exit code end the process with one line on stderr instead of a traceback.

    What cannot be written in the terminal's encoding, such as a file's name that is not UTF-8, is printed escaped.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr, flush=True)
        sys.exit(128 + signal.SIGINT)
    except UnicodeEncodeError as error:
        if not NOT_UTF8.search(error.object):
            raise
        remedy = "libraries that the program writes with need names in UTF-8; choose another"
        print(f"{program}: error: {error.object[:200]!r} is not UTF-8; {remedy}", file=sys.stderr, flush=True)
        sys.exit(2)
    except Exception as error:
        code = EXIT_CODES.get(type(error), getattr(error, "exit_code", None))
        if code is None:
            raise
        kind = "" if isinstance(error, Stopped) else "error: "
        print(f"{program}: {kind}{message_of(error)}", file=sys.stderr, flush=True)
        sys.exit(code)


class OneLineParser(argparse.ArgumentParser):
    """A command line whose errors are one line, without the screenful of usage that argparse prints before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def printable(name: object, most: int = 80) -> str:
    """A name out of a file as text for a terminal: control characters escaped, cut to `most` characters."""
    text = str(name)[: most + 1]
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= most else f"{text[: most - 1]}…"


def listed(names: Iterable[object], most: int = 3) -> str:
    """The first names, sorted, and how many more there are."""
    names = sorted(map(str, names))
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def did_you_mean(name: str, known: Iterable[str], otherwise: str, mark: str = "") -> str:
    """'did you mean MARKx?' with the known name most like `name`; `otherwise` if none is like it."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"did you mean {mark}{close[0]}?" if close else otherwise


def note(message: str) -> None:
    """Tell the user something that may be meant, or forgotten."""
    print(f"note: {message}", file=sys.stderr, flush=True)


def warn(message: str) -> None:
    """Tell the user of something wrong that does not end the run."""
    print(f"warning: {message}", file=sys.stderr, flush=True)
