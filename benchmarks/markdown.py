"""Tables in Markdown files that a command keeps up to date."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from runtime.errors import OneLineParser, UsageError


def table(header: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 1) -> str:
    """A Markdown table; the first `text_columns` are set to the left, the numbers after them to the right."""
    rule = ["---"] * text_columns + ["---:"] * (len(header) - text_columns)
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows))


def replace_between(path: Path, begin: str, end: str, text: str) -> None:
    """Put `text` between two marks in a file. UsageError if they are not there, once and in this order."""
    try:
        content = path.read_text()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    before, found, rest = content.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise UsageError(f"{path} has no place for this table: it needs the lines {begin} and {end}")
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}")


def show(text: str, file: Path | None, begin: str, end: str) -> None:
    """Print `text`, or put it between two marks in a file."""
    if file:
        replace_between(file, begin, end, text)
    else:
        print(text)


def print_or_write(program: str, description: str, begin: str, end: str, make: Callable[[], str]) -> None:
    """A command line that prints what `make` returns, or with --write FILE puts it between the marks of a file."""
    parser = OneLineParser(
        prog=f"python -m {program}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", type=Path, metavar="FILE", help=f"write between {begin} and {end}")
    file = parser.parse_args().write
    show(make(), file, begin, end)
