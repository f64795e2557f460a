"""What the kernels of a model's step cost at least on a GPU, told by the compiler: no GPU is needed.

python -m benchmarks.floors                                debiformer_tiny, inference and training, sm_90
python -m benchmarks.floors --model biformer_tiny --all    also every block that could be chosen, not only the chosen
python -m benchmarks.floors --kernels masked routed.back   only kernels whose names begin so
python -m benchmarks.floors --choose                       writes the lowest floors to models/ops/launches.json
python -m benchmarks.floors --write                        also writes benchmarks/results/
python -m benchmarks.floors --beside convnext_tiny         modelled, beside another model than swin_tiny

Every Triton launch is compiled at its real shape. Its roof: the bytes of its inputs and outputs, each once, at the
bandwidth of a copy. Its floor: the instructions that its warps issue, and the operations of its matrix instructions, at
the GPU's rates. No launch can be faster than either; a floor above the roof means that instructions bind.
"""

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.ops import launch_triton
from models.ops.launch_triton import Block, Launch
from runtime.errors import exit_on_error

from . import launch_path_triton
from .markdown import table
from .measure import DTYPES, RESULTS, describe_machine, write_result
from .step_model import compiled_seconds, eager_seconds
from .trace import Call, run_body, trace

TASKS = ("inference", "training")
PEER = "swin_tiny_patch4_window7_224"


@dataclass(frozen=True)
class Gpu:
    """Rates of a GPU. bandwidth: of a copy, bytes/s; matrix: of half-precision products, operations/s."""

    name: str
    multiprocessors: int
    clock: float
    bandwidth: float
    matrix: float
    shared_memory: int

    @property
    def issue(self) -> float:
        """Warp instructions per second."""
        return self.multiprocessors * 4 * self.clock


GPUS = {
    80: Gpu("A100", 108, 1.41e9, 1.7e12, 280e12, 164 * 1024),
    90: Gpu("H100", 132, 1.755e9, 3.0e12, 798e12, 228 * 1024),
    100: Gpu("B200", 148, 1.85e9, 6.5e12, 1.8e15, 228 * 1024),
}


def recorded_launches(call: Call) -> list[Launch]:
    """The Triton launches of one of our operators."""
    found: list[Launch] = []
    launch_triton.observers.append(found.append)
    try:
        run_body(call)
    finally:
        launch_triton.observers.remove(found.append)
    return found


def floor_of(launch: Launch, block: Block, architecture: int) -> dict[str, Any]:
    """Seconds of roof and floor, and what the code uses, of a launch by one block."""
    from .machine_code_triton import compile_launch

    gpu = GPUS[architecture]
    code = compile_launch(launch.kernel, block, launch.arguments, architecture)
    programs, trips = launch.programs(block), launch.kernel.trips(launch.arguments, block)
    tensors = {id(x): x for x in launch.arguments.values() if isinstance(x, Tensor)}
    count = sum(x.numel() * x.element_size() for x in tensors.values())
    return {
        "block": list(block),
        "programs": programs,
        "bytes": count,
        "roof": count / gpu.bandwidth,
        "issue": programs * code.instructions(trips) / gpu.issue,
        "matrix": programs * code.flops(trips) / gpu.matrix,
        "registers": code.registers,
        "spilled": code.spilled,
        "shared": code.shared,
        "warps_resident": code.resident_warps(gpu.shared_memory),
    }


def time_of(row: dict[str, Any]) -> float:
    """Seconds that a launch takes at least."""
    return max(row["roof"], row["issue"], row["matrix"])


def measure(
    calls: Iterable[Call], architecture: int, every_block: bool, kernels: tuple[str, ...] = ("",)
) -> list[dict[str, Any]]:
    """One row per different launch (and block, if asked for), in the order in which they first run.

    kernels: how the names of those begin that are compiled.
    """
    by_call: dict[str, tuple[Call, int]] = {}
    for call in calls:
        if call.ours:
            key = repr((call.name, call.arguments))
            by_call[key] = call, by_call.get(key, (call, 0))[1] + 1
    rows = []
    for call, times in by_call.values():
        for launch in recorded_launches(call):
            if not launch.kernel.name.startswith(kernels):
                continue
            chosen = launch.kernel.choose(launch.size, launch.arguments)
            for block in launch.kernel.fitting(launch.size, launch.arguments) if every_block else [chosen]:
                shapes = [list(x.shape) for x in launch.arguments.values() if isinstance(x, Tensor)]
                rows.append(
                    {
                        "operator": call.operator,
                        "kernel": launch.kernel.name,
                        "class": launch.kernel.size_class(launch.size, launch.arguments),
                        "shape": shapes[0],
                        "times": times,
                        "chosen": block == chosen,
                        **floor_of(launch, block, architecture),
                    }
                )
    return rows


def summary(calls: Sequence[Call], rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Sums over a step."""
    chosen = [row for row in rows if row["chosen"]]
    others = [call for call in calls if not call.ours]
    return {
        "seconds": sum(row["times"] * time_of(row) for row in chosen),
        "attention_seconds": sum(row["times"] * time_of(row) for row in chosen if "attention" in row["operator"]),
        "roof": sum(row["times"] * row["roof"] for row in chosen),
        "launches": sum(row["times"] for row in chosen),
        "kernels": sum(row["times"] for row in chosen) + sum(call.kernels for call in others),
        "bytes_of_others": sum(call.bytes for call in others),
        "bytes": sum(call.bytes for call in others) + sum(row["times"] * row["bytes"] for row in chosen),
        "spilled": max((row["spilled"] for row in rows), default=0),
    }


def modelled(
    calls: Sequence[Call], rows: Sequence[dict[str, Any]], architecture: int, step_seconds: Callable[..., float]
) -> float:
    """Seconds that the whole step would take, PyTorch's operators among it: see `step_model`, where step_seconds is."""
    floors = [(row["times"], time_of(row)) for row in rows if row["chosen"]]
    return step_seconds(calls, floors, GPUS[architecture])


HEADER = ("kernel", "shape", "times", "block", "programs", "roof (us)", "issue (us)", "matrix (us)")
HEADER += ("registers", "spilled (B)", "warps/SM")


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        *(row["kernel"], "x".join(map(str, row["shape"])), f"{row['times']}"),
        *(" ".join(map(str, row["block"])), f"{row['programs']}"),
        *(f"{1e6 * row[name]:.1f}" for name in ("roof", "issue", "matrix")),
        *(f"{row['registers']}", f"{row['spilled']}", f"{row['warps_resident']}"),
    )


def report(result: dict[str, Any]) -> str:
    """The page."""
    parts = [
        "# What the kernels cost at least",
        f"{result['model']}, batch {result['batch_size']}, {result['size']} pixels, {result['dtype']}, "
        f"{result['gpu']} (sm_{result['architecture']}), Triton {result['machine']['triton']}; computed, not measured.",
    ]
    for task, part in result["tasks"].items():
        total = part["summary"]
        parts += [
            f"## {task}",
            f"Our kernels {1e3 * total['seconds']:.3f} ms (attention {1e3 * total['attention_seconds']:.3f} ms), "
            f"their roof {1e3 * total['roof']:.3f} ms; {total['launches']:.0f} of {total['kernels']:.0f} kernels; "
            f"{total['bytes'] / 1e9:.1f} GB, of which {total['bytes_of_others'] / 1e9:.1f} GB by PyTorch's operators; "
            f"at most {total['spilled']:.0f} bytes spilled. "
            "Python takes {:.1f} ms from our operators to their launches, {:.1f} ms of them for attention.".format(
                *(1e3 * seconds for seconds in launch_path_triton.sums(part["python"]))
            ),
            *modelled_lines("eager", part.get("eager_seconds", {}), result["batch_size"]),
            *modelled_lines("compiled", part.get("compiled_seconds", {}), result["batch_size"]),
            table(HEADER, [cells(row) for row in part["rows"]], text_columns=2),
        ]
    return "\n\n".join(parts)


def modelled_lines(how: str, seconds: dict[str, float], batch_size: int) -> list[str]:
    """A paragraph on steps of these models, run so, the first one's first."""
    if not seconds:
        return []
    (own, *_), peers = seconds.values(), list(seconds.items())[1:]
    beside = "".join(f"; {name} {1e3 * time:.1f} ms, {time / own:.2f} times as long" for name, time in peers)
    return [f"The whole step, {how}, modelled: {1e3 * own:.1f} ms, {batch_size / own:.0f} images/s{beside}."]


def best_blocks(rows: Iterable[dict[str, Any]]) -> dict[str, dict[str, list[int]]]:
    """Per kernel and size class the block without spills of the lowest sum of times, as the launcher's table has it."""
    times: dict[tuple[str, str], dict[tuple[int, ...], float]] = {}
    for row in rows:
        blocks = times.setdefault((row["kernel"], row["class"]), {})
        cost = time_of(row) if row["spilled"] == 0 else float("inf")
        # Where several are as fast, the one that issues least.
        blocks[tuple(row["block"])] = blocks.get(tuple(row["block"]), 0) + row["times"] * (cost + 0.1 * row["issue"])
    found: dict[str, dict[str, list[int]]] = {}
    for (kernel, size), blocks in times.items():
        found.setdefault(kernel, {})[size] = list(min(blocks, key=blocks.__getitem__))
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        "benchmarks.floors", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="debiformer_tiny", help="of this project or of timm")
    parser.add_argument("--beside", nargs="*", default=[PEER], help="models of timm, modelled, too")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--architecture", type=int, choices=tuple(GPUS), default=90, help="compute capability")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--size", type=int, default=224, help="pixels")
    parser.add_argument("--kernels", nargs="+", default=[""], help="how the names of those begin that are compiled")
    parser.add_argument("--all", action="store_true", help="every block that could be chosen")
    parser.add_argument("--choose", action="store_true", help="write the best blocks to models/ops/launches.json")
    parser.add_argument("--write", action="store_true", help="write the results")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for --write")
    args = parser.parse_args(argv)

    tasks = {}
    for task in args.tasks:
        calls = trace(args.model, task, args.batch_size, args.size, DTYPES[args.dtype])
        rows = measure(calls, args.architecture, args.all or args.choose, tuple(args.kernels))
        python = launch_path_triton.python_seconds(args.model, task, args.size, DTYPES[args.dtype])
        tasks[task] = {"summary": summary(calls, rows), "python": python, "rows": rows}
        if args.kernels == [""]:
            steps = {name: trace(name, task, args.batch_size, args.size, DTYPES[args.dtype]) for name in args.beside}
            for way in (eager_seconds, compiled_seconds) if task == "inference" else (eager_seconds,):
                peers = {name: modelled(calls, [], args.architecture, way) for name, calls in steps.items()}
                own = {args.model: modelled(calls, rows, args.architecture, way)}
                tasks[task][way.__name__] = {**own, **peers}
    if args.choose:
        known = launch_triton.read_table(launch_triton.TABLE)
        for kernel, sizes in best_blocks(row for part in tasks.values() for row in part["rows"]).items():
            known.setdefault(kernel, {}).update(sizes)
        launch_triton.write_table(known, launch_triton.TABLE)
    result = {
        "machine": describe_machine(torch.device("cpu")),
        **{"model": args.model, "batch_size": args.batch_size, "size": args.size, "dtype": args.dtype},
        **{"architecture": args.architecture, "gpu": GPUS[args.architecture].name, "tasks": tasks},
    }
    if args.write:
        write_result(f"floors-{args.model}-sm{args.architecture}", result, report(result), args.results)
    print(report(result))


if __name__ == "__main__":
    exit_on_error("benchmarks.floors", main)
