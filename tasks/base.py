"""What a task is: everything about a run that knows what a label means.

The engine, checkpoints and logs call these methods and know no task. `docs/EXTENDING.md` adds one step by step.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

Sample = dict[str, Any]
"""One example: "image" (a PIL image, later a uint8 tensor (3, H, W)); every other key is the task's."""

Batch = dict[str, Any]
"""Several: "images", uint8 (B, 3, H, W) or a list of (3, H, W); every other key is the task's."""


class Evaluator(ABC):
    """Sums up an evaluation, on the device, without waiting for it."""

    @abstractmethod
    def update(self, outputs: Any, batch: Batch) -> None:
        """Take in a batch and what the model made of it."""

    @abstractmethod
    def compute(self) -> dict[str, float]:
        """Return the figures over all images of all processes, each image counted once.

        A collective call. Names with a value each; `Task.metric` is one of them.
        """


class Task(ABC):
    """A kind of training: its data, loss and figures.

    options: a dataclass of the task's own options, beside those that every run has.
    metric: the figure by which the best weights are chosen; larger is better.
    classes: names, in the order of their numbers; known after `sources`.
    """

    options: ClassVar[type]
    metric: ClassVar[str]
    classes: Sequence[str] = ()

    def __init__(self, options: Any) -> None:
        self.opts = options

    @abstractmethod
    def sources(self) -> tuple[Dataset | None, Dataset]:
        """Open the examples to train on (None when only evaluating) and those to evaluate on.

        Datasets of `Sample`, before transforms. Raises UsageError for data that cannot be used.
        """

    @abstractmethod
    def transform(self, train: bool) -> Callable[[Sample], Sample]:
        """Return what turns a sample into tensors, image and target together. Random choices: torch's and Python's."""

    def collate(self, samples: list[Sample]) -> Batch:
        """Put samples together; by default each key is stacked, and "image" becomes "images"."""
        batch = default_collate(samples)
        return {"images": batch.pop("image"), **batch}

    @abstractmethod
    def build_model(self) -> nn.Module:
        """Build the model, with random weights."""

    @abstractmethod
    def preprocess(self, batch: Batch, train: bool) -> Batch:
        """Normalise images that are on the device already and, in training, mix or erase them."""

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        """Run the model on a batch, in either mode."""
        return model(batch["images"])

    @abstractmethod
    def loss(self, outputs: Any, batch: Batch) -> dict[str, Tensor]:
        """Return "loss", a scalar to minimise, and other scalars worth logging."""

    @abstractmethod
    def evaluator(self) -> Evaluator:
        """Start an evaluation."""

    @abstractmethod
    def report(self, metrics: dict[str, float]) -> list[str]:
        """Say an evaluation's figures in lines."""
