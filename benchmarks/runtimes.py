"""How long exported models take for a batch, beside a model of timm in the same runtime.

python -m benchmarks.runtimes                    debiformer_tiny and swin_tiny in ONNX Runtime and PyTorch
python -m benchmarks.runtimes --runtimes onnxruntime onnxruntime-int8 openvino aoti pytorch --batch_sizes 8 --write

--write writes benchmarks/results/. Every model is written as `tools.export` writes it, with random weights, which takes
minutes; --folder keeps the files. LiteRT takes the images of a batch one by one. Models take turns, one runtime after
the other: threads that wait for more work in a loop would hold the cores of the runtime whose turn is next.
"""

import argparse
import contextlib
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Runtime:
    """How a model is written for a runtime, and run by it.

    load(model, path, threads): what runs the file or, where there is none, the model. write(model, size, path): writes
    it. ending: of the file's name; runtimes that share it share the file. package: what it takes besides torch.
    """

    load: Callable[[nn.Module, Path, int], Run]
    write: Callable[[nn.Module, int, Path], None] | None = None
    ending: str = ""
    package: str = ""

    @property
    def installed(self) -> bool:
        return not self.package or find_spec(self.package) is not None


def write_int8(model: nn.Module, size: int, path: Path) -> None:
    """What `tools.export --int8` writes, calibrated on noise, from the file in float32 beside it."""
    from tools import int8

    source = path.with_name(path.name.replace(".int8", ""))
    if not source.exists():
        onnx_format.write(model, size, source)
    int8.quantize(source, path, torch.randn(int8.BATCH, 3, size, size))


def in_onnxruntime(model: nn.Module, path: Path, threads: int) -> Run:
    """The file in ONNX Runtime, on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # As far as a session lets one ask for it: the other model's turn is next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": images.numpy()})


def in_openvino(model: nn.Module, path: Path, threads: int) -> Run:
    """The file in OpenVINO, on the CPU, computed in float32."""
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    compiled = openvino.Core().compile_model(path, "CPU", settings)
    return lambda images: compiled(images.numpy())


def by_format(kind: str, ending: str) -> Runtime:
    """What `tools.export --format` writes, as it is read back there."""
    form = FORMATS[kind]

    def load(model: nn.Module, path: Path, threads: int) -> Run:
        run = form.load(path)
        if form.any_batch:
            return lambda images: run(images.numpy())
        return lambda images: [run(image) for image in images.numpy()[:, None]]

    return Runtime(load, form.write, ending, *form.packages)


def in_pytorch(model: nn.Module, path: Path, threads: int) -> Run:
    """The model itself, in channels-last memory."""
    model = model.to(memory_format=torch.channels_last)
    return lambda images: model(images.contiguous(memory_format=torch.channels_last))


RUNTIMES = {
    "onnxruntime": Runtime(in_onnxruntime, onnx_format.write, ".onnx", "onnxruntime"),
    "onnxruntime-int8": Runtime(in_onnxruntime, write_int8, ".int8.onnx", "onnxruntime"),
    "openvino": Runtime(in_openvino, onnx_format.write, ".onnx", "openvino"),
    "aoti": by_format("aoti", ".pt2"),
    "executorch": by_format("executorch", ".pte"),
    "litert": by_format("litert", ".tflite"),
    "pytorch": Runtime(in_pytorch),
}


def prepare(name: str, runtimes: Sequence[str], folder: Path, threads: int) -> tuple[tuple[int, ...], dict[str, Run]]:
    """The shape of a model's image, and what runs it in each runtime; a file that is in the folder is taken."""
    model = timm.create_model(name).eval()
    shape, runs = model.default_cfg["input_size"], {}
    for key in runtimes:
        runtime = RUNTIMES[key]
        path = folder / f"{name}{runtime.ending}"
        if runtime.write and not path.exists():
            try:
                runtime.write(model, shape[-1], path)
            except BaseException:
                path.unlink(missing_ok=True)
                raise
        runs[key] = runtime.load(model, path, threads)
    return shape, runs


@torch.no_grad()
def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of every repeat per model, runtime and batch size, as JSON takes it."""
    torch.set_num_threads(args.threads)
    with contextlib.ExitStack() as stack:
        folder = args.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        prepared = {name: prepare(name, args.runtimes, folder, args.threads) for name in args.models}
        runs = {(name, runtime): run for name, (_, each) in prepared.items() for runtime, run in each.items()}
        rows = []
        for batch in args.batch_sizes:
            images = {name: torch.randn(batch, *shape) for name, (shape, _) in prepared.items()}
            for runtime in args.runtimes:
                tasks = {name: lambda run=runs[name, runtime], x=x: run(x) for name, x in images.items()}
                with torch.inference_mode():
                    times = interleaved_seconds(tasks, args.repeats, torch.device("cpu"))
                for name, seconds in times.items():
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
    parser.add_argument("--folder", type=Path, help="keep exported models here, and take those that are here already")
    parser.add_argument("--write", action="store_true", help="write the results")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for --write")
    args = parser.parse_args(argv)
    for runtime in args.runtimes:
        if not RUNTIMES[runtime].installed:
            raise UsageError(f"--runtimes {runtime} is not installed: pip install {RUNTIMES[runtime].package}")
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
