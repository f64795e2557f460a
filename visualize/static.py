"""A page that needs no server: python -m visualize.static --checkpoint FILE --output debiformer.html

One HTML file with a model as ONNX, onnxruntime-web that runs it and the page that draws. Needs onnx and onnxscript, and
once, to fetch onnxruntime-web, npm and a network.
"""

import base64
import gzip
import json
import math
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.colors import to_hex
from PIL import Image
from torch import Tensor, nn

from runtime.errors import OneLineParser, UsageError, exit_on_error
from runtime.plot_style import COLOURS
from tasks.classification.sources import Digits
from tools.export import need
from tools.make_photos import photographs
from tools.onnx_format import exporting

from . import maps
from .capture import Capture, Layer, capture
from .images import LARGEST_SIDE, LONGEST_PROPORTION, SMALLEST_SIDE, open_image
from .npm import npm_package
from .panels import AGENTS_SHOWN, Query
from .report import STYLE, UNTRAINED, UNTRAINED_HINT
from .session import PHOTO_SIDE
from .shapes import QUERY, RANKS, ramp
from .subject import Subject, load_classifier
from .svg import data_url

MODEL = "debiformer_nano"
PACKAGE = "onnxruntime-web"
SCRIPT, WASM = "ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"
DIGITS = (4, 8)
"""Which of scikit-learn's digits for evaluation are among the samples."""
CREDITS = (
    " The flower is by vultilion, the temple by danielbuechele (Flickr, CC BY 2.0), the portrait by the U.S. Navy "
    "(public domain); the digits are of UCI's Optical Recognition of Handwritten Digits (CC BY 4.0)."
)


class Seen(nn.Module):
    """What the page draws of an image, as one graph."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor, point: Tensor) -> dict[str, Tensor]:
        """Return `probabilities` (classes) and, as LAYER.KEY, the values of every layer, see `values_of`.

        Args:
            image: (1, 3, height, width) float32, normalised.
            point: x and y of a pixel, (2) int64.
        """
        x, y = point.tolist()
        for place, side in ((x, image.shape[3]), (y, image.shape[2])):
            torch._check(place >= 0)
            torch._check(place < side)
        found = capture(self.model, image)
        values = {
            f"{number}.{key}": value
            for number, layer in enumerate(found.layers)
            for key, value in values_of(layer, *maps.token_at(layer, found.size, x, y)).items()
        }
        return {"probabilities": found.logits.softmax(-1), **values}


def values_of(layer: Layer, row: int, column: int) -> dict[str, Tensor]:
    """Return what the page draws of a layer about one of its tokens.

    Letters as in `models.attention_maps`. `attention` (m, H, W) of the token; `windows` (P, k) int32; of agents where
    they start and end in pixels, (ha, wa, g, 2) each, their `shares` (m, ha, wa) of all tokens' attention, what of the
    token's own they get, `listens` (m, Ha, Wa), and what they read, `reads` (Ha, Wa, H, W).
    """
    values = {"attention": layer.maps.token_attention(row, column)}
    if layer.routing:
        values["windows"] = layer.routing.idx.int()
    if agents := layer.agents:
        ha, wa = agents.agents
        start, end = maps.agent_pixels(layer)
        values |= {"start": start, "end": end, "shares": agents.agent_shares()[:, :ha, :wa]}
        values |= {"listens": agents.token_to_agents()[:, row, column], "reads": agents.agent_reads().mean(0)}
    return values


def outline(layer: Layer) -> dict[str, Any]:
    """Return what the page knows of a layer beforehand."""
    return {
        "stage": layer.stage,
        "block": layer.block,
        "stride": layer.stride,
        "tokens": layer.maps.tokens,
        "heads": layer.maps.num_heads,
        "n_win": layer.routing.n_win if layer.routing else 1,
        "agents": layer.agents.agents if layer.agents else None,
    }


@torch.no_grad()
def graph_of(subject: Subject) -> tuple[bytes, Capture]:
    """Return `Seen` of a model as ONNX, and a capture with the layers that it names.

    Raises:
        UsageError: torch cannot export the model.
    """
    from onnxscript import optimizer

    image, point = torch.zeros(1, 3, subject.input_size, subject.input_size), torch.tensor([0, 0])
    seen = Seen(subject.model).eval()
    names = list(seen(image, point))
    with exporting(), tempfile.TemporaryDirectory() as folder:
        try:
            program = torch.onnx.export(
                seen, (image, point), dynamo=True, verbose=False, optimize=False, output_names=names
            )
        except torch.onnx.OnnxExporterError as error:
            cause = str(error.__cause__ or error).strip().partition("\n")[0]
            raise UsageError(f"torch.onnx cannot export {subject.name}: {cause}") from error
        # All that onnxscript can do, its rules tried at every node, would take four times as long.
        for simplify in (optimizer.inline, optimizer.fold_constants, optimizer.remove_unused_nodes):
            simplify(program.model)
        path = Path(folder, "model.onnx")
        program.save(path)
        return path.read_bytes(), capture(subject.model, image)


def samples() -> dict[str, Image.Image]:
    """Return the pictures that come with the page, by name."""
    digits = Digits(train=False)
    return photographs() | {f"digit {label}": image for image, label in map(digits.__getitem__, DIGITS)}


def page_of(subject: Subject, runtime: Path, pictures: dict[str, Image.Image], credits: str = "") -> str:
    """Return the page.

    Args:
        subject: the model.
        runtime: folder of the package onnxruntime-web.
        pictures: samples, RGB, by their names.
        credits: who is to be named for them.

    Raises:
        UsageError: the folder is of no such package, or torch cannot export the model.
    """
    try:
        script, wasm = ((runtime / "dist" / name).read_bytes() for name in (SCRIPT, WASM))
        version = json.loads((runtime / "package.json").read_text())["version"]
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"{runtime} is no {PACKAGE}: {error}; leave --onnxruntime_web out to fetch it") from error
    graph, found = graph_of(subject)
    pixels, side = subject.pixels, subject.input_size
    data = {
        "side": side,
        "resized": math.floor(side / pixels.crop_pct),
        "interpolation": pixels.interpolation,
        "longest": LONGEST_PROPORTION,
        "photo": PHOTO_SIDE,
        "sides": (SMALLEST_SIDE, LARGEST_SIDE),
        "mean": pixels.mean,
        "std": pixels.std,
        "classes": subject.classes,
        "layers": [outline(layer) for layer in found.layers],
        "stage": Query.stage if side > 128 else 1,  # later maps of a small picture have but a few tokens
        "shown": AGENTS_SHOWN,
        "heat": ramp(np.linspace(0, 1, 256)).tolist(),
        "ranks": [to_hex(colour) for colour in RANKS(range(256))],
        "groups": COLOURS,
        "query": QUERY,
        "samples": [(name, data_url(subject.view(picture), "PNG")) for name, picture in pictures.items()],
    }
    alarm = "" if subject.trained else f'<p class="alarm"><strong>{UNTRAINED}</strong>{UNTRAINED_HINT}</p>'
    parts = {
        "NAME": escape(subject.name),
        "FACTS": escape(replace(subject, origin=Path(subject.origin).name).facts),
        "ALARM": alarm,
        "STYLE": STYLE,
        "CREDITS": escape(f"Computed in this browser, by onnxruntime-web {version} (Microsoft, MIT).{credits}"),
        "DATA": json.dumps(data).replace("<", "\\u003c"),
        "SCRIPT": _packed(script),
        "WASM": _packed(wasm),
        "MODEL": _packed(graph),
    }
    template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    return re.sub("__([A-Z]+)__", lambda match: parts[match[1]], template)


def _packed(content: bytes) -> str:
    return base64.b64encode(gzip.compress(content, mtime=0)).decode()


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = OneLineParser(prog="python -m visualize.static", allow_abbrev=False, description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", help=f"a debiformer or biformer model (default: the checkpoint's, or else {MODEL})")
    add("--checkpoint", metavar="FILE", help="trained weights, such as a run's best.pth")
    add("--images", metavar="IMAGE", nargs="+", help="samples on the page (default: photographs and digits)")
    add("--onnxruntime_web", metavar="FOLDER", type=Path, help="the npm package, unpacked (default: npm fetches it)")
    add("--output", metavar="FILE", type=Path, default=Path("debiformer.html"), help="(default: debiformer.html)")
    options = parser.parse_args(argv)
    need("the page", ("onnx", "onnxscript"))
    pictures = {Path(path).stem: open_image(path) for path in options.images or ()}
    subject = load_classifier(options.model or (None if options.checkpoint else MODEL), options.checkpoint)
    if options.output.is_dir():
        raise UsageError(f"{options.output} is a folder; choose a file as --output")
    if not subject.trained:
        print(f"{subject.name} has {UNTRAINED}: the page shows the mechanism, nothing learnt", file=sys.stderr)
    runtime = options.onnxruntime_web or npm_package(PACKAGE)
    page = page_of(subject, runtime, pictures) if pictures else page_of(subject, runtime, samples(), CREDITS)
    try:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write {options.output}: {error.strerror}; choose another --output") from error
    print(f"Wrote {options.output} ({len(page) / 1e6:.0f} MB): open it in a browser")


if __name__ == "__main__":
    exit_on_error("visualize.static", main)
