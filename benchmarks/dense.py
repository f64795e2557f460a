"""Parameters and multiply-accumulates (MACs) of segmenters and detectors, beside their published figures; their speed.

    python -m benchmarks.dense                                                  all recipes, counted
    python -m benchmarks.dense --write benchmarks/results/dense.md
    python -m benchmarks.dense --measure --recipes debiformer_small_mask_rcnn_coco
    python -m benchmarks.dense --measure memory --size 800 1344 --recipes debiformer_base_mask_rcnn_coco

Segmenters see 512 x 2048 pixels and 150 classes, detectors 800 x 1280 and 80; --size gives others. MACs are those of
one image in inference, counted as in benchmarks.model_table; Mask R-CNN's heads see 1000 proposals and 100 objects.
Parameters are all that training has, the segmenters' auxiliary heads among them. --measure times whole inferences of
one image, with random weights in fp32, on this machine's GPU or CPU, and takes the peak memory above the weights;
`--measure memory` takes that alone, for which the machine need not be quiet.
"""

import argparse
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import utils
from runtime import distributed
from runtime.errors import OneLineParser, exit_on_error
from runtime.options import RECIPES
from tasks import Task, find_task
from tasks.options import load_recipe

from .markdown import show, table
from .measure import describe_machine, interleaved_seconds, machine_line
from .memory import peak_memory
from .model_table import macs_of

BEGIN = "<!-- dense table: python -m benchmarks.dense -->"
END = "<!-- end of dense table -->"
SIZES = {"segmentation": (512, 2048), "detection": (800, 1280)}
CLASSES = {"segmentation": 150, "detection": 80}
TITLES = {"speed": "images/s", "memory": "memory (MB)"}
NAMES = sorted((path.stem for path in RECIPES.glob("*.yaml") if re.search("_(ade20k|coco)$", path.stem)), reverse=True)


def build(recipe: str) -> tuple[Task, nn.Module]:
    """The task and model of a recipe, with random weights in evaluation mode."""
    options = load_recipe(recipe)
    task = find_task(options.task)(options)
    task.num_classes = CLASSES[options.task]
    return task, task.build_model().eval()


def size_of(recipe: str) -> tuple[int, int]:
    """The (height, width) of images for which published operations are counted."""
    return SIZES[load_recipe(recipe).task]


def count_macs(model: nn.Module, size: tuple[int, int]) -> int:
    """Multiply-accumulates of one image of (height, width). On the meta device this takes no memory."""
    image = torch.empty(1, 3, *size, device=next(model.parameters()).device)
    return macs_of(lambda: _run_layers(model, image))


def _run_layers(model: nn.Module, image: Tensor) -> None:
    """Every layer of an inference, without what lies between them and depends on values: proposals, suppression."""
    if not hasattr(model, "backbone") or not hasattr(model.backbone, "fpn"):
        model(image)
        return
    levels = list(model.backbone(image).values())
    if not hasattr(model, "roi_heads"):
        model.head(levels)
        return
    heads, channels = model.roi_heads, model.backbone.out_channels
    model.rpn.head(levels)
    heads.box_predictor(heads.box_head(image.new_empty(1000, channels, *heads.box_roi_pool.output_size)))
    heads.mask_predictor(heads.mask_head(image.new_empty(100, channels, *heads.mask_roi_pool.output_size)))


def published(recipe: str) -> str:
    """The figures that the recipe names, '-' if it names none."""
    line = (RECIPES / f"{recipe}.yaml").read_text().splitlines()[1]
    return "-" if "not known" in line else line.rpartition(": ")[2].rstrip(".")


def build_step(recipe: str, size: tuple[int, int], device: torch.device) -> Callable[[], None]:
    """A function that runs the whole model on one random image of (height, width)."""
    torch.manual_seed(0)
    task, model = build(recipe)
    model.to(device, memory_format=torch.channels_last)
    image = torch.randn(1, 3, *size, device=device).contiguous(memory_format=torch.channels_last)

    @torch.inference_mode()
    def step() -> None:
        task.forward(model, {"images": image, "labels": image[:, 0], "targets": []})

    return step


def speed(recipe: str, size: tuple[int, int], device: torch.device, repeats: int) -> str:
    """Images per second."""
    step = build_step(recipe, size, device)
    (seconds,) = interleaved_seconds({recipe: step}, repeats, device, warmup=1).values()
    return f"{1 / statistics.median(seconds):.2f}"


def memory(recipe: str, size: tuple[int, int], device: torch.device) -> str:
    """Peak memory in MB."""
    peak = peak_memory(partial(build_step, recipe, size), device)
    return "-" if peak is None else f"{peak / 1e6:.0f}"


Measure = Callable[[str, tuple[int, int]], str]
"""Measures a recipe at a (height, width)."""


def dense_table(
    recipes: Sequence[str], measures: Mapping[str, Measure] | None = None, size: tuple[int, int] | None = None
) -> str:
    """A Markdown table with one row per recipe. measures: by the titles of their columns; size: not the published."""
    measures, rows = measures or {}, []
    for recipe in recipes:
        with torch.device("meta"):
            _, model = build(recipe)
        height, width = size or size_of(recipe)
        counts = f"{utils.count_parameters(model) / 1e6:.1f}", f"{count_macs(model, (height, width)) / 1e9:.1f}"
        row = [f"`{recipe}`", published(recipe), f"{height} x {width}", *counts]
        rows.append([*row, *(measure(recipe, (height, width)) for measure in measures.values())])
    return table(["recipe", "published", "input", "params (M)", "MACs (G)", *measures], rows, text_columns=2)


def main() -> None:
    parser = OneLineParser(
        "python -m benchmarks.dense", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipes", nargs="+", choices=NAMES, default=NAMES, metavar="NAME", help="default: all")
    parser.add_argument("--size", nargs=2, type=int, metavar=("HEIGHT", "WIDTH"), help="of the images")
    parser.add_argument("--measure", nargs="*", choices=TITLES, help="also what this machine needs (default: both)")
    parser.add_argument("--repeats", type=int, help="rounds of timing (default: 9 on GPUs, 3 on CPUs)")
    parser.add_argument("--device", default="auto", help="auto (a GPU if there is one), cuda, cuda:N or cpu")
    parser.add_argument("--write", type=Path, metavar="FILE", help=f"write between {BEGIN} and {END}")
    args = parser.parse_args()
    device = utils.choose_device(args.device, distributed.DistInfo())
    repeats = args.repeats or (3 if device.type == "cpu" else 9)
    known = {"speed": partial(speed, device=device, repeats=repeats), "memory": partial(memory, device=device)}
    chosen = [] if args.measure is None else args.measure or known
    text = dense_table(args.recipes, {TITLES[name]: known[name] for name in chosen}, args.size)
    if chosen:
        text += f"\n\n{machine_line(describe_machine(device))}"
    show(text, args.write, BEGIN, END)


if __name__ == "__main__":
    exit_on_error("benchmarks.dense", main)
