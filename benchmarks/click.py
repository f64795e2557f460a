"""How long the demo page takes from a click to its new panels, in a real browser, and what the answer takes of that.

    python -m benchmarks.click [MODEL] [--clicks N]

Prints milliseconds, median and worst: from a click into the picture until the browser has laid out the new panels; of
the answer alone (panels and report, without the way to the browser); of the first answer about a photo, with its
forward pass; and of the model's plain forward pass before and after it was watched. Needs gradio, Playwright, Chromium.
"""

import argparse
import random
import shutil
import statistics
from collections.abc import Callable
from functools import partial

import torch

from runtime.errors import UsageError, exit_on_error
from visualize import session
from visualize.images import to_tensor
from visualize.storage import Storage

from .measure import describe_machine, interleaved_seconds, machine_line

CLICK = """([x, y]) => new Promise(resolve => {
  const panels = document.querySelector('#panels .panels'), picture = document.querySelector('#picture svg')
  const begin = performance.now()
  new MutationObserver((_, observer) => {
    observer.disconnect()
    requestAnimationFrame(() => setTimeout(() => resolve(performance.now() - begin)))
  }).observe(panels, { attributes: true, childList: true, subtree: true })
  const box = picture.getBoundingClientRect()
  const place = { clientX: box.left + x * box.width, clientY: box.top + y * box.height }
  picture.dispatchEvent(new MouseEvent('click', { bubbles: true, ...place }))
})"""


def milliseconds(action: Callable[[], object], repeats: int) -> list[float]:
    """Wall-clock time of each of `repeats` calls."""
    seconds = interleaved_seconds({"": action}, repeats, torch.device("cpu"), warmup=0)[""]
    return [1000 * each for each in seconds]


def in_browser(model: str, points: list[list[float]]) -> list[float]:
    """Milliseconds from a click at each point (fractions of the picture) to the new panels.

    UsageError without gradio or a browser.
    """
    chromium = shutil.which("chromium")
    try:
        from playwright.sync_api import sync_playwright

        from visualize.page import Page, serve
    except ImportError as error:
        raise UsageError("clicks need gradio and playwright: pip install -r requirements-dev.txt") from error
    if chromium is None:
        raise UsageError("clicks need Chromium: apt-get install chromium")
    with Storage() as storage, sync_playwright() as driver:
        page = Page(storage, model)
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        window = browser.new_page()
        window.goto(serve(page, "127.0.0.1"))
        window.wait_for_selector("#panels figure")
        times = [window.evaluate(CLICK, point) for point in [[0.2, 0.2], *points]][1:]
        browser.close()
        page.blocks.close(verbose=False)
    return times


def measure(model: str, clicks: int) -> dict[str, list[float]]:
    """The times of everything above, by name."""
    choice = session.Choice(model)
    subject = session.subject_of(choice)
    photos = list(session.samples().values())
    image = to_tensor(subject.view(photos[0].image), subject.pixels)
    chance = random.Random(0)
    points = [[chance.random(), chance.random()] for _ in range(clicks)]

    @torch.no_grad()
    def forward() -> None:
        subject.model(image)

    def answered(photo: session.Photo, x: float, y: float) -> None:
        query = session.Choice(model, stage=3, point=(x, y))
        session.report_of(photo, session.answer(photo, query), [])

    forward()
    before = milliseconds(forward, clicks)
    answered(photos[0], 0.5, 0.5)  # libraries load once per process
    first = milliseconds(partial(answered, photos[1], 0.5, 0.5), 1)
    ahead = iter(points)
    answers = milliseconds(lambda: answered(photos[0], *next(ahead)), clicks)
    return {
        "click, in the browser": in_browser(model, points),
        "answer to a click": answers,
        "first answer about a photo": first,
        "forward pass before": before,
        "forward pass after": milliseconds(forward, clicks),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the answer to a click on the demo page.")
    parser.add_argument("model", nargs="?", default="debiformer_nano")
    parser.add_argument("--clicks", type=int, default=20)
    options = parser.parse_args()
    found = measure(options.model, options.clicks)
    print(f"{options.model}; {machine_line(describe_machine(torch.device('cpu')))}; milliseconds")
    for name, times in found.items():
        print(f"{name:28} median {statistics.median(times):7.1f}  worst {max(times):7.1f}")


if __name__ == "__main__":
    exit_on_error("benchmarks.click", main)
