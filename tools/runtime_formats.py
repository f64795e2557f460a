"""A classifier as a file for runtimes of their own, and back as a function of images.

Programs hold plain operators alone (the backend "export"), so that what runs them needs nothing of this project.
"""

import contextlib
import importlib
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.nn.attention import SDPBackend, sdpa_kernel

from models.backbone import Backbone
from models.fusion import fuse
from models.ops.backend import use_backend
from runtime.errors import UsageError

from . import onnx_format

Run = Callable[[np.ndarray], np.ndarray]
"""Images (batch, 3, height, width) float32 -> logits (batch, classes)."""
LARGEST_BATCH = 16
"""That an engine of TensorRT takes."""


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


def program(model: nn.Module, size: int, any_batch: bool = True) -> ExportedProgram:
    """The model as torch.export has it, for any batch of images of size x size pixels, or for one image.

    UsageError if it cannot be.
    """
    model, images = fused(model), torch.zeros(2 if any_batch else 1, 3, size, size)
    try:
        with _plainly():
            return torch.export.export(model, (images,), dynamic_shapes=({0: Dim("batch")},) if any_batch else None)
    except Exception as error:  # torch.export has no error of its own
        raise UsageError(f"torch.export cannot export the model: {str(error).strip().splitlines()[0]}") from error


# -- AOTInductor: machine code for this kind of processor, for PyTorch in Python or C++


def write_aoti(model: nn.Module, size: int, path: Path) -> None:
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise UsageError(f"--format aoti compiles with {compiler}, which is missing: apt-get install g++")
    with _plainly(), path.open("wb+") as file:
        torch._inductor.aoti_compile_and_package(program(model, size), package_path=file)


def load_aoti(path: Path) -> Run:
    run = torch._inductor.aoti_load_package(str(path))
    return lambda images: run(torch.from_numpy(images)).numpy()


# -- ExecuTorch: a program for phones and small devices, by XNNPACK


def write_executorch(model: nn.Module, size: int, path: Path) -> None:
    xnnpack = importlib.import_module("executorch.backends.xnnpack.partition.xnnpack_partitioner")
    exir = importlib.import_module("executorch.exir")
    exported = program(model, size, any_batch=False)
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
    interpreter = importlib.import_module("ai_edge_litert.interpreter").Interpreter(str(path))
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
    shapes = ((1, 3, least, least), (8, 3, size, size), (LARGEST_BATCH, 3, most, most))
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
    "executorch": Format(write_executorch, load_executorch, ("executorch",), any_batch=False),
    "litert": Format(write_litert, load_litert, ("litert_torch",), any_batch=False),
    "tensorrt": Format(write_tensorrt, load_tensorrt, ("onnx", "onnxscript", "tensorrt"), any_size=True),
}
