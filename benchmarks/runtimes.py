"""How long exported models take for a batch, beside a model of timm in the same runtime.

python -m benchmarks.runtimes                    debiformer_tiny and swin_tiny in ONNX Runtime and PyTorch
python -m benchmarks.runtimes --runtimes onnxruntime openvino aoti pytorch --write      also writes benchmarks/results/

Every model is written as `tools.export` writes it, with random weights; all models and runtimes take turns.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from runtime.errors import UsageError, exit_on_error
from tools import onnx_format
from tools.runtime_formats import FORMATS

from .markdown import table
from .measure import RESULTS, describe_machine, interleaved_seconds, machine_line, write_result

MODELS = ("debiformer_tiny", "swin_tiny_patch4_window7_224")
Run = Callable[[Tensor], object]


def in_onnxruntime(model: nn.Module, onnx: Path, threads: int) -> Run:
    """The file in ONNX Runtime, on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": images.numpy()})


def in_openvino(model: nn.Module, onnx: Path, threads: int) -> Run:
    """The file in OpenVINO, on the CPU, computed in float32."""
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    compiled = openvino.Core().compile_model(onnx, "CPU", settings)
    return lambda images: compiled(images.numpy())


def in_aoti(model: nn.Module, onnx: Path, threads: int) -> Run:
    """The model compiled by AOTInductor."""
    form, path = FORMATS["aoti"], onnx.with_suffix(".pt2")
    form.write(model, model.default_cfg["input_size"][-1], path)
    run = form.load(path)
    return lambda images: run(images.numpy())


def in_pytorch(model: nn.Module, onnx: Path, threads: int) -> Run:
    """The model itself, in channels-last memory."""
    model = model.to(memory_format=torch.channels_last)
    return lambda images: model(images.contiguous(memory_format=torch.channels_last))


RUNTIMES: dict[str, Callable[[nn.Module, Path, int], Run]] = {
    "onnxruntime": in_onnxruntime,
    "openvino": in_openvino,
    "aoti": in_aoti,
    "pytorch": in_pytorch,
}
OF_PYTORCH = {"aoti", "pytorch"}
"""Those that take neither a package nor an ONNX file."""


@torch.no_grad()
def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of every repeat per model, runtime and batch size, as JSON takes it."""
    torch.set_num_threads(args.threads)
    runs: dict[tuple[str, str], Run] = {}
    inputs: dict[str, tuple[int, ...]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in args.models:
            model = timm.create_model(name).eval()
            inputs[name] = model.default_cfg["input_size"]
            file = Path(folder, f"{name}.onnx")
            if not set(args.runtimes) <= OF_PYTORCH:
                onnx_format.write(model, inputs[name][-1], file)
            runs.update({(name, runtime): RUNTIMES[runtime](model, file, args.threads) for runtime in args.runtimes})
        rows = []
        for batch in args.batch_sizes:
            images = {name: torch.randn(batch, *size) for name, size in inputs.items()}
            tasks = {key: lambda run=run, x=images[key[0]]: run(x) for key, run in runs.items()}
            with torch.inference_mode():
                times = interleaved_seconds(tasks, args.repeats, torch.device("cpu"))
            for (name, runtime), seconds in times.items():
                rows.append({"model": name, "runtime": runtime, "batch": batch, "seconds": seconds})
    return {"machine": describe_machine(torch.device("cpu")), "rows": rows}


def report(result: dict[str, Any]) -> str:
    """The page: milliseconds, and how many times as fast a model is as the last one in the same runtime."""
    times = {(r["model"], r["runtime"], r["batch"]): statistics.median(r["seconds"]) for r in result["rows"]}
    last = result["rows"][-1]["model"]
    lines = [
        (name, runtime, f"{batch}", f"{1e3 * seconds:.1f}", f"{times[last, runtime, batch] / seconds:.2f}")
        for (name, runtime, batch), seconds in times.items()
    ]
    header = ("model", "runtime", "batch", "ms", f"times as fast as {last}")
    return "\n\n".join(
        ["# Exported models", machine_line(result["machine"]) + ".", table(header, lines, text_columns=2)]
    )


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        "benchmarks.runtimes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=MODELS, help="the last one is what the others are compared with")
    parser.add_argument("--runtimes", nargs="+", choices=RUNTIMES, default=("onnxruntime", "pytorch"))
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=(1, 8))
    parser.add_argument("--repeats", type=int, default=11, help="rounds of timing")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--write", action="store_true", help="write the results")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for --write")
    args = parser.parse_args(argv)
    for runtime in args.runtimes:
        if runtime not in OF_PYTORCH and find_spec(runtime) is None:
            raise UsageError(f"--runtimes {runtime} is not installed: pip install {runtime}")
    for name in args.models:
        if not timm.is_model(name):
            raise UsageError(f"--models {name}: timm knows no such model")
    result = measure(args)
    if args.write:
        write_result("runtimes", result, report(result), args.results)
    else:
        print(report(result))


if __name__ == "__main__":
    exit_on_error("benchmarks.runtimes", main)
