"""Models in other formats, each read back and compared before it is kept.

python -m tools.export --model debiformer_tiny --checkpoint tiny.pth --format onnx --output tiny.onnx

onnx: one file, for any batch size and, of this project's models, any image size; needs onnx, onnxscript and
onnxruntime; with --int8, in 8-bit integers. openvino: a folder with the same for OpenVINO; needs onnx, onnxscript and
openvino. aoti: a package that PyTorch runs without the model's code, for any batch size; aoti_dynamic: one for any
image size, too; both need g++. executorch, litert: programs for phones and small devices, of up to eight images or of
one; need executorch or litert_torch. tensorrt: an engine for this machine's GPU; needs onnx, onnxscript and tensorrt.
safetensors: the weights, as timm's `checkpoint_path` takes them. hf: a folder for the Hugging Face Hub, or for
timm.create_model("local-dir:FOLDER"). docs/EXPORT.md says how each is used.
"""

import importlib
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import safetensors.torch
import timm
import torch
from timm.data import ImageNetInfo
from timm.models import save_for_hf
from torch import Tensor

from models.backbone import Backbone
from models.labels import in_words
from runtime.errors import UsageError, exit_on_error
from tasks.classification.transforms import pixels_for

from . import onnx_format, runtime_formats
from .card import model_card
from .loading import UNTRAINED, Loaded, load_from, model_parser

ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
FOLDERS = ("hf", "openvino")
"""Formats that are folders."""
TOLERANCE = 1e-4
"""Largest difference of logits that is let pass, as a fraction of the largest logit."""
INT8_TOLERANCE = 0.05
"""Share of the images of calibration that 8-bit integers may give another class."""


def export_onnx(loaded: Loaded, path: Path) -> float:
    """Write the model as one file, see `onnx_format.write`.

    Returns how far onnxruntime's logits are off, see `largest_difference`. UsageError if a package is missing or torch
    cannot export the model.
    """
    need("--format onnx", ONNX_PACKAGES)
    write_onnx(loaded, path)
    session = importlib.import_module("onnxruntime").InferenceSession(path, providers=["CPUExecutionProvider"])
    return largest_difference(loaded, lambda images: session.run(None, {"images": images})[0])


def export_int8(loaded: Loaded, path: Path, place: str) -> float:
    """Write what `export_onnx` writes in 8-bit integers, calibrated on images: see `int8.calibration_images`.

    Returns the share of these images that it gives another class than the model. UsageError as `export_onnx`, or for
    images that cannot be read.
    """
    need("--int8", ONNX_PACKAGES)
    int8 = importlib.import_module("tools.int8")  # imports these packages
    images = int8.calibration_images(loaded, place)
    with tempfile.TemporaryDirectory() as folder:
        onnx = Path(folder, "model.onnx")
        write_onnx(loaded, onnx)
        int8.quantize(onnx, path, images)
    session = importlib.import_module("onnxruntime").InferenceSession(path, providers=["CPUExecutionProvider"])
    batches = images.split(int8.BATCH)
    found = torch.cat([torch.from_numpy(session.run(None, {"images": batch.numpy()})[0]) for batch in batches])
    expected = torch.cat([loaded.model(batch) for batch in batches])
    return float((found.argmax(1) != expected.argmax(1)).float().mean())


def export_openvino(loaded: Loaded, path: Path) -> float:
    """Write a folder with `model.xml` and `model.bin`, in float32: what `onnx_format.write` writes, for OpenVINO.

    Returns how far OpenVINO's logits are off, as `export_onnx` does. UsageError likewise.
    """
    need("--format openvino", ("onnx", "onnxscript", "openvino"))
    openvino = importlib.import_module("openvino")
    path.mkdir()
    with tempfile.TemporaryDirectory() as folder:
        onnx = Path(folder, "model.onnx")
        write_onnx(loaded, onnx)
        openvino.save_model(openvino.convert_model(onnx), path / "model.xml", compress_to_fp16=False)
    # OpenVINO computes in bfloat16 where a processor is faster so.
    compiled = openvino.Core().compile_model(path / "model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return largest_difference(loaded, lambda images: compiled(images)[0])


def need(what: str, packages: Sequence[str]) -> None:
    """UsageError, naming what to install, unless the packages that `what` takes are there."""
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise UsageError(f"{what} needs {', '.join(missing)}: pip install {' '.join(missing)}")


def write_onnx(loaded: Loaded, path: Path) -> None:
    """See `onnx_format.write`; UsageError in one line if torch cannot export the model."""
    try:
        onnx_format.write(loaded.model, loaded.options.input_size, path)
    except torch.onnx.OnnxExporterError as error:
        cause = str(error.__cause__ or error).strip().partition("\n")[0]
        raise UsageError(f"torch.onnx cannot export {loaded.options.model}: {cause}") from error


def largest_difference(
    loaded: Loaded, run: runtime_formats.Run, any_size: bool = True, any_batch: bool = True
) -> float:
    """See `difference`: the largest for several batch sizes and, for this project's models, at `odd_sizes`.

    any_size, any_batch: whether what was exported takes them.
    """
    inputs = [random_images(loaded, batch) for batch in ((1, 3) if any_batch else (1,))]
    if any_size and isinstance(loaded.model, Backbone) and loaded.model.auto_pad:
        inputs += [random_images(loaded, 1, sides) for sides in odd_sizes(loaded.options.input_size)]
    return max(difference(loaded, images, torch.from_numpy(run(images.numpy()))) for images in inputs)


def export_for_runtime(kind: str, loaded: Loaded, path: Path) -> float:
    """Write the model in one of `runtime_formats.FORMATS`.

    Returns how far its runtime's logits are off, as `export_onnx` does. UsageError likewise.
    """
    form = runtime_formats.FORMATS[kind]
    need(f"--format {kind}", form.packages)
    form.write(loaded.model, loaded.options.input_size, path)
    return largest_difference(loaded, form.load(path), form.any_size, form.any_batch)


def export_safetensors(loaded: Loaded, path: Path) -> float:
    """Write the weights; the file's metadata holds the model's name, arguments, image size, crop and classes as JSON.

    `models.weights.load_checkpoint` brings them back. Returns how far the logits of the weights in the file are off.
    """
    options, pixels = loaded.options, pixels_for(loaded.options)
    description = {
        "model": options.model,
        "model_kwargs": options.model_kwargs,
        "input_size": options.input_size,
        "crop_pct": pixels.crop_pct,
        "interpolation": pixels.interpolation,
        "mean": pixels.mean,
        "std": pixels.std,
        "classes": loaded.labels,
    }
    weights = {name: value.contiguous() for name, value in loaded.model.state_dict().items()}
    safetensors.torch.save_file(weights, path, {name: json.dumps(value) for name, value in description.items()})
    images = random_images(loaded, 2)
    logits = torch.func.functional_call(loaded.model, safetensors.torch.load_file(path), images)
    return difference(loaded, images, logits)


def export_hf(loaded: Loaded, path: Path) -> float:
    """Write a folder with weights, configuration and model card, as timm's models on the Hugging Face Hub have them.

    Returns how far the logits of the model that timm builds from it are off.
    """
    size = loaded.options.input_size
    save_for_hf(
        loaded.model,
        path,
        model_config={
            "label_names": loaded.labels,
            "label_descriptions": dict(zip(loaded.labels, in_words(loaded.labels), strict=True)),
            "pretrained_cfg": {"tag": training_of(loaded)},
        },
        data_config={"input_size": (3, size, size), **asdict(pixels_for(loaded.options))},
        safe_serialization=True,
    )
    # timm reads the number of classes beside the arguments, and transformers passes it to timm a second time.
    config = json.loads((path / "config.json").read_text())
    del config["model_args"]["num_classes"]
    (path / "config.json").write_text(json.dumps(config, indent=2))
    (path / "README.md").write_text(model_card(loaded))
    images = random_images(loaded, 2)
    return difference(loaded, images, timm.create_model(f"local-dir:{path}", pretrained=True).eval()(images))


def training_of(loaded: Loaded) -> str:
    """What timm's configurations tell apart by a tag: `in1k` if trained on ImageNet-1K's classes, or `untrained`."""
    if not loaded.trained:
        return "untrained"
    return "in1k" if loaded.labels == ImageNetInfo().label_names() else ""


FORMATS: dict[str, Callable[[Loaded, Path], float]] = {
    "onnx": export_onnx,
    "openvino": export_openvino,
    **{kind: partial(export_for_runtime, kind) for kind in runtime_formats.FORMATS},
    "safetensors": export_safetensors,
    "hf": export_hf,
}


def random_images(loaded: Loaded, batch: int, sides: tuple[int, int] | None = None) -> Tensor:
    """(batch, 3, H, W) for these sides or, if None, those that the model is for; the same in every call."""
    height, width = sides or (loaded.options.input_size,) * 2
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(batch))


def odd_sizes(size: int, count: int = 20) -> list[tuple[int, int]]:
    """Heights and widths from 32 to size + 32 pixels, most of which divide into nothing; the same in every call."""
    sides = torch.randint(32, size + 33, (count, 2), generator=torch.Generator().manual_seed(size))
    return [(height, width) for height, width in sides.tolist()]


def difference(loaded: Loaded, images: Tensor, logits: Tensor) -> float:
    """The largest difference between these logits and the model's, as a fraction of the largest logit."""
    expected = loaded.model(images)
    return float((logits - expected).abs().max() / expected.abs().max())


def make_readable(path: Path) -> None:
    """Give a file, or those in a folder, their new folder's permissions: safetensors leaves files to their owner."""
    mode = path.parent.stat().st_mode & 0o666
    for file in path.iterdir() if path.is_dir() else [path]:
        file.chmod(mode)


@torch.no_grad()
def export(loaded: Loaded, kind: str, path: Path, calibrate: str = "") -> float:
    """Write the model to `path` in one of FORMATS, whole or not at all. Returns how far its logits are off.

    calibrate: where images are; if given, writes and returns what `export_int8` does.
    UsageError if they are off by more than TOLERANCE, or the path cannot be written.
    """
    if kind in FOLDERS and path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UsageError(f"{path} exists already; choose another --output")
    if kind not in FOLDERS and path.is_dir():
        raise UsageError(f"{path} is a folder; --format {kind} writes a file: --output {path / 'model'}.{kind}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as folder:
            temporary = Path(folder, "written", path.name)
            temporary.parent.mkdir()
            error = export_int8(loaded, temporary, calibrate) if calibrate else FORMATS[kind](loaded, temporary)
            if calibrate and error > INT8_TOLERANCE:
                raise UsageError(f"in 8-bit integers {error:.0%} of the images of calibration change class; not kept")
            if not calibrate and not error <= TOLERANCE:
                raise UsageError(f"the logits of what was exported are off by {error:.1e} of the largest; not kept")
            make_readable(temporary)
            os.replace(temporary, path)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}; choose another --output") from error
    return error


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = model_parser("tools.export", "Write a model in another format, and check what was written.")
    parser.add_argument("--format", required=True, choices=FORMATS, help="what to write")
    parser.add_argument("--output", required=True, type=Path, help=f"file, or folder for {' and '.join(FOLDERS)}")
    parser.add_argument(
        "--int8", default="", metavar="IMAGES", help="onnx in 8-bit integers, calibrated on a folder's images or DIGITS"
    )
    args, loaded = load_from(parser, argv)
    if args.int8 and args.format != "onnx":
        raise UsageError(f"--int8 is for --format onnx, not {args.format}")
    if not loaded.trained:
        print(UNTRAINED)
    error = export(loaded, args.format, args.output, args.int8)
    off = f"{error:.1%} of the images change class" if args.int8 else f"its logits differ by {error:.1e} of the largest"
    print(f"Wrote {args.output}; read back, {off}")


if __name__ == "__main__":
    exit_on_error("tools.export", main)
