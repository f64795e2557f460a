"""A classifier as a file for runtimes of their own, and back as a function of images.

Programs hold plain operators alone (the backend "export"), so that what runs them needs nothing of this project.
"""

import contextlib
import importlib
import multiprocessing
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.export.pt2_archive._package import load_pt2, package_pt2
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from models.backbone import Backbone
from models.fusion import fuse
from models.ops.backend import use_backend
from runtime.errors import UsageError
from tasks.loading import usable_workers

from . import onnx_format

Run = Callable[[np.ndarray], np.ndarray]
"""Images (batch, 3, height, width) float32 -> logits (batch, classes)."""
LARGEST_BATCH = {"executorch": 8, "tensorrt": 16}
"""How many images a program takes at once, where it has to say so."""


@dataclass(frozen=True)
class Format:
    """A file for a runtime.

    write(model, size, path): for images of size x size pixels, or, if it is `any_size`, this project's models for any.
    UsageError if that cannot be. load(path): what runs it. packages: what both take besides torch. any_batch: whether
    images come in batches, or one by one.
    """

    write: Callable[[nn.Module, int, Path], None]
    load: Callable[[Path], Run]
    packages: tuple[str, ...] = ()
    any_size: bool = False
    any_batch: bool = True


@contextlib.contextmanager
def _plainly() -> Iterator[None]:
    """Within the block, models are traced in plain operators, without words."""
    with use_backend("export"), sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def fused(model: nn.Module) -> nn.Module:
    """The model with fewer operations, if it is this project's; others are left as they are."""
    return fuse(model) if isinstance(model, Backbone) else model


def program(model: nn.Module, example: Tensor, varied: dict[int, Any]) -> ExportedProgram:
    """The model as torch.export has it, for inputs as long as `example` along all axes but those `varied`.

    UsageError if it cannot be.
    """
    try:
        with _plainly():
            return torch.export.export(model, (example,), dynamic_shapes=(varied,))
    except Exception as error:  # torch.export has no error of its own
        raise UsageError(f"torch.export cannot export the model: {str(error).strip().splitlines()[0]}") from error


# -- AOTInductor: machine code for this kind of processor, for PyTorch in Python or C++


def write_aoti(model: nn.Module, size: int, path: Path) -> None:
    _need_compiler("aoti")
    exported = program(fused(model), torch.zeros(2, 3, size, size), {0: Dim("batch")})
    with _plainly(), path.open("wb+") as file:
        torch._inductor.aoti_compile_and_package(exported, package_path=file, inductor_configs={"freezing": True})


def load_aoti(path: Path) -> Run:
    run = torch._inductor.aoti_load_package(str(path))
    return lambda images: run(torch.from_numpy(images)).numpy()


def write_aoti_dynamic(model: nn.Module, size: int, path: Path) -> None:
    """Write the modules that the model runs one after the other as programs "0", "1", ... of one package.

    The sides of a map are then simple terms of those of one module's input; Inductor would take hours over terms that
    go through all stages. It takes minutes over one module still, so that all cores compile.
    """
    if not isinstance(model, Backbone):
        raise UsageError("--format aoti_dynamic is for this project's models; others take one size: --format aoti")
    _need_compiler("aoti_dynamic")
    package(list(onnx_format.with_examples(fuse(model))), path)


def package(modules: Sequence[tuple[nn.Module, Tensor]], path: Path) -> None:
    """Write modules, each with an input to trace it with, as programs that take any batch, height and width."""
    files = {}
    with ProcessPoolExecutor(usable_workers(len(modules)), multiprocessing.get_context("spawn")) as pool:
        compiled = pool.map(_compiled, *zip(*modules, strict=True))
        for number, written in enumerate(tqdm(compiled, "compiling", len(modules), leave=False, unit="module")):
            files[f"{number}"] = written
    with path.open("wb+") as file:
        package_pt2(file, aoti_files=files)


def _compiled(module: nn.Module, example: Tensor) -> list[Any]:
    """The files of a program for any batch, height and width. For processes of which there is one per core."""
    torch.set_num_threads(1)
    with torch.no_grad():
        exported = program(module, example, dict.fromkeys((0, 2, 3), Dim.DYNAMIC))
        with _plainly():
            options = {"aot_inductor.package": True}
            return torch._inductor.aot_compile(exported.module(), (example,), options=options)


def load_aoti_dynamic(path: Path) -> Run:
    with path.open("rb") as file:
        programs = load_pt2(file).aoti_runners
    modules = [programs[f"{number}"] for number in range(len(programs))]

    def run(images: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(images)
        for module in modules:
            x = module(x)
        return x.numpy()

    return run


def _need_compiler(kind: str) -> None:
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise UsageError(f"--format {kind} compiles with {compiler}, which is missing: apt-get install g++")


# -- ExecuTorch: a program for phones and small devices, by XNNPACK


def write_executorch(model: nn.Module, size: int, path: Path) -> None:
    xnnpack = importlib.import_module("executorch.backends.xnnpack.partition.xnnpack_partitioner")
    exir = importlib.import_module("executorch.exir")
    # XNNPACK takes shapes of which one axis varies.
    batch = Dim("batch", min=1, max=LARGEST_BATCH["executorch"])
    exported = program(fused(model), torch.zeros(2, 3, size, size), {0: batch})
    with _plainly():
        lowered = exir.to_edge_transform_and_lower(exported, partitioner=[xnnpack.XnnpackPartitioner()])
        path.write_bytes(lowered.to_executorch().buffer)


def load_executorch(path: Path) -> Run:
    method = importlib.import_module("executorch.runtime").Runtime.get().load_program(path).load_method("forward")
    return lambda images: method.execute([torch.from_numpy(images)])[0].numpy()


# -- LiteRT, once TensorFlow Lite: a program for phones and microcontrollers


def write_litert(model: nn.Module, size: int, path: Path) -> None:
    litert = importlib.import_module("litert_torch")
    model = fused(model)
    with _plainly():
        litert.convert(model, (torch.zeros(1, 3, size, size),)).export(str(path))


def load_litert(path: Path) -> Run:
    threads = torch.get_num_threads()
    interpreter = importlib.import_module("ai_edge_litert.interpreter").Interpreter(str(path), num_threads=threads)
    interpreter.allocate_tensors()
    (given,), (found,) = interpreter.get_input_details(), interpreter.get_output_details()

    def run(images: np.ndarray) -> np.ndarray:
        interpreter.set_tensor(given["index"], images)
        interpreter.invoke()
        return interpreter.get_tensor(found["index"])

    return run


# -- TensorRT: an engine for this machine's GPU


def write_tensorrt(model: nn.Module, size: int, path: Path) -> None:
    if not torch.cuda.is_available():
        raise UsageError("--format tensorrt builds for the GPU it finds, and finds none: run it where nvidia-smi does")
    trt = importlib.import_module("tensorrt")
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    with tempfile.TemporaryDirectory() as folder:
        onnx = Path(folder, "model.onnx")
        onnx_format.write(model, size, onnx)
        if not parser.parse_from_file(str(onnx)):
            raise UsageError(f"TensorRT cannot read the model: {parser.get_error(0).desc()}")
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    config.clear_flag(trt.BuilderFlag.TF32)
    least, most = (32, 2 * size) if isinstance(model, Backbone) else (size, size)
    shapes = ((1, 3, least, least), (8, 3, size, size), (LARGEST_BATCH["tensorrt"], 3, most, most))
    profile.set_shape("images", *shapes)
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise UsageError("TensorRT cannot build an engine of the model; its words are above")
    path.write_bytes(engine)


def load_tensorrt(path: Path) -> Run:
    trt = importlib.import_module("tensorrt")
    engine = trt.Runtime(trt.Logger(trt.Logger.ERROR)).deserialize_cuda_engine(path.read_bytes())
    context = engine.create_execution_context()

    def run(images: np.ndarray) -> np.ndarray:
        given = torch.from_numpy(images).cuda()
        context.set_input_shape("images", tuple(given.shape))
        logits = torch.empty(tuple(context.get_tensor_shape("logits")), device="cuda")
        for name, tensor in (("images", given), ("logits", logits)):
            context.set_tensor_address(name, tensor.data_ptr())
        context.execute_async_v3(torch.cuda.current_stream().cuda_stream)
        return logits.cpu().numpy()

    return run


FORMATS = {
    "aoti": Format(write_aoti, load_aoti),
    "aoti_dynamic": Format(write_aoti_dynamic, load_aoti_dynamic, any_size=True),
    "executorch": Format(write_executorch, load_executorch, ("executorch",)),
    "litert": Format(write_litert, load_litert, ("litert_torch",), any_batch=False),
    "tensorrt": Format(write_tensorrt, load_tensorrt, ("onnx", "onnxscript", "tensorrt"), any_size=True),
}
