"""What is wrong with weights, as exceptions of one line."""

from collections.abc import Iterable, Mapping
from typing import Any


class WeightsError(ValueError):
    """Weights cannot be read, fetched or used. The message is one line, fit for a terminal."""

    exit_code = 2
    """With which a command should end."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message, most=2000))


class WeightsMismatch(WeightsError):
    """Weights of another model.

    Args:
        problem: what differs, in a sentence.
        missing: names that the model has and the weights lack.
        unexpected: names that only the weights have.
        shapes: by name, the shape in the weights and the model's, where they differ.
        arguments: those of `timm.create_model` with which the model would fit.
        finetuning: what `load_to_finetune` does about the difference; "" if it refuses it, too.
    """

    def __init__(
        self,
        problem: str,
        missing: Iterable[str] = (),
        unexpected: Iterable[str] = (),
        shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] | None = None,
        arguments: Mapping[str, Any] | None = None,
        finetuning: str = "",
    ) -> None:
        self.problem = problem = printable(problem, most=2000)
        self.arguments, self.finetuning = dict(arguments or {}), finetuning
        self.missing, self.unexpected, self.shapes = frozenset(missing), frozenset(unexpected), dict(shapes or {})
        remedies = [f"create the model with {name}={value}" for name, value in self.arguments.items()]
        remedies += [f"use load_to_finetune, which {finetuning}"] if finetuning else []
        super().__init__(": ".join(filter(None, (problem, ", or ".join(remedies)))))


def printable(name: object, most: int = 80) -> str:
    """A name out of a file as text for a terminal: control characters escaped, cut to `most` characters."""
    text = str(name)[: most + 1]
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= most else f"{text[: most - 1]}…"


def listed(names: Iterable[object], most: int = 3) -> str:
    """The first names, sorted, and how many more there are."""
    shown = sorted(map(printable, names))
    return ", ".join(shown[:most]) + (f" and {len(shown) - most} more" if len(shown) > most else "")
