"""What the classes of a model are called."""

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from timm.data import ImageNetInfo

from .weights.errors import printable


def labels_of(checkpoint: Mapping[str, Any], num_classes: int) -> list[str]:
    """The class names in a checkpoint; where it has none that fit, ImageNet's synsets for 1000 classes, or numbers."""
    classes = checkpoint.get("classes")
    named = isinstance(classes, list | tuple) and all(isinstance(label, str | int) for label in classes)
    if named and len(classes) == num_classes:
        return [printable(label, most=1000) for label in classes]
    return ImageNetInfo().label_names() if num_classes == 1000 else [f"class {i}" for i in range(num_classes)]


@cache
def _meanings() -> dict[str, str]:
    """All of ImageNet-22K, and what ImageNet-1K has besides."""
    names = (ImageNetInfo(subset).label_descriptions(as_dict=True) for subset in ("imagenet22k", "imagenet1k"))
    return {synset: words for subset in names for synset, words in subset.items()}


def in_words(labels: Iterable[str]) -> list[str]:
    """ImageNet's synsets by what they mean ("n01440764" is "tench, Tinca tinca"); other labels as they are."""
    return [_meanings().get(label, label) for label in labels]
