"""A run's progress as one picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import plot_style


def draw(records: Sequence[Mapping[str, Any]], figures: Mapping[str, str], title: str, path: Path) -> None:
    """Draw loss, figures and learning rate over the epochs; averaged weights are dashed.

    records: one for each epoch, at least one, see `RunLog.end_epoch`. figures, title: see `RunLog`. path: of the PNG,
    in the folder that names the run. OSError if it cannot be written.
    """
    from matplotlib.figure import Figure

    with plot_style.applied():
        figure = Figure(figsize=(12, 3.5))
        losses, quality, rates = figure.subplots(1, 3)
        lines = [(losses, "train_loss", "training", "C0", "-"), (rates, "train_lr", "learning rate", "C0", "-")]
        measured = [(losses, "loss", "test"), *((quality, name, label) for name, label in figures.items())]
        for number, (axes, name, label) in enumerate(measured, start=1):
            lines.append((axes, f"test_{name}", label, f"C{number}", "-"))
            lines.append((axes, f"test_ema_{name}", f"{label}, averaged weights", f"C{number}", "--"))
        epochs = [record["epoch"] + 1 for record in records]
        marker = "o" if len(epochs) < 3 else ""
        for axes, key, label, colour, line in lines:
            if key in records[-1]:
                values = [record.get(key) for record in records]
                axes.plot(epochs, values, line, color=colour, label=label, marker=marker)
        for axes, heading in ((losses, "loss"), (quality, f"{title} (%)"), (rates, "learning rate")):
            axes.set(title=heading, xlabel="epoch")
            axes.xaxis.get_major_locator().set_params(integer=True)
        if found := best(records, list(figures)[:1]):
            quality.plot(*found, "*", color="black", markersize=10, label=f"best: {found[1]:.2f} in epoch {found[0]}")
        for axes in (losses, quality, rates):
            if axes.lines:
                axes.legend()
        figure.suptitle(path.parent.name)
        figure.savefig(path)


def best(records: Sequence[Mapping[str, Any]], figures: Sequence[str]) -> tuple[int, float] | None:
    """The epoch, from 1, of the best of these figures, plain or averaged, and its value; None without any."""
    names = [f"{prefix}_{figure}" for figure in figures for prefix in ("test", "test_ema")]
    found = [(record[name], -record["epoch"]) for record in records for name in names if name in record]
    return (1 - max(found)[1], max(found)[0]) if found else None
