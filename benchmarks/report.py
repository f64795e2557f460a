"""Results of `benchmarks.speed` in Markdown, with the targets beside what was measured.

python -m benchmarks.report --write README.md    puts the committed results between the marks of README.md
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from runtime.errors import exit_on_error

from .markdown import print_or_write, table
from .measure import machine_line, read_result

OURS, PEER = "debiformer_tiny", "swin_tiny_patch4_window7_224"
Result = Mapping[str, Any]

BEGIN = "<!-- speed: python -m benchmarks.report -->"
END = "<!-- end of speed -->"
TITLES = {
    "speed": "Throughput and memory",
    "accuracy": "Throughput of all sizes beside published accuracy",
    "resolution": "Time and memory against resolution",
    "deterministic": "What deterministic algorithms cost",
    "topk": "Time and memory against the number of routed windows",
}


def progress(row: Result) -> str:
    """One line about a case that was measured."""
    what = f"{label(row)}, {row['task']}, {row['mode']}, {row['dtype']}, {row['input_size']} px"
    return f"{what}: {row['images_per_second']:.2f} images/s"


def label(row: Result) -> str:
    """Model, number of routed windows and backend of a row."""
    topk = row["model_kwargs"].get("agent_topk")
    name = f"{row['model']} k={topk[0]}" if topk else row["model"]
    return f"{name} ({row['backend']})" if row["backend"] else name


def speed_report(name: str, result: Result) -> str:
    """The whole page: machine, rows, floors, targets."""
    parts = [
        f"# {TITLES[name]}",
        machine_line(result["machine"]) + ".",
        f"Measured in the same run: copies {result['copy_bandwidth'] / 1e9:.1f} GB/s, "
        f"matrix products {result['matrix_rate'] / 1e12:.3f} TFLOP/s.",
        speed_table(result),
    ]
    if result["floors"]:
        parts += ["Convolutions and linear layers of one inference step, timed one by one:", floor_table(result)]
    if name == "speed":
        parts += ["Targets:", target_table(result)]
    return "\n\n".join(parts)


def speed_table(result: Result) -> str:
    """One row per case."""
    header = ("model", "task", "mode", "dtype", "batch", "pixels", "images/s", "ms", "MFU (%)", "peak memory (MB)")
    rows = []
    for row in result["rows"]:
        rows.append(
            (
                *(label(row), row["task"], row["mode"], row["dtype"]),
                *(f"{row['batch_size']}", f"{row['input_size']}", f"{row['images_per_second']:.2f}"),
                f"{1e3 * row['batch_size'] / row['images_per_second']:.0f}",
                f"{100 * row['mfu']:.0f}",
                _megabytes(row["peak_memory"]),
            )
        )
    return table(header, rows, text_columns=4)


WAYS = {
    "as_run": "layers as run",
    "as_linear": "1x1 layers by F.linear",
    "as_convolution": "1x1 layers by F.conv2d",
    "fastest": "each layer the fastest way",
}


def floor_table(result: Result) -> str:
    """Per model its layers alone in several ways, and what share of its inference the fastest are."""
    header = ("model", "mode", *(f"{way} (ms)" for way in WAYS.values()), "share of the last (%)")
    rows = []
    for row in result["rows"]:
        if (row["task"], row["dtype"]) == ("inference", "fp32") and row["model"] in result["floors"]:
            floor, seconds = result["floors"][row["model"]], row["batch_size"] / row["images_per_second"]
            milliseconds = (f"{1e3 * floor[way]:.0f}" for way in WAYS)
            rows.append((label(row), row["mode"], *milliseconds, f"{100 * floor['fastest'] / seconds:.0f}"))
    return table(header, rows, text_columns=2)


def _megabytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 2**20:.0f}"


# -- targets ------------------------------------------------------------------------------------------------------


def find(result: Result, model: str, task: str, mode: str, **more: str) -> Result | None:
    """The first row of that kind; of any backend and dtype where none is named."""
    wanted = {"model": model, "task": task, "mode": mode, **more}
    return next((row for row in result["rows"] if wanted.items() <= row.items()), None)


def quotient(over: Result | None, under: Result | None, field: str) -> float | None:
    """over[field] / under[field], None if either was not measured."""
    values = [row and row[field] for row in (over, under)]
    return None if None in values else values[0] / values[1]


def against_peer(task: str, mode: str, field: str = "images_per_second") -> Callable[[Result], float | None]:
    return lambda result: quotient(find(result, OURS, task, mode), find(result, PEER, task, mode), field)


def triton_gain(task: str) -> Callable[[Result], float | None]:
    return lambda result: quotient(
        *(find(result, OURS, task, "eager", backend=name) for name in ("triton", "reference")), "images_per_second"
    )


def bf16_gain(task: str) -> Callable[[Result], float | None]:
    return lambda result: quotient(
        *(find(result, OURS, task, "eager", dtype=name) for name in ("bf16", "fp32")), "images_per_second"
    )


def compiled_gain(task: str) -> Callable[[Result], float | None]:
    return lambda result: quotient(
        *(find(result, OURS, task, mode) for mode in ("compiled", "eager")), "images_per_second"
    )


def floor_share(mode: str) -> Callable[[Result], float | None]:
    """The share of the layers' time, each run the fastest way."""

    def share(result: Result) -> float | None:
        row, floor = find(result, OURS, "inference", mode), result["floors"].get(OURS)
        return floor["fastest"] * row["images_per_second"] / row["batch_size"] if row and floor else None

    return share


def gigabytes(name: str) -> Callable[[Result], float | None]:
    return lambda result: (count := result["large_maps"].get(name)) and count / 1e9


@dataclass(frozen=True)
class Target:
    """bars: by device type, the value to reach, or with `at_most` not to pass; devices without one are not judged."""

    what: str
    measured: Callable[[Result], float | None]
    bars: dict[str, float]
    at_most: bool = False
    unit: str = ""


TARGETS = (
    Target(f"{OURS} ÷ swin_tiny, inference, eager", against_peer("inference", "eager"), {"cpu": 1.6, "cuda": 1.3}),
    Target("the same, both compiled", against_peer("inference", "compiled"), {"cpu": 1.5, "cuda": 1.3}),
    Target("share of the layers, each the fastest known way, eager", floor_share("eager"), {"cpu": 0.6}),
    Target("the same, compiled", floor_share("compiled"), {"cpu": 0.7}),
    Target(f"{OURS} ÷ swin_tiny, training, eager", against_peer("training", "eager"), {"cpu": 1.4, "cuda": 1.0}),
    Target(f"{OURS}, training, compiled ÷ eager", compiled_gain("training"), {"cpu": 1.0}),
    Target(f"{OURS}, inference, bf16 ÷ fp32", bf16_gain("inference"), {"cpu": 1.0}),
    Target("the same, training", bf16_gain("training"), {"cpu": 1.0}),
    Target(
        "peak training memory ÷ swin_tiny's",
        against_peer("training", "eager", "peak_memory"),
        {"cpu": 1.0, "cuda": 1.0},
        at_most=True,
    ),
    Target("triton ÷ reference, inference", triton_gain("inference"), {"cuda": 3.0}),
    Target("triton ÷ reference, training", triton_gain("training"), {"cuda": 3.0}),
    Target(
        "BRA layer, 1x32x600x500, k = 4, n_win = 7, forward + backward, peak above inputs",
        gigabytes("bra_layer"),
        {"cpu": 1.0, "cuda": 0.5},
        at_most=True,
        unit=" GB",
    ),
    Target(
        "debiformer_small dense, 800x1344, inference, peak",
        gigabytes("dense"),
        {"cpu": 3.0, "cuda": 2.0},
        at_most=True,
        unit=" GB",
    ),
)


def target_table(result: Result) -> str:
    """The targets of the machine's kind, what was measured, and whether that reaches them."""
    device = result["machine"]["device"]
    rows = []
    for target in TARGETS:
        if (bar := target.bars.get(device)) is None:
            continue
        value = target.measured(result)
        sign = "≤" if target.at_most else "≥"
        reached = "" if value is None else "yes" if (value <= bar if target.at_most else value >= bar) else "**no**"
        measured = "not measured" if value is None else f"{value:.2f}{target.unit}"
        rows.append((target.what, f"{sign} {bar:g}{target.unit}", measured, reached))
    return table(("", "target", "measured", "reached"), rows)


# -- README -------------------------------------------------------------------------------------------------------

KINDS = {"cpu": "CPU", "cuda": "GPU"}


def summary(results: Mapping[str, Result | None]) -> str:
    """Throughput and training memory of every model, by kind of machine; a kind without a result says so."""
    names = list(dict.fromkeys(row["model"] for result in results.values() if result for row in result["rows"]))
    if not names:
        return "Not measured yet."
    rows, machines = [], []
    for device, kind in KINDS.items():
        if (result := results.get(device)) is None:
            rows.append((f"{kind}, images/s", *["not measured yet"] * len(names)))
            continue
        first = result["rows"][0]
        setting = f"{first['input_size']} pixels, batch {first['batch_size']}, {first['dtype']}"
        machines.append(f"{kind}: {setting}; {machine_line(result['machine'])}.")
        for task, mode in dict.fromkeys((row["task"], row["mode"]) for row in result["rows"]):
            found = [find(result, name, task, mode) for name in names]
            speeds = (f"{row['images_per_second']:.1f}" if row else "-" for row in found)
            rows.append((f"{kind}, {task}, {mode}, images/s", *speeds))
            if task == "training" and any(row and row["peak_memory"] for row in found):
                peaks = (_megabytes(row and row["peak_memory"]) for row in found)
                rows.append((f"{kind}, {task}, {mode}, peak memory (MB)", *peaks))
    return "\n\n".join([table(("", *names), rows), *machines])


def main() -> None:
    """The command line."""
    results = {device: read_result("speed", device) for device in KINDS}
    print_or_write("benchmarks.report", __doc__, BEGIN, END, lambda: summary(results))


if __name__ == "__main__":
    exit_on_error("benchmarks.report", main)
