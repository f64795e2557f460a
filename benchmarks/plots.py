"""Results as pictures.

python -m benchmarks.plots      draws those of benchmarks/results/ anew
"""

import json
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from models.weights.releases import RELEASES
from runtime import plot_style

from .measure import RESULTS, machine_line, stem

IMAGES = Path(__file__).parent.parent / "docs" / "images"

TOP1 = {
    **{name: release.top1 for name, release in RELEASES.items()},
    "swin_tiny_patch4_window7_224": 81.3,  # arXiv 2103.14030, table 1
    "swin_small_patch4_window7_224": 83.0,
    "swin_base_patch4_window7_224": 83.5,
    "convnext_tiny": 82.1,  # arXiv 2201.03545, table 1
    "convnext_small": 83.1,
    "convnext_base": 83.8,
    "maxvit_tiny_tf_224": 83.62,  # arXiv 2204.01697, table 2
}
"""Published top-1 accuracy on ImageNet-1K in percent, trained on it alone at 224 pixels."""


def draw(name: str, result: Mapping[str, Any], folder: Path, processor: str = "") -> None:
    """Draw a result of `benchmarks.speed` as a .png file, if it is one that makes a curve."""
    if name not in PAINTERS:
        return
    folder.mkdir(parents=True, exist_ok=True)
    with plot_style.applied():
        figure = PAINTERS[name](result["rows"])
        figure.supxlabel(machine_line(result["machine"]), fontsize=7, color=plot_style.SOFT)
        figure.savefig(folder / f"{stem(name, result, processor)}.png")


def accuracy(rows: list[dict[str, Any]]) -> Figure:
    """Inference throughput against published accuracy, one line per family."""
    figure = Figure(figsize=(7, 4.8))
    axes = figure.subplots()
    families: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if TOP1.get(row["model"]):
            families.setdefault(row["model"].partition("_")[0], []).append(row)
    for family, members in families.items():
        points = sorted((TOP1[row["model"]], row["images_per_second"], row["model"]) for row in members)
        ours = family in ("debiformer", "biformer")
        axes.plot([p[1] for p in points], [p[0] for p in points], "o-" if ours else "s--", label=family)
        for top1, speed, model in points:
            size = model.split("_")[1]
            above = family != "swin"  # whose points lie below others
            place = {"xytext": (5, 4) if above else (-5, -11), "textcoords": "offset points"}
            axes.annotate(size, (speed, top1), fontsize=8, ha="left" if above else "right", **place)
    axes.set(xlabel="images per second, inference", ylabel="published ImageNet-1K top-1 (%)", xscale="log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.tick_params(which="both", labelsize=9)
    axes.legend()
    return figure


def resolution(rows: list[dict[str, Any]]) -> Figure:
    """Milliseconds and peak memory of one step against the input's side."""
    return _curves(rows, lambda row: row["input_size"], "input, pixels per side")


def topk(rows: list[dict[str, Any]]) -> Figure:
    """Milliseconds and peak memory of one step against k."""
    return _curves(rows, lambda row: row["model_kwargs"]["agent_topk"][0], "routed windows k in stages 1 to 3, of 49")


def _curves(rows: list[dict[str, Any]], position: Callable[[dict[str, Any]], int], what: str) -> Figure:
    quantities: tuple[tuple[str, Callable[[dict[str, Any]], float | None]], ...] = (
        ("ms per step", lambda row: 1e3 * statistics.median(row["seconds"])),
        ("peak memory above weights (MB)", lambda row: row["peak_memory"] and row["peak_memory"] / 2**20),
    )
    tasks = sorted({row["task"] for row in rows})
    figure = Figure(figsize=(9, 3.4 * len(tasks)))
    grid = figure.subplots(len(tasks), 2, squeeze=False)
    for line, task in zip(grid, tasks, strict=True):
        for axes, (unit, quantity) in zip(line, quantities, strict=True):
            _plot_models(axes, [row for row in rows if row["task"] == task], position, quantity)
            axes.set(title=f"{task}, batch {rows[0]['batch_size']}", xlabel=what, ylabel=unit, ylim=(0, None))
    grid[0, 0].legend()
    return figure


def _plot_models(
    axes: Axes,
    rows: list[dict[str, Any]],
    position: Callable[[dict[str, Any]], int],
    quantity: Callable[[dict[str, Any]], float | None],
) -> None:
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if (value := quantity(row)) is not None:
            name = f"{row['model']} ({row['backend']})" if row["backend"] else row["model"]
            curves.setdefault(name, []).append((position(row), value))
    for name, points in curves.items():
        axes.plot(*zip(*sorted(points), strict=True), "o-", label=name)


PAINTERS = {"accuracy": accuracy, "resolution": resolution, "topk": topk}


def main() -> None:
    """The command line."""
    for path in sorted(RESULTS.glob("*.json")):
        draw(path.stem.rpartition("-")[0], json.loads(path.read_text()), IMAGES)


if __name__ == "__main__":
    main()
