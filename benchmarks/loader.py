"""Images per second and core that the data loader decodes and augments, stage by stage, beside timm's loader.

    python -m benchmarks.loader --data_path ./data/in1k          your own images, in train/CLASS/ and val/CLASS/
    python -m benchmarks.loader --write                          500 x 375 cuts of scikit-learn's two photographs
    python -m benchmarks.loader -- --aa none --eval_resize torch with options of a run
    python -m benchmarks.loader --measure listing --write        how long 1.28 million files take to list

Both loaders work in this process, in turns, on the same files, up to batches of uint8; what counts is the time on a
processor. Images are read once before, so that the disk does not matter. With --augment_on device only the workers'
part counts; what the device does is measured on this processor, too, and stated beside it.
"""

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import create_dataset, create_loader
from torch.utils.data import DataLoader, Subset

from runtime.errors import OneLineParser, UsageError, exit_on_error
from runtime.samplers import Key
from tasks import find_task
from tasks.classification.augmentation import augment
from tasks.classification.transforms import eval_transform, train_transform
from tasks.loading import Data, build_data
from tasks.options import Options, parse_args
from utils import seeded

from .listing import listing_section, measure_listing
from .markdown import table
from .measure import RESULTS, describe_machine, machine_line, write_result

ON_DEVICE = "training, augmented on the device"
TARGETS = {"training": 1.6, ON_DEVICE: 2.5, "evaluation": 2.0}
NOT_OURS = ("ours", "timm", "device")
"""What a row holds beside the stages of our loader."""
QUALITY = 90
"""Of the JPEGs that are made."""


def make_images(folder: Path, count: int) -> None:
    """Write `count` JPEGs of 500 x 375 pixels, cut out of scikit-learn's photographs, for each of train and val."""
    from sklearn.datasets import load_sample_images

    photographs, chance = [Image.fromarray(pixels) for pixels in load_sample_images().images], random.Random(0)
    for split in ("train", "val"):
        for number in range(count):
            photograph = photographs[number % len(photographs)]
            width = chance.randint(400, 560)
            height = width * 3 // 4
            left, top = chance.randint(0, photograph.width - width), chance.randint(0, photograph.height - height)
            path = folder / split / str(number % len(photographs)) / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            cut = photograph.crop((left, top, left + width, top + height))
            cut.resize((500, 375), Image.Resampling.BICUBIC).save(path, quality=QUALITY)


def processor_ms(work: Callable[[], Any], images: int) -> float:
    """Milliseconds on a processor per image."""
    began = time.process_time()
    work()
    return 1e3 * (time.process_time() - began) / images


def timm_loader(options: Options, split: str, images: Sequence[int], training: bool) -> Iterable:
    """timm's loader of the same files with the same options, up to its batches of uint8."""
    dataset = create_dataset("", root=str(Path(options.data_path, split)))
    augmentation = {
        "auto_augment": options.aa,
        "color_jitter": options.color_jitter,
        "scale": options.scale,
        "hflip": options.hflip,
        "interpolation": options.train_interpolation,
    }
    loader = create_loader(
        dataset,
        options.input_size,
        options.batch_size,
        is_training=training,
        **(augmentation if training else {"interpolation": "bicubic", "crop_pct": eval_crop(options)}),
        num_workers=0,
        persistent_workers=False,
        device=torch.device("cpu"),
    ).loader
    return DataLoader(Subset(dataset, images), options.batch_size, collate_fn=loader.collate_fn)


def eval_crop(options: Options) -> float:
    """The part of the resized side that evaluation crops."""
    return find_task(options.task)(options).pixels.crop_pct


def measure(options: Options, count: int, repeats: int) -> dict[str, list[dict[str, float]]]:
    """Milliseconds per image of both loaders, and of the stages of ours, for training and evaluation."""
    on_device = replace(options, augment_on="device")
    data, drawn = (build_data(find_task(each.task)(each), each) for each in (options, on_device))
    kinds = {"training": (data, options), ON_DEVICE: (drawn, on_device), "evaluation": (data, options)}
    rows: dict[str, list[dict[str, float]]] = {}
    for kind, (each, settings) in kinds.items():
        training = kind != "evaluation"
        dataset = (each.train if training else each.val).dataset
        images = list(range(min(count, len(dataset))))
        theirs = timm_loader(options, "train" if training else "val", images, training)
        rows[kind] = []
        for number in range(repeats + 1):
            row = {
                "ours": processor_ms(lambda i=images, e=each, t=training, n=number: load(e, t, i, n), len(images)),
                "timm": processor_ms(lambda loader=theirs: list(loader), len(images)),
                **stages(settings, dataset, images, training),
            }
            if kind == ON_DEVICE:
                row["device"] = device_ms(each, images)
            row["the rest"] = row["ours"] - sum(value for name, value in row.items() if name not in NOT_OURS)
            if number:  # the first one fills caches
                rows[kind].append(row)
    return rows


def load(data: Data, training: bool, images: Sequence[int], epoch: int) -> None:
    """Have our loader's parts make batches of these images."""
    loader = data.train if training else data.val
    size = loader.batch_size or loader.batch_sampler.batch_size
    for first in range(0, len(images), size):
        keys = [Key(index, epoch, index) for index in images[first : first + size]]
        loader.collate_fn([loader.dataset[key] for key in keys])


def device_ms(data: Data, images: Sequence[int]) -> float:
    """Milliseconds per image of what is left to the device, done by this processor."""
    batch = data.train.collate_fn([data.train.dataset[Key(index, 0, index)] for index in images])
    return processor_ms(lambda: augment(batch["images"], batch["drawn"]), len(images))


def stages(options: Options, dataset: Any, images: Sequence[int], training: bool) -> dict[str, float]:
    """Milliseconds per image of decoding, and of each part of the transform."""
    found = {"decode": processor_ms(lambda: [dataset.read(index) for index in images], len(images))}
    with seeded(0):
        samples = [dataset.read(index) for index in images]
        current = [sample["image"] for sample in samples]
        if training and options.augment_on == "device":
            transform = dataset.transform
            found["RandomCrop"] = processor_ms(lambda: [transform.crop.cropped(each) for each in current], len(images))
            whole = processor_ms(lambda: [transform(sample) for sample in samples], len(images))
            return {**found, "draws": whole - found["RandomCrop"]}
        for part in (train_transform(options) if training else eval_transform(options)).transforms:
            made: list[Any] = []
            name = type(part).__name__
            found[name] = processor_ms(lambda: made.extend(part(each) for each in current), len(images))  # noqa: B023
            current = made
    return found


def page_of(result: dict[str, Any]) -> str:
    """The result for reading."""
    lines = ["# Data loader", "", f"{result['data']}; {machine_line(result['machine'])}.", ""]
    options = " ".join(result["options"]) or "defaults"
    lines += [f"Options: {options}. Medians of {len(result['rows']['training'])} times, on one processor.", ""]
    for kind, rows in result["rows"].items():
        middle = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
        ours, theirs, device = (middle.pop(name, None) for name in NOT_OURS)
        cells = [[name, f"{value:.2f}", ""] for name, value in middle.items()]
        cells += [
            ["**all**", f"{ours:.2f}", f"{1e3 / ours:.0f}"],
            ["timm's loader", f"{theirs:.2f}", f"{1e3 / theirs:.0f}"],
        ]
        if device is not None:
            cells.append(["left to the device; here, this processor", f"{device:.2f}", f"{1e3 / device:.0f}"])
        ratio = statistics.median(row["timm"] / row["ours"] for row in rows)
        reached = "reached" if ratio >= TARGETS[kind] else "missed"
        lines += [table([kind, "ms per image", "images/s per core"], cells), ""]
        lines += [f"{ratio:.2f} times timm's loader; target {TARGETS[kind]:g}, {reached}.", ""]
    return "\n".join(lines).strip()


def main(argv: Sequence[str] | None = None) -> None:
    parser = OneLineParser(
        prog="python -m benchmarks.loader", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--measure", choices=("images", "listing"), default="images")
    parser.add_argument("--data_path", help="folder with train/CLASS/ and val/CLASS/; default: it makes images")
    parser.add_argument("--images", type=int, default=128, help="how many of each")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--files", type=int, default=1_281_167, help="listing: how many empty ones it makes")
    parser.add_argument("--processes", type=int, default=8, help="listing: how many begin a run together")
    parser.add_argument("--workers", type=int, default=2, help="listing: of one process, whose memory is measured")
    parser.add_argument("--write", action="store_true", help="also write the results")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where to")
    parser.add_argument("options", nargs="*", help="options of a run, after --")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as made:
        if args.measure == "listing":
            name, result, page = "listing", *of_listing(args, Path(made))
        else:
            name, result, page = "loader", *of_images(args, Path(made))
    print(page)
    if args.write:
        write_result(name, result, page, args.results)


def of_listing(args: argparse.Namespace, made: Path) -> tuple[dict[str, Any], str]:
    """Measure how empty files are listed. Returns the result, and its page."""
    options = parse_args(["--data_path", str(made), "--model", "debiformer_tiny", *args.options])
    found = measure_listing(options, made, args.files, args.processes, args.workers)
    machine = describe_machine(torch.device("cpu"))
    page = f"# List of images\n\n{machine_line(machine)}.\n\n{listing_section(found)}"
    return {"machine": machine, "listing": found}, page


def of_images(args: argparse.Namespace, made: Path) -> tuple[dict[str, Any], str]:
    """Measure how images are loaded. Returns the result, and its page."""
    if not args.data_path:
        make_images(made, args.images)
    common = ["--data_path", args.data_path or str(made), "--num_workers", "0", "--no_repeated_aug"]
    options = parse_args([*common, "--model", "debiformer_tiny", "--batch_size", "32", *args.options])
    if options.task != "classification" or options.data_set != "IMNET":
        raise UsageError("benchmarks.loader measures folders of classified images: leave out --task and --data_set")
    rows = measure(options, args.images, args.repeats)
    about = f"{args.images} images of {args.data_path or '500 x 375 pixels, cut out of two photographs'}"
    result = {"machine": describe_machine(torch.device("cpu")), "data": about, "options": args.options, "rows": rows}
    return result, page_of(result)


if __name__ == "__main__":
    exit_on_error("benchmarks.loader", main)
