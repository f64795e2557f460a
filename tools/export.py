"""Models in other formats, each read back and compared before it is kept.

python -m tools.export --model debiformer_tiny --checkpoint tiny.pth --format onnx --output tiny.onnx

onnx: one file, for any batch size; needs onnx, onnxscript and onnxruntime. safetensors: the weights, as timm's
`checkpoint_path` takes them. hf: a folder for the Hugging Face Hub, or for timm.create_model("local-dir:FOLDER").
"""

import contextlib
import importlib
import io
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import safetensors.torch
import timm
import torch
from timm.data import ImageNetInfo
from timm.models import save_for_hf
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from models.labels import in_words
from models.ops.backend import use_backend
from runtime.errors import UsageError, exit_on_error
from tasks.classification.transforms import pixels_for

from .loading import UNTRAINED, Loaded, load_from, model_parser

ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
TOLERANCE = 1e-4
"""Largest difference of logits that is let pass, as a fraction of the largest logit."""

MODEL_CARD = """---
library_name: timm
pipeline_tag: image-classification
---
# {name}

Images of {size} x {size} pixels, {classes} classes{papers}. In a checkout of the project that defines the model:

```python
import timm, models

model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()
```

With transformers, once `models` is imported: `AutoModelForImageClassification.from_pretrained("FOLDER")`.
"""


def export_onnx(loaded: Loaded, path: Path) -> float:
    """Write the model as one file: `images` (batch, 3, S, S) -> `logits` (batch, classes), for any batch size.

    Returns how far onnxruntime's logits are off, see `difference`. UsageError if a package is missing or torch
    cannot export the model.
    """
    missing = [name for name in ONNX_PACKAGES if find_spec(name) is None]
    if missing:
        raise UsageError(f"--format onnx needs {', '.join(missing)}: pip install {' '.join(missing)}")
    # ONNX knows no operators of this project, and has no strides, which fused attention would leave in the graph.
    plain = contextlib.ExitStack()
    plain.enter_context(use_backend("reference"))
    plain.enter_context(sdpa_kernel(SDPBackend.MATH))
    with plain, warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            torch.onnx.export(
                loaded.model,
                (random_images(loaded, 2),),
                path,
                dynamo=True,
                input_names=["images"],
                output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                external_data=False,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            cause = str(error.__cause__ or error).strip().partition("\n")[0]
            raise UsageError(f"torch.onnx cannot export {loaded.options.model}: {cause}") from error
    session = importlib.import_module("onnxruntime").InferenceSession(path, providers=["CPUExecutionProvider"])
    return max(
        difference(loaded, images, torch.from_numpy(session.run(None, {"images": images.numpy()})[0]))
        for images in (random_images(loaded, 1), random_images(loaded, 3))
    )


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
    papers = loaded.model.pretrained_cfg.get("paper_ids")
    card = MODEL_CARD.format(
        name=loaded.options.model, size=size, classes=len(loaded.labels), papers=f"; see {papers}" if papers else ""
    )
    (path / "README.md").write_text(card)
    images = random_images(loaded, 2)
    return difference(loaded, images, timm.create_model(f"local-dir:{path}", pretrained=True).eval()(images))


def training_of(loaded: Loaded) -> str:
    """What timm's configurations tell apart by a tag: `in1k` if trained on ImageNet-1K's classes, or `untrained`."""
    if not loaded.trained:
        return "untrained"
    return "in1k" if loaded.labels == ImageNetInfo().label_names() else ""


FORMATS: dict[str, Callable[[Loaded, Path], float]] = {
    "onnx": export_onnx,
    "safetensors": export_safetensors,
    "hf": export_hf,
}


def random_images(loaded: Loaded, batch: int) -> Tensor:
    """(batch, 3, S, S), the same in every call."""
    size = loaded.options.input_size
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(batch))


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
def export(loaded: Loaded, kind: str, path: Path) -> float:
    """Write the model to `path` in one of FORMATS, whole or not at all. Returns how far its logits are off.

    UsageError if they are off by more than TOLERANCE, or the path cannot be written.
    """
    if kind == "hf" and path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UsageError(f"{path} exists already; choose another --output")
    if kind != "hf" and path.is_dir():
        raise UsageError(f"{path} is a folder; --format {kind} writes a file: --output {path / 'model'}.{kind}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as folder:
            temporary = Path(folder, "written", path.name)
            temporary.parent.mkdir()
            error = FORMATS[kind](loaded, temporary)
            if not error <= TOLERANCE:
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
    parser.add_argument("--output", required=True, type=Path, help="file, or folder for hf")
    args, loaded = load_from(parser, argv)
    if not loaded.trained:
        print(UNTRAINED)
    error = export(loaded, args.format, args.output)
    print(f"Wrote {args.output}; read back, its logits differ by {error:.1e} of the largest")


if __name__ == "__main__":
    exit_on_error("tools.export", main)
