"""How long the demo page's answer to a click takes, and whether watching a model slows it down.

    python -m benchmarks.click [MODEL] [--clicks N]

Prints milliseconds, median and worst: of the first answer about a photo (with its forward pass), of a click elsewhere
on it (pictures and report drawn anew), and of the model's plain forward pass before and after it was watched. What the
browser and the way to it add is left out.
"""

import argparse
import statistics
from collections.abc import Callable

import torch

from runtime.errors import exit_on_error
from visualize import session
from visualize.images import to_tensor

from .measure import interleaved_seconds


def milliseconds(action: Callable[[], object], repeats: int) -> list[float]:
    """Wall-clock time of each of `repeats` calls."""
    seconds = interleaved_seconds({"": action}, repeats, torch.device("cpu"), warmup=0)[""]
    return [1000 * each for each in seconds]


def measure(model: str, clicks: int) -> dict[str, list[float]]:
    """The times of everything above, by name."""
    choice = session.Choice(model)
    subject = session.subject_of(choice)
    photos = list(session.samples().values())
    image = to_tensor(subject.view(photos[0].image), subject.pixels)

    @torch.no_grad()
    def forward() -> None:
        subject.model(image)

    def answered(photo: session.Photo, x: float, y: float) -> None:
        query = session.Choice(model, stage=3, point=(x, y))
        session.report_of(photo, session.answer(photo, query), [])

    forward()
    before = milliseconds(forward, clicks)
    answered(photos[0], 0.5, 0.5)  # fonts and libraries load once per process
    first = milliseconds(lambda: answered(photos[1], 0.5, 0.5), 1)
    points = iter(torch.rand(clicks, 2, generator=torch.Generator().manual_seed(0)).tolist())
    click = milliseconds(lambda: answered(photos[0], *next(points)), clicks)
    after = milliseconds(forward, clicks)
    return {
        "first answer about a photo": first,
        "click": click,
        "forward pass before": before,
        "forward pass after": after,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the answer to a click on the demo page.")
    parser.add_argument("model", nargs="?", default="debiformer_tiny")
    parser.add_argument("--clicks", type=int, default=20)
    options = parser.parse_args()
    print(f"{options.model}, {torch.get_num_threads()} thread(s); milliseconds")
    for name, times in measure(options.model, options.clicks).items():
        print(f"{name:28} median {statistics.median(times):7.1f}  worst {max(times):7.1f}")


if __name__ == "__main__":
    exit_on_error("benchmarks.click", main)
