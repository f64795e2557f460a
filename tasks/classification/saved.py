"""Folders that `save_to_disk` of Hugging Face's datasets wrote."""

import io
import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from torch.utils.data import Dataset

from runtime.errors import UsageError

SEVERAL, ONE = "dataset_dict.json", "state.json"
"""What lies in a folder of several splits, and in one of a single split."""


def import_hugging_face() -> Any:
    """Have `import datasets` mean Hugging Face's package, not this project's file, which a run does not import.

    Raises:
        ImportError: it is not installed.
    """
    if "datasets" not in sys.modules:
        here = Path(__file__).resolve().parents[2]
        spec = PathFinder.find_spec("datasets", [entry for entry in sys.path if Path(entry).resolve() != here])
        if spec is None:
            raise ImportError("No module named 'datasets'")
        sys.modules["datasets"] = module_from_spec(spec)
        spec.loader.exec_module(sys.modules["datasets"])
    return sys.modules["datasets"]


def is_saved(root: str) -> bool:
    """Whether a folder is one that `save_to_disk` wrote."""
    return Path(root, SEVERAL).is_file() or Path(root, ONE).is_file()


class SavedImages(Dataset):
    """A split's images, in its only column of images, with the classes of its column "label", or of its only one.

    Args:
        table: `datasets.Dataset`.
        place: where it is, for messages.

    Raises:
        UsageError: it has no such columns, or images without a label.
    """

    def __init__(self, table: Any, place: str) -> None:
        library, self.place = import_hugging_face(), place
        kinds = table.features
        images = [name for name, kind in kinds.items() if isinstance(kind, library.Image)]
        labels = [name for name, kind in kinds.items() if isinstance(kind, library.ClassLabel)]
        labels = ["label"] if "label" in kinds else labels
        if len(images) != 1 or len(labels) != 1:
            raise UsageError(
                f"{place} needs one column of images and a column `label`; its columns are {', '.join(kinds)}"
            )
        found = table[labels[0]][:]
        if any(label is None or label == -1 for label in found):
            raise UsageError(f"{place} has images without a label; leave them out")
        named = getattr(kinds[labels[0]], "names", None)
        if named is None and isinstance(found[0], str):
            named = sorted(set(found))
            found = [named.index(label) for label in found]
        self.classes, self.targets = list(named or []), np.array(found, np.int64)
        self.images, self.column = table.cast_column(images[0], library.Image(decode=False)), images[0]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[BinaryIO | str, int]:
        image = self.images[index][self.column]
        return (io.BytesIO(image["bytes"]) if image["bytes"] else image["path"]), int(self.targets[index])

    def name_of(self, index: int) -> str:
        return f"row {index} of {self.place}"


def splits_of(root: str) -> dict[str, Any]:
    """Return the splits that `save_to_disk` wrote, by name; a single one is called "train".

    Raises:
        UsageError: the package is not installed, or the folder is damaged.
    """
    try:
        found = import_hugging_face().load_from_disk(root)
    except ImportError as error:
        raise UsageError(f"{root} is read by Hugging Face's datasets: pip install datasets") from error
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UsageError(f"{root} is damaged: {str(error).partition(chr(10))[0]}") from error
    return dict(found) if isinstance(found, dict) else {"train": found}
