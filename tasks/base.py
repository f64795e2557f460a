"""What a task is: everything about a run that knows what a label means.

The engine, loaders, checkpoints and logs call these methods and know no task. docs/EXTENDING.md adds one.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from models.labels import labels_of
from runtime.distributed import DistInfo
from runtime.errors import UsageError

Sample = dict[str, Any]
"""One example. "image": a path, an open file or a PIL image, and after the transform a uint8 tensor (3, H, W)."""

Batch = dict[str, Any]
"""Several. "images": uint8 (B, 3, H, W), or a list of (3, H, W). As in `Sample`, every other key is the task's."""


class Evaluator(ABC):
    """Sums up an evaluation, on the device, without waiting for it."""

    @abstractmethod
    def update(self, outputs: Any, batch: Batch) -> None:
        """Take in a batch and what the model made of it."""

    @abstractmethod
    def compute(self) -> dict[str, float]:
        """Return the figures, `Task.metric` and "images" among them; all processes call this.

        Raises:
            UsageError: there was nothing to evaluate.
        """


@dataclass(frozen=True)
class Prediction:
    """What a model says of an image: in lines and, where there is something to draw, as the image drawn over."""

    lines: list[str]
    picture: Image.Image | None = None


class Task(ABC):
    """A kind of training: its data, loss and figures.

    Args:
        opts: all options of the run, this task's own among them.
        info: this process among those that train together.
        device: where batches and the model are.
    """

    options: ClassVar[tuple[type, ...]]
    """Dataclasses of the task's own options."""
    lasting: ClassVar[tuple[type, ...]] = ()
    """Those of them that the model and its predictions depend on, and that a checkpoint is therefore asked for."""
    checks: ClassVar[tuple[Callable[[Any], None], ...]] = ()
    """What its options must not contradict: functions of all options that raise UsageError."""
    metric: ClassVar[str]
    """The figure by which the best weights are chosen; larger is better."""
    figures: ClassVar[dict[str, str]]
    """The figures that curves.png shows, and what it calls them."""
    title: ClassVar[str]
    """What the metric is called in a sentence; it is in percent."""

    classes: Sequence[str] = ()
    """Names of the classes by their numbers; empty where nothing names them. Known after `sources`."""
    num_classes: int = 0
    held_out: Sequence[str] = ()
    """Names of images that are evaluated on instead of trained on, where the data does not say; `sources` chooses them
    where they are not known before."""
    repeats: int = 1
    """How often an image comes in a row in training."""

    def __init__(self, opts: Any, info: DistInfo = DistInfo(), device: torch.device | str = "cpu") -> None:  # noqa: B008
        self.opts, self.info, self.device = opts, info, torch.device(device)

    def check(self) -> None:  # noqa: B027 (most tasks have nothing to add)
        """Raise UsageError, before any data is read, for options that only libraries can judge."""

    # -- data

    @abstractmethod
    def sources(self, trained: Sequence[str] = ()) -> tuple[Dataset | None, Dataset]:
        """Open the examples to train on (None when only evaluating) and those to evaluate on.

        Args:
            trained: the classes that the weights know, by number, where they say so.

        Returns:
            Datasets of `Sample`, before the transform; `name_of(index)` says which file a sample is.

        Raises:
            UsageError: the data cannot be used.
        """

    @abstractmethod
    def transform(self, train: bool) -> Callable[[Sample], Sample]:
        """Return what turns a sample into tensors, image and target together.

        It is called under the sample's own seed, of Python's, NumPy's and torch's generators.
        """

    def collate(self, samples: list[Sample]) -> Batch:
        """Put samples together: each key is stacked, and "image" becomes "images", in channels-last memory."""
        rows = [{**sample, "image": sample["image"].permute(1, 2, 0)} for sample in samples]  # as Pillow has them
        batch = default_collate(rows)
        return {"images": batch.pop("image").permute(0, 3, 1, 2), **batch}

    @property
    def eval_batch_size(self) -> int:
        """Images per process and step in evaluation."""
        return int(1.5 * self.opts.batch_size)

    def groups(self, train: Dataset) -> Tensor | None:
        """Return a whole number per image to train on: images of one number share batches. None: any do."""
        return None

    def order(self) -> dict[str, Any]:
        """Return the options that fix which images come when, for checkpoints: they must not change midway."""
        return {}

    # -- model

    @abstractmethod
    def build_model(self) -> nn.Module:
        """Build the model, with random weights. Called after `sources`."""

    @abstractmethod
    def load_pretrained(self, model: nn.Module, weights: dict[str, Tensor], trained: Sequence[str], path: Path) -> list:
        """Start from the weights of another training. Returns the names of parameters that they did not have."""

    # -- training and evaluation

    @abstractmethod
    def preprocess(self, batch: Batch, train: bool) -> Batch:
        """Normalise images that are on the device already and, in training, mix or erase them."""

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        """Run the model, which may be in either mode, on a batch."""
        return model(batch["images"])

    @abstractmethod
    def loss(self, outputs: Any, batch: Batch) -> dict[str, Tensor]:
        """Return "loss", a scalar to minimise, and other scalars worth logging."""

    @abstractmethod
    def evaluator(self, split: bool) -> Evaluator:
        """Start an evaluation. split: each process evaluates its own share."""

    @abstractmethod
    def report(self, metrics: dict[str, float]) -> list[str]:
        """Say an evaluation's figures in lines."""

    def notes(self, trained: dict[str, Any], classes: Sequence[str]) -> list[str]:
        """Say what the user should know when evaluating weights that were trained with these options and classes."""
        return []

    # -- a trained model in use

    def recall(self, checkpoint: Mapping[str, Any], weights: Mapping[str, Tensor], path: str | Path) -> None:
        """Set the classes to those of a checkpoint, instead of those of data. UsageError if it does not say them."""
        names = checkpoint.get("classes")
        if not isinstance(names, list | tuple) or not names:
            raise UsageError(f"{path} does not say which classes it knows; name a run's best.pth or checkpoint.pth")
        self.num_classes, self.classes = len(names), labels_of(checkpoint, len(names))

    def attending(self, model: nn.Module) -> nn.Module:
        """Return the part of a model, images (B, 3, H, W) -> anything, whose attention can be looked at."""
        return model

    def predict(self, model: nn.Module, image: Image.Image, least: float = 0.3) -> Prediction:
        """Say what a model in evaluation mode sees in an RGB image.

        Args:
            least: objects of a lower score, 0..1, are not worth showing.
        """
        raise UsageError(f"--task {self.opts.task} does not say what its predictions look like")
