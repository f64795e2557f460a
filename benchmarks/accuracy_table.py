"""Top-1 accuracy on ImageNet-1K of every released model: as published, and measured here.

    python -m benchmarks.accuracy_table --data_path data/in1k
    python -m benchmarks.accuracy_table --data_path data/in1k --write README.md --device cuda --batch_size 128
    torchrun --nproc_per_node=8 -m benchmarks.accuracy_table --data_path data/in1k --dist_eval

Further options are those of main.py, --release_dir among them. Each model is evaluated as by main.py --eval
--load_release at the image size and crop of its own. What could not be measured says why; nothing is copied from the
papers into the column of measurements.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import timm

from main import COLLECTIVE_TIMEOUT, run
from models.weights import WeightsError
from models.weights.cache import sha256_of
from models.weights.releases import RELEASES, Places, find_release, here
from runtime.distributed import find_processes, process_group
from runtime.errors import OneLineParser, UsageError, exit_on_error
from tasks.options import Options, parse_args
from utils import choose_device

from .markdown import show, table

BEGIN = "<!-- accuracy table: python -m benchmarks.accuracy_table -->"
END = "<!-- end of accuracy table -->"
HEADER = ("model", "published top-1 (%)", "measured top-1 (%)", "images", "sha256 of the weights")


def options_of(model: str, argv: Sequence[str]) -> Options:
    """main.py's options for an evaluation of a release, with `argv` besides."""
    cfg = timm.get_pretrained_cfg(model)
    native = ["--input_size", str(cfg.input_size[-1]), "--crop_pct", str(cfg.crop_pct)]
    return parse_args(["--model", model, "--eval", "--load_release", *native, *argv], "benchmarks.accuracy_table")


def measure(model: str, argv: Sequence[str]) -> tuple[str, str, str]:
    """Cells of a row: top-1 in percent or why there is none, images, the first digits of the weights' sha256.

    Weights are downloaded only if there is data to evaluate them on.
    """
    if not timm.is_model(model):
        return "not measured: not built here", "-", "-"
    options = options_of(model, argv)
    places = Places(options.release_dir, options.release_mirror, options.release_hub)
    data = Path(options.data_path).exists() if options.data_path else options.data_set != "IMNET"
    try:
        path = find_release(model, places) if data else here(RELEASES[model], places)
    except WeightsError as error:
        path = None
        print(f"{model}: {error}", file=sys.stderr)
    missing = [name for name, found in {"weights": path, "data": data}.items() if not found]
    digest = sha256_of(path)[:8] if path else "-"
    if missing:
        return f"not measured: no {' and no '.join(missing)}", "-", digest
    try:
        metrics = run(options)
    except UsageError as error:
        print(f"{model}: {error}", file=sys.stderr)
        return "not measured: the evaluation was refused", "-", digest
    return f"{metrics['acc1']:.2f}", str(metrics["images"]), digest


def accuracy_table(argv: Sequence[str]) -> str:
    """The Markdown table, one row per release. argv: options of main.py."""
    rows, options, processes = [], options_of(next(iter(RELEASES)), argv), find_processes()
    # The processes join once: torchrun's store remembers their addresses, which a second time would be other ones.
    with process_group(processes, choose_device(options.device, processes), options.dist_url, COLLECTIVE_TIMEOUT):
        for model, release in RELEASES.items():
            published = "-" if release.top1 is None else f"{release.top1:g}"
            rows.append((model, published, *measure(model, argv)))
    return table(HEADER, rows)


def main(argv: Sequence[str] | None = None) -> None:
    parser = OneLineParser(
        prog="python -m benchmarks.accuracy_table",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--write", type=Path, metavar="FILE", help=f"write the table between {BEGIN} and {END}")
    given, others = parser.parse_known_args(argv)
    result = accuracy_table(others)
    if find_processes().is_main:
        show(result, given.write, BEGIN, END)


if __name__ == "__main__":
    exit_on_error("benchmarks.accuracy_table", main)
