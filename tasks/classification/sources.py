"""Where classified images come from: datasets of (path, open file or PIL image; class number).

Each has `classes`, the names of its numbers, and `name_of(index)`.
"""

import io
import json
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image
from timm.data import ImageDataset, ImageNetInfo, create_dataset
from torch.utils.data import Dataset, IterableDataset
from torchvision import datasets as vision
from torchvision.datasets.folder import IMG_EXTENSIONS

from models.weights.cache import cache_folder
from runtime.errors import UsageError, listed
from runtime.packed import PackedPaths
from runtime.tar import TarFiles

from .holdout import hold_out
from .listing import list_images
from .saved import SEVERAL, SavedImages, import_hugging_face, is_saved, splits_of
from .streams import Stream


class ImageFiles(Dataset):
    """Images given by their paths and class numbers. classes: their names."""

    def __init__(self, paths: Sequence[str], targets: Sequence[int] | np.ndarray, classes: Sequence[str]) -> None:
        self.paths, self.targets, self.classes = paths, np.asarray(targets, np.int32), list(classes)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[str, int]:
        return self.paths[index], int(self.targets[index])

    def name_of(self, index: int) -> str:
        return self.paths[index]


class TarImages(Dataset):
    """The images of a tar file, whose class is the name of the folder that they are in."""

    def __init__(self, path: Path) -> None:
        self.files = TarFiles(path, IMG_EXTENSIONS, cache_folder())
        labels = [os.path.basename(os.path.dirname(name)) for name in self.files.names]
        self.classes = sorted(set(labels))
        if not labels or not all(self.classes):
            raise UsageError(f"{path} must hold class folders with images in them, and no images beside them")
        number = {name: i for i, name in enumerate(self.classes)}
        self.targets = np.array([number[label] for label in labels], np.int64)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[io.BytesIO, int]:
        return io.BytesIO(self.files.read(index)), int(self.targets[index])

    def name_of(self, index: int) -> str:
        return f"{self.files.names[index]} of {self.files.path}"


class Digits(Dataset):
    """scikit-learn's 1,797 scanned digits (8x8, grey): 1,437 to train on, 360 to test, stratified, always the same."""

    classes = tuple("0123456789")

    def __init__(self, train: bool) -> None:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        everything = np.arange(len(digits.target))
        split = train_test_split(everything, test_size=0.2, stratify=digits.target, random_state=0)
        chosen = np.sort(split[0 if train else 1])
        self.images = (digits.images[chosen] * (255 / 16)).round().astype(np.uint8)
        self.targets = digits.target[chosen].tolist()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]).convert("RGB"), self.targets[index]

    def name_of(self, index: int) -> str:
        return f"digit {index}"


class ReaderImages(Dataset):
    """The images of a timm reader (Hugging Face datasets)."""

    def __init__(self, reader: Any) -> None:
        self.reader = reader
        number_of = getattr(reader, "class_to_idx", None) or {}
        self.classes = sorted(number_of, key=number_of.get)

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        file, target, *_ = self.reader[index]
        return file, target

    def name_of(self, index: int) -> str:
        return self.reader.filename(index)


class Cifar100(vision.CIFAR100):
    """CIFAR-100 as torchvision reads it."""

    def name_of(self, index: int) -> str:
        return f"image {index} of {self.root}"


def image_folder(root: str, split: str) -> ImageFiles:
    """ROOT/SPLIT/CLASS/*. UsageError if a folder is missing, or in training empty."""
    folder = Path(root, split)
    if not folder.is_dir():
        remedy = " (or --val_fraction 0.2 evaluates on a fifth of train/)" if split == "val" else ""
        raise UsageError(f"{folder} is not a folder; --data_path must hold train/CLASS/ and val/CLASS/ folders{remedy}")
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    if not classes:
        raise UsageError(f"{folder} has no class folders; put the images in {folder}/CLASS/")
    images = ImageFiles(*list_images(folder, {name: number for number, name in enumerate(classes)}), classes)
    counts = np.bincount(images.targets, minlength=len(classes))
    if not len(images):
        raise UsageError(f"the class folders of {folder} hold no images; fill them")
    if split == "train" and not counts.all():
        raise UsageError(f"class folder {folder / classes[counts.argmin()]} holds no image; fill or remove it")
    return images


def tar_file(root: str, split: str) -> TarImages:
    """ROOT/SPLIT.tar. UsageError if it is missing, or no tar file of class folders."""
    path = Path(root, f"{split}.tar")
    if not path.is_file():
        raise UsageError(f"{path} is missing; --data_set TAR reads train.tar and val.tar, with one folder per class")
    return TarImages(path)


def inaturalist(root: str, year: int, category: str) -> tuple[ImageFiles, ImageFiles]:
    """iNaturalist 2018 or 2019 as published: trainYEAR.json, valYEAR.json, categories.json and the image folders."""
    try:
        categories = {entry["id"]: entry for entry in _read_json(Path(root, "categories.json"))}
        missing = [entry["id"] for entry in categories.values() if category not in entry]
        if missing:
            raise UsageError(
                f"{root}/categories.json: category {missing[0]} has no {category!r}; choose --inat_category"
            )
        classes = sorted({entry[category] for entry in categories.values()})
        number = {name: i for i, name in enumerate(classes)}
        parts = []
        for split in ("train", "val"):
            content = _read_json(Path(root, f"{split}{year}.json"))
            files = {image["id"]: image["file_name"] for image in content["images"]}
            entries = content["annotations"]
            paths = PackedPaths(os.path.join(root, files[entry["image_id"]]) for entry in entries)
            targets = [number[categories[entry["category_id"]][category]] for entry in entries]
            parts.append(ImageFiles(paths, targets, classes))
    except (KeyError, TypeError) as error:
        raise UsageError(f"{root}: the annotations are incomplete, they lack {error}; unpack them anew") from error
    return parts[0], parts[1]


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UsageError(f"{path} is missing; unpack the annotations of iNaturalist there") from error
    except ValueError as error:
        raise UsageError(f"{path} is not JSON: {error}") from error


def saved_split(root: str, split: str) -> SavedImages:
    """A split of a folder that Hugging Face's `save_to_disk` wrote. UsageError if there is none of that name."""
    splits = splits_of(root)
    if split not in splits:
        raise UsageError(
            f"{root} has no split {split!r} but {', '.join(splits)}; choose --train_split and --val_split, "
            "or --val_fraction 0.2 to evaluate on a fifth of the training split"
        )
    return SavedImages(splits[split], f"{root}, split {split}")


def open_divided(options: Any, held_out: Collection[str]) -> tuple[Dataset, Dataset]:
    """The training and the test images of --data_set IMNET or TAR; without test images, some of the training ones.

    held_out: the names of those that the weights were not trained on, where that is known.
    """
    name, root, splits = options.data_set, options.data_path, ("train", "val")
    open_split: Callable[[str, str], Dataset] = image_folder if name == "IMNET" else tar_file
    found = Path(root, "val" if name == "IMNET" else "val.tar").exists()
    if name == "IMNET" and is_saved(root):
        open_split, splits = saved_split, (options.train_split, options.val_split)
        found = Path(root, SEVERAL).is_file() and splits[1] in splits_of(root)
    if found or not (options.val_fraction or held_out):
        train = None if options.eval else open_split(root, splits[0])
        test = open_split(root, splits[1])
        return train or test, test
    train = open_split(root, splits[0])
    return hold_out(train, list(names_in(train, root)), options.val_fraction, held_out, f"{root}, {splits[0]}")


def name_in(source: Dataset, data_path: str, index: int) -> str:
    """What an image is called, wherever --data_path lies."""
    name = source.name_of(index)
    return name.replace(f"{Path(data_path)}{os.sep}", "", 1) if data_path else name


def names_in(source: Dataset, data_path: str) -> Iterator[str]:
    """The names of all images of a source."""
    return (name_in(source, data_path, index) for index in range(len(source)))


def open_sources(options: Any, held_out: Collection[str] = ()) -> tuple[Dataset, Dataset]:
    """The training and the test images that --data_set and --data_path name. UsageError if they cannot be read.

    Evaluating takes the test images alone where they say by themselves which classes there are.

    held_out: the names of images that the weights were not trained on, where there are no test images.
    """
    name, root = options.data_set, options.data_path
    if name == "DIGITS":
        return Digits(train=True), Digits(train=False)
    kind = name.partition("/")[0].lower()
    if not root and kind not in ("hfds", "hfids", "tfds"):
        raise UsageError(f"--data_set {name} needs --data_path (or try --data_set DIGITS, which needs no files)")
    if root and not Path(root).exists():
        raise UsageError(f"--data_path {root} does not exist")
    if name in ("IMNET", "TAR"):
        return open_divided(options, held_out)
    if name == "CIFAR":
        try:
            return Cifar100(root, train=True), Cifar100(root, train=False)
        except RuntimeError as error:
            raise UsageError(f"no CIFAR-100 under {root}; unpack cifar-100-python.tar.gz there") from error
    if name in ("INAT", "INAT19"):
        return inaturalist(root, 2019 if name == "INAT19" else 2018, options.inat_category)
    if "/" in name:
        return _timm_source(options, train=True), _timm_source(options, train=False)
    raise UsageError(f"unknown --data_set {name!r}; known: IMNET, CIFAR, INAT, INAT19, DIGITS, TAR, hfds/…, wds/…")


LISTED = ("IMNET", "INAT", "INAT19", "TAR")
"""Data sets whose files are listed, which takes minutes: one process does it and tells the others."""


def _timm_source(options: Any, train: bool) -> Dataset:
    split = options.train_split if train else options.val_split
    try:
        if options.data_set.startswith(("hfds/", "hfids/")):
            import_hugging_face()
        dataset = create_dataset(
            options.data_set,
            root=options.data_path or None,
            split=split,
            is_training=train,
            batch_size=options.batch_size,
            seed=options.seed,
            **({"input_img_mode": ""} if options.data_set.startswith("hfids/") else {}),  # converted here
        )
    except ImportError as error:
        raise UsageError(f"--data_set {options.data_set} needs another package ({error}); pip install it") from error
    except (AssertionError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise UsageError(f"--data_set {options.data_set}, split {split!r}: {error or type(error).__name__}") from error
    if isinstance(dataset, IterableDataset):
        return Stream(dataset.reader, options.data_set, train, options.seed)
    return ReaderImages(dataset.reader) if isinstance(dataset, ImageDataset) else dataset


def choose_classes(options: Any, found: Sequence[str], trained: list[str]) -> list[str]:
    """The names of the classes by number: those that the weights were trained on if they are known and the same."""
    found, synsets = list(found), ImageNetInfo().label_names()
    if not options.eval:
        return trained if set(trained) == set(found) else found
    if trained or not found:
        return trained
    count = options.num_classes or len(found)
    if count == len(synsets) and set(found) <= set(synsets):  # what weights of 1000 classes are taken to know
        return synsets
    if (options.resume or options.load_release) and len(found) < count:
        raise UsageError(
            f"the weights do not name their {count} classes, so it is not known which of them the data's {len(found)} "
            "are; add (empty) class folders for the others"
        )
    return found


def class_numbers(source: Dataset, classes: Sequence[str], options: Any) -> list[int] | None:
    """The number among `classes` of each of a source's classes; None where they agree, or one side has no names.

    UsageError if the source has others.
    """
    found = list(getattr(source, "classes", []))
    if not found or not classes or found == list(classes):
        return None
    number = {name: i for i, name in enumerate(classes)}
    unknown = [name for name in found if name not in number]
    if unknown:
        known = "that the weights know" if options.eval else "of the training data"
        raise UsageError(f"{options.data_path or options.data_set}: {listed(unknown)} is none of the classes {known}")
    return [number[name] for name in found]


class Samples(Dataset):
    """A source as samples of "image" and "target", with the classes numbered anew: `numbers`, None as they are."""

    def __init__(self, source: Dataset, numbers: Sequence[int] | None) -> None:
        self.source, self.numbers = source, numbers

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, target = self.source[index]
        return {"image": image, "target": target if self.numbers is None else self.numbers[target]}

    def name_of(self, index: int) -> str:
        """Say which image a number is, for messages."""
        return self.source.name_of(index) if hasattr(self.source, "name_of") else f"number {index}"
