"""The demo page's command: python -m visualize.app, or make demo.

Serves on this machine only, unless told otherwise. Needs gradio (requirements-demo.txt).
"""

import argparse
import contextlib
import errno
import importlib.util
import ipaddress
import os
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from models.weights import WeightsError
from runtime.errors import OneLineParser, UsageError, exit_on_error

from .storage import Storage
from .subject import DEFAULT_MODEL, Subject, load_classifier


def parser() -> OneLineParser:
    """The command line."""
    about = "A page that shows what the attention does."
    result = OneLineParser(prog="python -m visualize.app", allow_abbrev=False, description=about)
    add = result.add_argument
    add("--model", help=f"to start with (default: the checkpoint's, or else {DEFAULT_MODEL})")
    newest = "to start with (default: the newest trained classifier of --checkpoints, unless --model is given)"
    add("--checkpoint", default="", metavar="FILE", help=newest)
    runs = "offer the best.pth of all runs in it (default: outputs)"
    add("--checkpoints", default="outputs", metavar="FOLDER", help=runs)
    add("--host", default="127.0.0.1", help="address to serve on (default: this machine only)")
    add("--port", type=_port, help="(default: the first free one from 7860)")
    add("--auth", type=_name_and_password, metavar="USER:PASSWORD", help="ask visitors for these")
    return result


def _port(text: str) -> int:
    if text.isdecimal() and 1 <= int(text) <= 65535:
        return int(text)
    raise argparse.ArgumentTypeError(f"expected a number from 1 to 65535, not {text!r}")


def _name_and_password(text: str) -> tuple[str, str]:
    name, _, password = text.partition(":")
    if name and password:
        return name, password
    raise argparse.ArgumentTypeError("expected USER:PASSWORD")


def find_checkpoints(folder: str) -> list[str]:
    """The best weights of the runs under a folder, newest first."""
    found = [path for path in Path(folder).rglob("best.pth") if path.is_file()]
    return [str(path) for path in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)]


def first_subject(options: argparse.Namespace) -> tuple[Subject, str, list[str]]:
    """Return what the page starts with, its checkpoint ("" for random weights), and the checkpoints on offer.

    Where neither a model nor a checkpoint is asked for, it is the newest trained classifier.

    Raises:
        UsageError, WeightsError: what was asked for cannot be shown.
    """
    found = find_checkpoints(options.checkpoints)
    if options.checkpoint or options.model:
        named = options.checkpoint
        subject = load_classifier(options.model, named or None)  # a mistake is a line here, not a page
        return subject, named, [named] * bool(named) + [path for path in found if path != named]
    for path in found:
        with contextlib.suppress(UsageError, WeightsError):
            return load_classifier(None, path), path, found
    return load_classifier(), "", found


def check_address(host: str, port: int | None) -> None:
    """Raise UsageError that says why the address cannot be served on. No port: any."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host.strip("[]"), port or 0, type=socket.SOCK_STREAM)[0]
        socket.create_server(address[:2], family=family).close()
    except (socket.gaierror, UnicodeError) as error:
        raise UsageError(f"this machine knows no --host {host!r}") from error
    except PermissionError as error:
        raise UsageError(f"port {port} is not for every user; choose a --port from 1024") from error
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UsageError(f"port {port} is taken; choose another --port") from error
        raise UsageError(f"cannot serve on --host {host}: it is no address of this machine") from error


def is_this_machine(host: str) -> bool:
    """Whether an address is reached from this machine only."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def main(argv: Sequence[str] | None = None) -> None:
    """Serve the page until a signal stops it."""
    options = parser().parse_args(argv)
    if importlib.util.find_spec("gradio") is None:
        raise UsageError("the page needs gradio: pip install -r requirements-demo.txt")
    if options.auth is None and not is_this_machine(options.host):
        notice = f"Whoever reaches {options.host} can use the page; --auth USER:PASSWORD asks for a name and a password"
        print(notice, file=sys.stderr, flush=True)
    check_address(options.host, options.port)
    start, first, offered = first_subject(options)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, _end)
    with Storage() as storage:
        # gradio reads these when it is imported; its own folder is shared by all users of the machine.
        os.environ.update(GRADIO_TEMP_DIR=str(storage.folder), GRADIO_ANALYTICS_ENABLED="False")
        from .page import Page, serve

        page = Page(storage, start.name, offered, first)
        try:
            print(f"The page is at {serve(page, options.host, options.port, options.auth)} until Ctrl-C", flush=True)
            threading.Event().wait()
        except KeyboardInterrupt:
            pass
        finally:
            page.blocks.close(verbose=False)


def _end(number: int, frame: FrameType | None) -> NoReturn:
    """End by a signal as by an exception, so that everything is cleaned up."""
    sys.exit(128 + number)


if __name__ == "__main__":
    exit_on_error("visualize.app", main)
