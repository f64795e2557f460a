"""What the classes of a model are called."""

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from timm.data import ImageNetInfo

from .weights.errors import printable


def class_names(checkpoint: Mapping[str, Any]) -> list[str]:
    """The class names in a checkpoint; [] if it has none, or only the stand-ins of `labels_of`."""
    classes = checkpoint.get("classes")
    named = isinstance(classes, list | tuple) and all(isinstance(name, str | int) for name in classes)
    names = list(map(str, classes)) if named else []
    return [] if names == _stand_ins(len(names)) else names


def labels_of(checkpoint: Mapping[str, Any], num_classes: int) -> list[str]:
    """The class names in a checkpoint; where it has none that fit, ImageNet's synsets for 1000 classes, or numbers."""
    names = class_names(checkpoint)
    if len(names) == num_classes:
        return [printable(name, most=1000) for name in names]
    return ImageNetInfo().label_names() if num_classes == 1000 else _stand_ins(num_classes)


def _stand_ins(count: int) -> list[str]:
    return [f"class {number}" for number in range(count)]


@cache
def _meanings() -> dict[str, str]:
    """All of ImageNet-22K, and what ImageNet-1K has besides."""
    names = (ImageNetInfo(subset).label_descriptions(as_dict=True) for subset in ("imagenet22k", "imagenet1k"))
    return {synset: words for subset in names for synset, words in subset.items()}


def in_words(labels: Iterable[str]) -> list[str]:
    """ImageNet's synsets by what they mean ("n01440764" is "tench, Tinca tinca"); other labels as they are."""
    return [_meanings().get(label, label) for label in labels]
