"""Whether this checkout is slower than an earlier commit: the quickstart and the models' steps, in turns.

    python -m benchmarks.commits 52caef5                  beside the tree before tasks/ and runtime/ were there
    python -m benchmarks.commits main~5 --turns 5 --write    also writes benchmarks/results/commits-cpu.md

The earlier commit is written to a temporary folder and runs with the same Python and libraries. Each turn runs, in
processes of their own, first one tree and then the other: the quickstart, `python main.py`, and `python -m
benchmarks.speed`. What counts is the median over the turns.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from runtime.errors import UsageError, exit_on_error

from .markdown import table
from .measure import RESULTS, describe_machine, machine_line, write_result

ROOT = Path(__file__).parents[1]
SPEED = ("--backends", "torch", "--modes", "eager", "--repeats", "5", "--no_memory", "--no_floor", "--write")


def run(tree: Path, *command: str) -> float:
    """Seconds of a Python command in a tree. UsageError with its last line if it fails."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, *command], cwd=tree, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise UsageError(f"python {' '.join(command)} failed in {tree}: {last}")
    return time.perf_counter() - began


def take_turn(tree: Path, models: Sequence[str]) -> dict[str, float]:
    """Seconds of the quickstart, and of a step of each model, in one tree."""
    with tempfile.TemporaryDirectory() as folder:
        seconds = {"quickstart": run(tree, "main.py", "--output_dir", folder)}
        run(tree, "-m", "benchmarks.speed", "--models", *models, *SPEED, "--results", folder, "--images", folder)
        rows = json.loads(Path(folder, "speed-cpu.json").read_text())["rows"]
    return seconds | {f"{row['model']}, {row['task']}": statistics.median(row["seconds"]) for row in rows}


def check_out(commit: str, folder: Path) -> str:
    """Write the files of a commit into a folder; returns its full name. UsageError if git knows no such commit."""
    named = subprocess.run(
        ["git", "rev-parse", "--verify", "--quiet", f"{commit}^{{commit}}"], cwd=ROOT, capture_output=True, text=True
    )
    if named.returncode:
        raise UsageError(f"git knows no commit {commit} here; git log shows those there are")
    name = named.stdout.strip()
    archive = subprocess.run(["git", "archive", name], cwd=ROOT, capture_output=True, check=True).stdout
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive, check=True)
    return name


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The seconds of every turn of both trees, as JSON takes it."""
    with tempfile.TemporaryDirectory() as folder:
        commit = check_out(args.commit, Path(folder))
        turns: dict[str, list[dict[str, float]]] = {"before": [], "now": []}
        for turn in range(args.turns):
            for name, tree in (("before", Path(folder)), ("now", ROOT)):
                turns[name].append(take_turn(tree, args.models))
                seconds = ", ".join(f"{what} {value:.3f}" for what, value in turns[name][-1].items())
                print(f"turn {turn + 1} of {args.turns}, {name}: {seconds} s", flush=True)
    return {"machine": describe_machine(torch.device("cpu")), "commit": commit, "turns": turns}


def report(result: dict[str, Any]) -> str:
    """The page: medians of both trees, and their ratio."""
    turns = result["turns"]
    rows = []
    for what in turns["now"][0]:
        before, now = (statistics.median(turn[what] for turn in turns[name]) for name in ("before", "now"))
        rows.append((what, f"{before:.3f}", f"{now:.3f}", f"{now / before:.3f}"))
    header = ("seconds", f"{result['commit'][:7]}", "this checkout", "ratio")
    about = f"Medians of {len(turns['now'])} turns, one tree after the other. {machine_line(result['machine'])}."
    return "\n\n".join(["# Beside an earlier commit", about, table(header, rows)])


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.commits", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("commit", help="the earlier one, as git names it")
    parser.add_argument("--models", nargs="+", default=("debiformer_tiny", "biformer_tiny"))
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="also write the results")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where to")
    args = parser.parse_args(argv)
    if args.turns < 1:
        raise UsageError(f"--turns must be at least 1, not {args.turns}")
    result = measure(args)
    print(report(result))
    if args.write:
        write_result("commits", result, report(result), args.results)


if __name__ == "__main__":
    exit_on_error("benchmarks.commits", main)
