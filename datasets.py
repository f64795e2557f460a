"""Where images come from, and their transforms.

Every random choice about an image is a function of (seed, epoch, position), see samplers.py; the state of a worker
never matters.
"""

import atexit
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import ImageDataset, create_dataset, create_transform
from timm.data.readers import create_reader
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset
from torchvision import datasets as vision
from torchvision import transforms

from errors import UsageError, listed
from options import Options
from samplers import EvalSampler, Key, TrainSampler
from utils import Processes, Requests, seeded

# -- sources: map-style datasets of (PIL image, class number) with `classes` and `name_of(index)` ---------------------


class ImageFiles(Dataset):
    """Images given as (path, class number) pairs. classes: their names."""

    def __init__(self, samples: Sequence[tuple[str, int]], classes: Sequence[str]) -> None:
        self.samples, self.classes = samples, list(classes)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path, target = self.samples[index]
        return open_rgb(path), target

    def name_of(self, index: int) -> str:
        return self.samples[index][0]


def open_rgb(file: Any) -> Image.Image:
    """The image in a file (a path or an open file) as RGB, whatever its mode."""
    with Image.open(file) as image:
        return image.convert("RGB")


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
    """The images of a timm reader (tar files, Hugging Face datasets)."""

    def __init__(self, reader: Any) -> None:
        self.reader = reader
        number_of = getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", None) or {}
        self.classes = sorted(number_of, key=number_of.get)

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        file, target, *_ = self.reader[index]
        return open_rgb(file), target

    def name_of(self, index: int) -> str:
        return self.reader.filename(index)


class Cifar100(vision.CIFAR100):
    """CIFAR-100 as torchvision reads it."""

    def name_of(self, index: int) -> str:
        return f"image {index} of {self.root}"


def image_folder(root: str, split: str) -> ImageFiles:
    """ROOT/SPLIT/CLASS/*. UsageError if a folder is missing or empty."""
    folder = Path(root, split)
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder; --data_path must hold train/CLASS/ and val/CLASS/ folders")
    try:
        found = vision.ImageFolder(str(folder))
    except FileNotFoundError as error:
        empty = [p.name for p in sorted(folder.iterdir()) if p.is_dir() and not _has_images(p)]
        if not empty:
            raise UsageError(f"{folder} has no class folders; put the images in {folder}/CLASS/") from error
        raise UsageError(f"class folder {folder / empty[0]} holds no image; fill or remove it") from error
    return ImageFiles(found.samples, found.classes)


def both_splits(root: str, open_split: Callable[[str, str], Dataset], evaluate: bool) -> tuple[Dataset, Dataset]:
    """What `open_split` makes of train and val, or to `evaluate` twice of val. UsageError if their classes differ."""
    if evaluate:
        return (open_split(root, "val"),) * 2
    train, val = open_split(root, "train"), open_split(root, "val")
    if train.classes != val.classes:
        only = [f"{name} (only in train)" for name in sorted(set(train.classes) - set(val.classes))]
        only += [f"{name} (only in val)" for name in sorted(set(val.classes) - set(train.classes))]
        raise UsageError(f"{root}: train and val hold different classes: {listed(only)}")
    return train, val


def _has_images(folder: Path) -> bool:
    return any(p.suffix.lower() in vision.folder.IMG_EXTENSIONS for p in folder.rglob("*"))


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
            samples = [
                (os.path.join(root, files[entry["image_id"]]), number[categories[entry["category_id"]][category]])
                for entry in content["annotations"]
            ]
            parts.append(ImageFiles(samples, classes))
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


def open_sources(options: Options) -> tuple[Dataset, Dataset]:
    """The training and the test images that --data_set and --data_path name. UsageError if they cannot be read.

    Evaluating takes the test images alone where they say by themselves which classes there are.
    """
    name, root = options.data_set, options.data_path
    if name == "DIGITS":
        return Digits(train=True), Digits(train=False)
    kind = name.partition("/")[0].lower()
    if not root and kind not in ("hfds", "hfids", "tfds"):
        raise UsageError(f"--data_set {name} needs --data_path (or try --data_set DIGITS, which needs no files)")
    if root and not Path(root).exists():
        raise UsageError(f"--data_path {root} does not exist")
    if name == "IMNET":
        return both_splits(root, image_folder, options.eval)
    if name == "CIFAR":
        try:
            return Cifar100(root, train=True), Cifar100(root, train=False)
        except RuntimeError as error:
            raise UsageError(f"no CIFAR-100 under {root}; unpack cifar-100-python.tar.gz there") from error
    if name in ("INAT", "INAT19"):
        return inaturalist(root, 2019 if name == "INAT19" else 2018, options.inat_category)
    if name == "TAR":
        return both_splits(root, _tar_source, options.eval)
    if "/" in name:
        return _timm_source(options, train=True), _timm_source(options, train=False)
    raise UsageError(f"unknown --data_set {name!r}; known: IMNET, CIFAR, INAT, INAT19, DIGITS, TAR, hfds/…, wds/…")


def _tar_source(root: str, split: str) -> ReaderImages:
    path = Path(root, f"{split}.tar")
    if not path.is_file():
        raise UsageError(f"{path} is missing; --data_set TAR reads train.tar and val.tar, with one folder per class")
    return ReaderImages(create_reader("", root=str(path)))


def _let_timm_find_hugging_face() -> None:
    """Have `import datasets` mean Hugging Face's package from now on, as timm's reader expects.

    It has the name of this file, which all modules of a run have imported by now and go on using. What workers send or
    receive must not be of a class from here: pickle would look for it in the other package.
    """
    ours = sys.modules.get("datasets")
    if ours is None or hasattr(ours, "load_dataset"):
        return
    here, path = Path(__file__).resolve().parent, sys.path
    del sys.modules["datasets"]
    sys.path = [entry for entry in path if Path(entry).resolve() != here]
    try:
        import_module("datasets")
    except ImportError:
        sys.modules["datasets"] = ours
        raise
    finally:
        sys.path = path


def _timm_source(options: Options, train: bool) -> Dataset:
    split = options.train_split if train else options.val_split
    try:
        if options.data_set.startswith(("hfds/", "hfids/")):
            _let_timm_find_hugging_face()
        dataset = create_dataset(
            options.data_set,
            root=options.data_path or None,
            split=split,
            is_training=train,
            batch_size=options.batch_size,
            seed=options.seed,
        )
    except ImportError as error:
        raise UsageError(f"--data_set {options.data_set} needs another package ({error}); pip install it") from error
    except (AssertionError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise UsageError(f"--data_set {options.data_set}, split {split!r}: {error or type(error).__name__}") from error
    return ReaderImages(dataset.reader) if isinstance(dataset, ImageDataset) else dataset


# -- transforms ----------------------------------------------------------------------------------------------------


def train_transform(options: Options) -> transforms.Compose:
    """Random crop, flip and RandAugment: PIL image -> (3, S, S) uint8. The device does the rest, see engine.py."""
    transform = create_transform(
        input_size=options.input_size,
        is_training=True,
        scale=tuple(options.scale),
        hflip=options.hflip,
        color_jitter=options.color_jitter,
        auto_augment=None if options.aa in (None, "", "none", "null") else options.aa,
        interpolation=options.train_interpolation,
        normalize=False,
    )
    if _at_cifar_size(options.data_set, options.input_size):  # as published: shifted, not rescaled
        transform.transforms[0] = transforms.RandomCrop(options.input_size, padding=4)
    return transform


def eval_transform(options: Options) -> transforms.Compose:
    """Bicubic resize so that the centre crop is `crop_pct` of the side: PIL image -> (3, S, S) uint8."""
    return create_transform(
        input_size=options.input_size,
        is_training=False,
        interpolation="bicubic",
        normalize=False,
        crop_pct=eval_crop(options.data_set, options.input_size, options.crop_pct),
    )


def eval_crop(data_set: str, input_size: int, crop_pct: float | None) -> float:
    """The part of the resized side that evaluation crops, where --crop_pct is `crop_pct`."""
    return crop_pct or (1.0 if _at_cifar_size(data_set, input_size) else 224 / 256)


def _at_cifar_size(data_set: str, input_size: int) -> bool:
    return data_set == "CIFAR" and input_size <= 32


class Transformed(Dataset):
    """A source with a transform, addressed by `Key`: the same key gives the same tensor, whoever computes it."""

    def __init__(self, source: Dataset, transform: transforms.Compose, seed: int) -> None:
        self.source, self.transform, self.seed = source, transform, seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: Key) -> tuple[Tensor, int]:
        try:
            image, target = self.source[key.index]
        except Exception as error:
            # A broken file makes Pillow raise anything from OSError to struct.error.
            kind = type(error).__name__
            name = self.source.name_of(key.index) if hasattr(self.source, "name_of") else f"number {key.index}"
            raise UsageError(f"cannot read image {name} ({kind}: {error}); repair or remove it") from error
        with seeded(self.seed, key.epoch, key.position):
            return self.transform(image), target


# -- loaders -----------------------------------------------------------------------------------------------------------


@dataclass
class Data:
    """What a run needs to know of its data. train: None when only evaluating; images are (B, 3, S, S) uint8.

    updates: optimizer updates per epoch; total_batch: images per update over all processes.
    images: how many there are to train on; None in a stream.
    dist_eval: each process evaluates its own share; val_batches: batches that every process has at least.
    """

    train: DataLoader | None
    val: DataLoader
    num_classes: int
    classes: list[str]
    updates: int
    total_batch: int
    dist_eval: bool
    val_batches: int
    images: int | None = None

    @property
    def epoch_images(self) -> int:
        """Images that all processes together see in an epoch."""
        return self.updates * self.total_batch

    def watched(self, count: int) -> Tensor:
        """Up to `count` evaluation images, spread over the data, the same each time: (count, 3, S, S) uint8."""
        dataset = self.val.dataset
        if isinstance(dataset, IterableDataset):  # a stream's first ones
            return next(iter(self.val))[0][:count]
        count = min(count, len(dataset))
        return torch.stack([dataset[Key(number * len(dataset) // count)][0] for number in range(count)])

    @property
    def streamed(self) -> bool:
        """Whether training images come as a stream, which cannot be entered midway."""
        return self.train is not None and isinstance(self.train.dataset, IterableDataset)

    def place(self, epoch: int, start: int = 0) -> int:
        """Set the training loader to image `start` (of a stream 0) of `epoch`. Returns the update it stands at."""
        if self.streamed:
            self.train.dataset.set_epoch(epoch)
        else:
            self.train.sampler.place(epoch, start)
        return start // self.total_batch


def build_data(
    options: Options, processes: Processes, device: torch.device, test_source: Dataset | None = None
) -> Data:
    """Loaders and class names for a run. UsageError for data that cannot be used.

    test_source: what to evaluate on (nothing is trained then) instead of what --data_set names.
    """
    train_source, val_source = open_sources(options) if test_source is None else (test_source, test_source)
    classes = list(getattr(train_source, "classes", []))
    num_classes = options.num_classes or len(classes)
    if num_classes == 0:
        raise UsageError(f"--data_set {options.data_set} does not say how many classes it has; pass --num_classes")
    if num_classes < len(classes):
        raise UsageError(f"--num_classes {num_classes} is fewer than the {len(classes)} classes of the data")

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # not on a Mac
    workers = min(options.num_workers, cores)
    common = {
        "num_workers": workers,
        "pin_memory": options.pin_mem and device.type == "cuda",
        "persistent_workers": workers > 0,
        "worker_init_fn": ignore_stop_signals,
    }
    total_batch = options.batch_size * processes.world_size * options.accum_steps

    train, updates = None, 0
    if not options.eval:
        if isinstance(train_source, IterableDataset):
            train_source.transform = train_transform(options)
            train_source.set_loader_cfg(num_workers=workers)
            train = DataLoader(train_source, options.batch_size, drop_last=True, **common)
            # timm's readers of streams count this process's share alone.
            updates = len(train_source) // (options.batch_size * options.accum_steps)
            if updates == 0:
                raise UsageError(f"--data_set {options.data_set} does not fill one batch; lower --batch_size")
        else:
            sampler = TrainSampler(len(train_source), total_batch, options, processes)
            dataset = Transformed(train_source, train_transform(options), options.seed)
            train = DataLoader(dataset, options.batch_size, sampler=sampler, drop_last=True, **common)
            updates = sampler.length // total_batch

    dist_eval = options.dist_eval and processes.distributed
    eval_batch = int(1.5 * options.batch_size)
    val_batches = 0  # unknown
    if isinstance(val_source, IterableDataset):
        val_source.transform = eval_transform(options)
        # Split among processes, timm's streams may leave images out or repeat them: each process reads them all.
        val_source.reader.dist_rank, val_source.reader.dist_num_replicas = 0, 1
        val_source.set_loader_cfg(num_workers=workers)
        val, dist_eval = DataLoader(val_source, eval_batch, **common), False
    else:
        sampler = EvalSampler(len(val_source), processes, split=dist_eval)
        dataset = Transformed(val_source, eval_transform(options), options.seed)
        val = DataLoader(dataset, batch_sampler=BatchSampler(sampler, eval_batch, drop_last=False), **common)
        smallest_share = len(val_source) // (processes.world_size if dist_eval else 1)
        val_batches = -(-smallest_share // eval_batch)
    images = None if train is None or isinstance(train_source, IterableDataset) else len(train_source)
    return Data(train, val, num_classes, classes, updates, total_batch, dist_eval, val_batches, images)


def ignore_stop_signals(worker: int) -> None:
    """Workers leave stop requests to the process they load for, which still needs them to reach its checkpoint."""
    for number in Requests.SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def _end_workers() -> None:
    """Python ends left-over workers by SIGTERM, which they ignore, and would wait for them for ever."""
    workers = multiprocessing.active_children()
    if workers:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler takes their death for a crash
    for worker in workers:
        worker.kill()
