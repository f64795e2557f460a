"""What is wrong with weights, as exceptions of one line."""

from collections.abc import Iterable, Mapping


class WeightsError(ValueError):
    """Weights cannot be read, fetched or used. The message is one line, fit for a terminal."""

    exit_code = 2
    """With which a command should end."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message, most=2000))


class WeightsMismatch(WeightsError):
    """Weights of another model.

    Args:
        missing: names that the model has and the weights lack.
        unexpected: names that only the weights have.
        shapes: by name, the shape in the weights and the model's, where they differ.
    """

    def __init__(
        self,
        message: str,
        missing: Iterable[str] = (),
        unexpected: Iterable[str] = (),
        shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] | None = None,
    ) -> None:
        super().__init__(message)
        self.missing, self.unexpected, self.shapes = frozenset(missing), frozenset(unexpected), dict(shapes or {})


def printable(name: object, most: int = 80) -> str:
    """A name out of a file as text for a terminal: control characters escaped, cut to `most` characters."""
    text = str(name)[: most + 1]
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= most else f"{text[: most - 1]}…"


def listed(names: Iterable[object], most: int = 3) -> str:
    """The first names, sorted, and how many more there are."""
    shown = sorted(map(printable, names))
    return ", ".join(shown[:most]) + (f" and {len(shown) - most} more" if len(shown) > most else "")
