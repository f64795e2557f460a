"""A classifier's ONNX file in 8-bit integers.

Convolutions, as which all layers of maps are exported, are quantized: their weights per output channel, what they take
and give by the range that it has for some images. What chooses windows and places agents stays in float32: where a
choice falls otherwise, other tokens are read.
"""

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from models.pixels import normalize
from runtime.errors import UsageError
from tasks.classification.sources import Digits
from tasks.loading import open_image

from .loading import Loaded

IMAGES, BATCH = 256, 16
"""How many images are looked at, and at a time."""
CHOOSERS = ("TopK", "Floor")
"""Operators that choose: windows by their scores, and the tokens around an agent."""


def calibration_images(loaded: Loaded, place: str, count: int = IMAGES) -> Tensor:
    """Images as the model takes them, (count, 3, H, W) or fewer, spread over what is there.

    place: a folder, in which they are at any depth, or DIGITS, scikit-learn's digits for training.
    UsageError if there are none, or one cannot be read.
    """
    if place == "DIGITS":
        digits = Digits(train=True)
        images = [digits[number][0] for number in spread(len(digits), count)]
    else:
        found = sorted(path for path in Path(place).rglob("*") if path.suffix.lower() in IMG_EXTENSIONS)
        if not found:
            raise UsageError(f"--int8 {place}: there are no images; name a folder of images, or DIGITS")
        images = (open_image(str(found[number])) for number in spread(len(found), count))
    return torch.cat([as_taken(loaded, image) for image in images])


def as_taken(loaded: Loaded, image: Image.Image) -> Tensor:
    """An image as the model takes it: (1, 3, H, W)."""
    task = loaded.task_on("cpu")
    return normalize(task.transform(train=False)({"image": image})["image"][None], task.pixels)


def spread(length: int, count: int) -> list[int]:
    """Up to `count` numbers below `length`, evenly."""
    count = min(length, count)
    return [number * length // count for number in range(count)]


class Batches(CalibrationDataReader):
    """Images (N, 3, H, W), a few at a time."""

    def __init__(self, images: Tensor) -> None:
        self.batches: Iterator[Tensor] = iter(images.split(BATCH))

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self.batches, None)
        return None if batch is None else {"images": batch.numpy()}


def choosing(graph: onnx.GraphProto) -> list[str]:
    """Names of the convolutions whose outputs a chooser sees without another convolution in between."""
    producers = {output: node for node in graph.node for output in node.output}
    waiting = [node for node in graph.node if node.op_type in CHOOSERS]
    seen, found = set(), set()
    while waiting:
        for name in waiting.pop().input:
            node = producers.get(name)
            if node is None or node.name in seen or node.op_type == "Shape":
                continue
            seen.add(node.name)
            if node.op_type == "Conv":
                found.add(node.name)
            else:
                waiting.append(node)
    return sorted(found)


def quantize(source: Path, target: Path, images: Tensor) -> None:
    """Write the float32 model at `source` in 8-bit integers, by the ranges that it has for these images."""
    program = onnx.load(source)
    logging.disable(logging.WARNING)  # it advises what was done already
    try:
        quantize_static(
            program,
            target,
            Batches(images),
            op_types_to_quantize=["Conv"],
            nodes_to_exclude=choosing(program.graph),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
    finally:
        logging.disable(logging.NOTSET)
