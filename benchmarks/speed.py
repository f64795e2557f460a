"""How fast the models infer and train, and what memory that takes, beside models of timm in the same run.

python -m benchmarks.speed                       throughput, memory, the floor of the layers, targets
python -m benchmarks.speed --sweep accuracy      inference of all sizes, beside published accuracy
python -m benchmarks.speed --sweep resolution    time and memory up to 1344x1344 pixels
python -m benchmarks.speed --sweep topk          time and memory against the routed windows k, per backend
python -m benchmarks.speed --sweep deterministic what torch.use_deterministic_algorithms costs
python -m benchmarks.speed --write               also writes benchmarks/results/ and draws docs/images/

Steps are timed one model after the other, round and round; the median counts. A training step is forward,
cross-entropy, backward and AdamW. Maps are in channels-last memory. Peak memory is what a step needs above weights,
optimizer state and images. MFU is the share of the rate of a large matrix product, measured in the same run, that the
convolutions and matrix products of the model reach; a training step counts three times a forward pass.
"""

import argparse
import dataclasses
import itertools
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch

import utils
from models.ops.backend import BACKENDS, choose_backend
from runtime import distributed
from runtime.errors import UsageError, did_you_mean, exit_on_error

from . import plots, report
from .measure import DTYPES, RESULTS, copy_bandwidth, describe_machine, interleaved_seconds, matrix_rate, write_result
from .memory import peak_memory
from .workloads import LARGE_MAPS, MODES, TASKS, Case, build_step, is_ours, layer_floor, step_flops

PEERS = ("swin_tiny_patch4_window7_224", "convnext_tiny", "maxvit_tiny_tf_224")
SIZE_MATES = (
    *("debiformer_tiny", "biformer_tiny", *PEERS),
    *("debiformer_small", "biformer_small", "swin_small_patch4_window7_224", "convnext_small"),
    *("debiformer_base", "biformer_base", "swin_base_patch4_window7_224", "convnext_base"),
)
RESOLUTIONS = (224, 448, 672, 896, 1120, 1344)
TOPK = (1, 2, 4, 8, 16, 32, 49)
SWEEPS = ("accuracy", "resolution", "topk", "deterministic")


@dataclasses.dataclass(frozen=True)
class Defaults:
    """What is measured when nothing is asked for; backends first the fastest. On two cores that is half an hour."""

    backends: tuple[str, ...]
    dtype: str
    batch_size: int


DEFAULTS = {
    "cpu": Defaults(("torch", "reference"), "fp32", 8),
    "cuda": Defaults(("triton", "torch", "reference"), "bf16", 128),
}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "benchmarks.speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sweep", choices=SWEEPS, help="measure a series instead")
    parser.add_argument("--models", nargs="+", help="names of timm, this project's among them")
    parser.add_argument("--tasks", nargs="+", choices=TASKS)
    parser.add_argument("--modes", nargs="+", choices=MODES)
    parser.add_argument(
        "--backends", nargs="+", choices=BACKENDS, help="of this project's attention (all; in sweeps the fastest)"
    )
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="fp32 on a CPU, bf16 on a GPU")
    parser.add_argument("--batch_size", type=int, help="8 on a CPU, 128 on a GPU; in the resolution sweep 1")
    parser.add_argument("--input_size", type=int, nargs="+", help="pixels per side (224)")
    parser.add_argument("--topk", type=int, nargs="+", default=TOPK, help="in the topk sweep")
    parser.add_argument("--repeats", type=int, default=9, help="rounds of timing")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--device", default="auto", help="auto (a GPU if there is one), cuda, cuda:N or cpu")
    parser.add_argument("--no_memory", action="store_true", help="leave out peak memory")
    parser.add_argument("--no_floor", action="store_true", help="leave out the layers timed one by one")
    parser.add_argument("--write", action="store_true", help="write the results and draw them")
    parser.add_argument(
        "--processor", default="", help="a name for it, added to those of the results' files: zen4, zen4-avx2"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for --write")
    parser.add_argument("--images", type=Path, default=plots.IMAGES, help="folder of the plots of --write")
    return parser


def check(args: argparse.Namespace) -> None:
    """UsageError for values that argparse lets through."""
    for name in args.models or ():
        if not timm.is_model(name):
            advice = did_you_mean(name, timm.list_models(), "see timm.list_models()")
            raise UsageError(f"--models {name}: timm knows no such model; {advice}")
    if args.sweep == "topk" and len(args.models or ()) > 1:
        raise UsageError("--sweep topk takes one model")
    for option in ("batch_size", "repeats", "threads"):
        if (value := getattr(args, option)) is not None and value < 1:
            raise UsageError(f"--{option} must be at least 1, not {value}")
    for size in args.input_size or ():
        if size < 32:
            raise UsageError(f"--input_size must be at least 32 pixels, not {size}")


def resolve_backends(names: Sequence[str] | None, device: torch.device, dtype: str) -> list[str]:
    """The backends to measure: those named, or the one that would be chosen. UsageError for one that cannot run."""
    sample = torch.empty(1, 32, device=device, dtype=DTYPES[dtype])
    try:
        return [choose_backend(name, sample, num_heads=1) for name in names or [None]]
    except ValueError as error:
        raise UsageError(str(error)) from error


def topk_arguments(model: str, k: int) -> dict[str, Any]:
    """Arguments of a DeBiFormer with k routed windows in stages 1 to 3, and in stage 4, where tokens are few, its own.

    UsageError for another model, and for more windows than there are.
    """
    if not model.startswith("debiformer"):
        raise UsageError(f"--sweep topk: {model} is no DeBiFormer; choose one by --models")
    with torch.device("meta"):
        router = timm.create_model(model).stages[3][0].attn2.router
    if not 1 <= k <= router.n_win**2:
        raise UsageError(f"--topk {k}: {model} has {router.n_win**2} windows; choose 1 to {router.n_win**2}")
    return {"bra_topk": (k, k, k, None), "agent_topk": (k, k, k, router.topk)}


def plan(args: argparse.Namespace, device: torch.device) -> list[Case]:
    """Every case to measure, from the options and the defaults of device and sweep."""
    defaults = DEFAULTS.get(device.type, DEFAULTS["cpu"])
    dtype = args.dtype or defaults.dtype
    models, tasks, modes = ("debiformer_tiny", "biformer_tiny", *PEERS), TASKS, ("eager", "compiled")
    sizes, batch_size, backends = (224,), defaults.batch_size, args.backends
    variants: Sequence[dict[str, Any]] = ({},)
    if args.sweep:
        modes = ("eager",)
    else:
        backends = backends or defaults.backends
    if args.sweep == "accuracy":
        models, tasks = SIZE_MATES, ("inference",)
    elif args.sweep == "resolution":
        models, sizes, batch_size = ("debiformer_tiny", "convnext_tiny"), RESOLUTIONS, 1
    elif args.sweep == "deterministic":
        models, modes = ("debiformer_tiny",), ("eager", "deterministic")
    elif args.sweep == "topk":
        models, backends = ("debiformer_tiny",), backends or [*resolve_backends(None, device, dtype), "reference"]
        variants = [topk_arguments(name, k) for name in (args.models or models)[:1] for k in args.topk]
    backends = resolve_backends(backends, device, dtype)

    axes = (args.input_size or sizes, args.tasks or tasks, args.modes or modes, args.models or models, variants)
    cases = []
    for size, task, mode, model, variant in itertools.product(*axes):
        if mode == "fused" and task == "training":
            continue
        for backend in backends if is_ours(model) else [None]:
            cases.append(Case(model, args.batch_size or batch_size, task, backend, dtype, size, mode, variant))
    if not (args.sweep or args.dtype) and device.type == "cpu" and computes_bf16():
        cases = [case for fp32 in cases for case in (fp32, *_in_bf16(fp32, backends[0]))]
    return cases


def computes_bf16() -> bool:
    """Whether this processor multiplies bfloat16, as far as PyTorch may use its instructions."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.cpu._is_avx512_bf16_supported()


def _in_bf16(case: Case, backend: str) -> list[Case]:
    """The same case in bfloat16, if it is one of those that are measured in it."""
    wanted = case.mode == "eager" and (case.model, case.backend) in ((report.OURS, backend), (report.PEER, None))
    return [dataclasses.replace(case, dtype="bf16")] if wanted else []


def rounds(cases: Sequence[Case]) -> Iterator[list[Case]]:
    """Cases to be timed in turn: all of one task, mode and size; the deterministic ones with the eager ones."""

    def setting(case: Case) -> tuple[int, str, str]:
        return case.input_size, case.task, "eager" if case.mode == "deterministic" else case.mode

    for _, group in itertools.groupby(cases, setting):
        yield list(group)


def measure_cases(
    cases: Sequence[Case], device: torch.device, repeats: int, memory: bool, rates: Mapping[str, float]
) -> list[dict[str, Any]]:
    """One row per case: the case, seconds of every step, images/s, operations, MFU and peak memory in bytes.

    rates: of a large matrix product, by dtype.
    """
    rows = []
    for group in rounds(cases):
        steps = {number: build_step(case, device) for number, case in enumerate(group)}
        timed = interleaved_seconds(steps, repeats, device)
        del steps
        for number, case in enumerate(group):
            seconds, flops = statistics.median(timed[number]), step_flops(case)
            # A compiler's own memory would hide what the step takes in a fresh process.
            measurable = memory and (device.type != "cpu" or case.mode != "compiled")
            row = {
                **dataclasses.asdict(case),
                "seconds": timed[number],
                "images_per_second": case.batch_size / seconds,
                "flops": flops,
                "mfu": flops / seconds / rates[case.dtype],
                "peak_memory": peak_memory(case, device) if measurable else None,
            }
            rows.append(row)
            print(report.progress(row), flush=True)
    return rows


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Everything asked for, as one dictionary that JSON takes."""
    check(args)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS refuses to be deterministic
    device = utils.choose_device(args.device, distributed.DistInfo())
    torch.set_num_threads(args.threads)
    cases = plan(args, device)
    rates = {case.dtype: matrix_rate(device, DTYPES[case.dtype]) for case in cases}
    result = {
        "machine": describe_machine(device),
        "copy_bandwidth": copy_bandwidth(device),
        "matrix_rate": rates[cases[0].dtype],
        "rows": measure_cases(cases, device, args.repeats, not args.no_memory, rates),
        "floors": {},
        "large_maps": {},
    }
    if not args.sweep:
        if device.type == "cpu" and not args.no_floor:
            eager = [case for case in cases if (case.task, case.mode) == ("inference", "eager")]
            result["floors"] = {case.model: layer_floor(case, device, args.repeats) for case in eager}
        if not args.no_memory:
            result["large_maps"] = {name: peak_memory(name, device) for name in LARGE_MAPS}
    return result


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    args = make_parser().parse_args(argv)
    result = measure(args)
    name = args.sweep or "speed"
    markdown = report.speed_report(name, result)
    print(markdown)
    if args.write:
        write_result(name, result, markdown, args.results, args.processor)
        plots.draw(name, result, args.images, args.processor)


if __name__ == "__main__":
    exit_on_error("benchmarks.speed", main)
