"""Top-1 with a larger teacher's labels of tokens, or its features, beside plain training at equal epochs.

    python -m benchmarks.teachers                  trains what is not trained yet, and prints the tables
    python -m benchmarks.teachers --write          also writes benchmarks/results/teachers.json and .md

Two sets that need no download: scanned digits (scikit-learn's, `--data_set DIGITS`) and forms in clutter
(`python -m tools.make_clutter`). On each, the teacher is trained by the ordinary run, at the size at which its label
maps are made; then students, debiformer_nano and a BiFormer of its size, are trained plainly, with token labels, and
with the teacher's features, from several seeds each. A set's students of one model differ in nothing else: epochs,
rates, augmentation and initial weights are the same, and no images are mixed. Figures are those of the last weights.
A run that is done is not repeated, and one that was interrupted goes on.
"""

import argparse
import itertools
import json
import multiprocessing
import statistics
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import main as training
from runtime.checkpoint import BEST
from runtime.distributed import DistInfo
from runtime.errors import OneLineParser, UsageError, exit_on_error
from tasks.options import with_recipe
from tasks.token_labeling import generate
from tasks.token_labeling.maps import INDEX, write_atomically
from tools import make_clutter

from .markdown import table
from .measure import RESULTS, describe_machine, machine_line, write_result

FIGURES = "figures.json"
BATCH = 50
SIDE = 64
Values = dict[str, Any]

COMMON: Values = {
    **{"input_size": SIDE, "batch_size": BATCH, "accum_steps": 1, "model_ema": False, "clip_grad": 5.0},
    **{"aa": None, "color_jitter": None, "reprob": 0.0, "repeated_aug": False, "crop_pct": 1.0},
    **{"warmup_epochs": 0, "num_workers": 0, "device": "cpu", "print_freq": 20, "checkpoint_minutes": 2.0},
}
STUDENT: Values = {"lr": 8e-3, "drop_path": 0.05}
BIFORMER: Values = {
    **{"embed_dims": [32, 64, 96, 128], "depths": [1, 1, 2, 1], "num_heads": [1, 2, 3, 4], "mlp_ratios": [2, 2, 2, 2]},
    **{"n_win": 2, "topk": [1, 2, 4, None]},
}
STUDENTS: dict[str, Values] = {
    "debiformer_nano": {"model": "debiformer_nano"},
    "biformer": {"model": "biformer_tiny", "model_kwargs": BIFORMER},
}
TEACHER: Values = {
    "model": "resnet10t",
    "lr": 1e-2,
    "drop_path": 0.0,
    "amp": "bf16",
    "model_kwargs": {"output_stride": 16},
}
PLAIN: Values = {"mixup": 0.0, "cutmix": 0.0}
NAMES = {"plain": "plain", "tokens": "token labels", "features": "features"}


@dataclass(frozen=True)
class Study:
    """A set, and how long it is learnt. train: images; options: of its data; epochs: of the students."""

    title: str
    train: int
    epochs: int
    teacher_epochs: int
    options: Mapping[str, Any]


STUDIES = {
    "clutter": Study("Forms in clutter", 1500, 12, 20, {"data_set": "IMNET", "scale": [0.3, 1.0], "hflip": 0.5}),
    "digits": Study("Digits", 1437, 8, 12, {"data_set": "DIGITS", "scale": [0.6, 1.0], "hflip": 0.0}),
}


def length(study: Study, epochs: int) -> Values:
    """Options that train for so many epochs with one evaluation, after the last of them."""
    updates = epochs * study.train // BATCH
    return {"iterations": updates, "eval_every": updates, "warmup_updates": updates // 10}


def options_of(study: Study, place: Path, variant: str, seed: int, student: str = "debiformer_nano") -> Values:
    """The options of a run. place: the folder of its set; variant: "teacher", or one of `NAMES` for a student."""
    values = {**COMMON, **study.options, "seed": seed}
    if study.options["data_set"] == "IMNET":
        values["data_path"] = str(place / "data")
    if variant == "teacher":
        return {**values, **TEACHER, **PLAIN, **length(study, study.teacher_epochs)}
    values |= {**STUDENT, **STUDENTS[student], **length(study, study.epochs)}
    if variant == "tokens":
        own = {"tl_maps": str(place / "maps"), "tl_target": "label", "tl_stage3": True, "tl_mix": False}
        return {**values, "task": "token_labeling", **own}
    values |= PLAIN
    if variant == "features":
        teacher = {"teacher_model": TEACHER["model"], "teacher_path": str(place / "teacher" / BEST)}
        values |= {"distill": "features", **teacher}
    return values


def train(folder: Path, values: Values) -> float:
    """Top-1 of a run, which is trained unless it has been. UsageError if the folder holds another one."""
    file = folder / FIGURES
    if file.exists():
        content = json.loads(file.read_text())
        if content["options"] != values:
            raise UsageError(f"{folder} holds a run with other options; choose another --output, or remove it")
        return content["acc1"]
    torch.set_num_threads(1)
    figures = training.run(with_recipe({**values, "output_dir": str(folder)}))
    write_atomically(file, json.dumps({"acc1": figures["test_acc1"], "options": values}, indent=1).encode())
    return figures["test_acc1"]


def prepare(study: Study, place: Path) -> float:
    """Train the teacher, and make its maps, unless they are there. Returns its top-1."""
    values = options_of(study, place, "teacher", seed=0)
    accuracy = train(place / "teacher", values)
    argv = ["--data_set", values["data_set"], "--data_path", values.get("data_path", "")]
    argv += ["--teacher", values["model"], "--teacher_path", str(place / "teacher" / BEST)]
    argv += ["--output", str(place / "maps"), "--input_size", str(SIDE), "--num_workers", "0", "--device", "cpu"]
    if not (place / "maps" / INDEX).exists():
        generate.generate(generate.parse(argv), DistInfo())
    return accuracy


def make_data(study: Study, place: Path) -> None:
    """Draw the images of a set that needs it, unless they are there."""
    folder = place / "data"
    if study.options["data_set"] != "IMNET" or folder.exists():
        return
    partial = place / "data.partial"
    make_clutter.write(partial, train=study.train)
    partial.rename(folder)


def run_all(root: Path, names: Sequence[str], seeds: int, at_once: int) -> Values:
    """Train whatever is missing. Returns, per set, the teacher's top-1 and the students' by model and variant."""
    found: Values = {}
    with ProcessPoolExecutor(at_once, multiprocessing.get_context("spawn")) as pool:

        def start(study: Study, place: Path, variants: Sequence[str]) -> dict[tuple[str, str, int], Future]:
            jobs = itertools.product(STUDENTS, variants, range(seeds))
            return {
                (student, variant, seed): pool.submit(
                    train,
                    place / f"{student}-{variant}-{seed}",
                    options_of(study, place, variant, seed, student),
                )
                for student, variant, seed in jobs
            }

        for name in names:
            study, place = STUDIES[name], root / name
            make_data(study, place)
            teacher = pool.submit(prepare, study, place)
            runs = start(study, place, ["plain"])  # which need no teacher
            accuracy = teacher.result()
            runs |= start(study, place, ["tokens", "features"])
            figures = {job: run.result() for job, run in runs.items()}
            students = {
                student: {variant: [figures[student, variant, seed] for seed in range(seeds)] for variant in NAMES}
                for student in STUDENTS
            }
            found[name] = {"teacher": accuracy, "students": students}
    return found


def compare(students: Mapping[str, Sequence[float]]) -> list[str]:
    """The table of one model's top-1 by variant, and what it says."""
    plain = students["plain"]
    rows, verdicts = [], []
    for variant, values in students.items():
        gains = [value - other for value, other in zip(values, plain, strict=True)]
        gain = statistics.mean(gains)
        spread = max(statistics.stdev(values), statistics.stdev(plain))
        each = ", ".join(f"{value:.1f}" for value in values)
        summary = f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"
        rows.append([NAMES[variant], each, summary, f"{gain:+.1f} ± {statistics.stdev(gains):.1f}"])
        if variant != "plain":
            word = "more" if gain > spread else "not more"
            verdicts.append(f"{NAMES[variant]}: {gain:+.1f} points, {word} than the spread of {spread:.1f}")
    rows[0][-1] = ""
    header = ["trained", "top-1 per seed (%)", "mean ± deviation", "gain, seed for seed"]
    return [table(header, rows), f"Better than plain by: {'; '.join(verdicts)}."]


def report(sets: Mapping[str, Any]) -> str:
    """The tables of all sets."""
    parts = []
    for name, figures in sets.items():
        study = STUDIES[name]
        parts += [
            f"## {study.title}",
            f"{study.epochs} epochs of {study.train} images at {SIDE} pixels. Teacher: {TEACHER['model']}, "
            f"{study.teacher_epochs} epochs, top-1 {figures['teacher']:.1f} %.",
        ]
        for student, values in figures["students"].items():
            parts += [f"### {student}", *compare(values)]
    return "\n\n".join(parts)


def main() -> None:
    parser = OneLineParser(
        "python -m benchmarks.teachers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sets", nargs="+", choices=STUDIES, default=list(STUDIES), help="default: all")
    parser.add_argument("--seeds", type=int, default=3, help="students of each kind, at least 2")
    parser.add_argument("--at_once", type=int, default=1, metavar="N", help="train so many students at a time")
    parser.add_argument("--output", type=Path, default=Path("outputs/teachers"), help="folder of the runs")
    parser.add_argument("--write", action="store_true", help="write the results")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for --write")
    args = parser.parse_args()
    if args.seeds < 2 or args.at_once < 1:
        parser.error("--seeds must be at least 2, --at_once at least 1")
    sets = run_all(args.output, args.sets, args.seeds, args.at_once)
    torch.set_num_threads(1)
    machine, tables = describe_machine(torch.device("cpu")), report(sets)
    print(tables)
    if args.write:
        text = f"# What teachers are worth\n\n{machine_line(machine)}.\n\n{tables}"
        write_result("teachers", {"machine": machine, "sets": sets}, text, args.results)


if __name__ == "__main__":
    exit_on_error("benchmarks.teachers", main)
