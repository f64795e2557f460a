"""Where images come from, and their transforms.

Every random choice about an image is a function of (seed, epoch, position), see samplers.py; the state of a worker
never matters.
"""

import atexit
import io
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np
import torch
from PIL import Image
from timm.data import ImageDataset, ImageNetInfo, create_dataset, create_transform
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset
from torchvision import datasets as vision
from torchvision import transforms
from torchvision.datasets.folder import IMG_EXTENSIONS, is_image_file

from models.pixels import Pixels, pixels_of
from models.weights.sources import cache_folder
from runtime.agreement import decide, gather
from runtime.distributed import DistInfo
from runtime.errors import TemporaryFailure, UsageError, listed
from runtime.images import MAX_PIXELS, ImageRefused, open_rgb
from runtime.options import Options
from runtime.packed import PackedPaths
from runtime.preemption import PreemptionHandler
from runtime.samplers import EvalSampler, Key, TrainSampler
from runtime.storage import read_patiently
from runtime.streams import Stream
from runtime.tar import TarFiles
from utils import seeded, unite_seeds

# -- sources: map-style datasets of (path, open file or PIL image; class number) with `classes` and `name_of(index)` ---


class ImageFiles(Dataset):
    """Images given as (path, class number) pairs. classes: their names."""

    def __init__(self, samples: Iterable[tuple[str, int]], classes: Sequence[str]) -> None:
        targets: list[int] = []

        def paths() -> Iterator[str]:
            for path, target in samples:
                targets.append(target)
                yield path

        self.paths, self.classes = PackedPaths(paths()), list(classes)
        self.targets = np.array(targets, np.int64)

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
        raise UsageError(f"{folder} is not a folder; --data_path must hold train/CLASS/ and val/CLASS/ folders")
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    if not classes:
        raise UsageError(f"{folder} has no class folders; put the images in {folder}/CLASS/")
    images = ImageFiles(find_images(folder, {name: number for number, name in enumerate(classes)}), classes)
    counts = np.bincount(images.targets, minlength=len(classes))
    if not len(images):
        raise UsageError(f"the class folders of {folder} hold no images; fill them")
    if split == "train" and not counts.all():
        raise UsageError(f"class folder {folder / classes[counts.argmin()]} holds no image; fill or remove it")
    return images


def find_images(folder: Path, numbers: Mapping[str, int]) -> Iterator[tuple[str, int]]:
    """The images in the class folders under `folder`, by name, with the numbers of their classes."""

    def fail(error: OSError) -> NoReturn:
        raise error

    for name, number in sorted(numbers.items()):
        for inner, _, files in sorted(os.walk(folder / name, onerror=fail, followlinks=True)):
            yield from ((os.path.join(inner, file), number) for file in sorted(files) if is_image_file(file))


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
    if name in ("IMNET", "TAR"):
        open_split = image_folder if name == "IMNET" else tar_file
        train = None if options.eval else open_split(root, "train")
        test = open_split(root, "val")
        return train or test, test
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
            **({"input_img_mode": ""} if options.data_set.startswith("hfids/") else {}),  # converted here
        )
    except ImportError as error:
        raise UsageError(f"--data_set {options.data_set} needs another package ({error}); pip install it") from error
    except (AssertionError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise UsageError(f"--data_set {options.data_set}, split {split!r}: {error or type(error).__name__}") from error
    if isinstance(dataset, IterableDataset):
        return Stream(dataset.reader, options.data_set, train, options.seed)
    return ReaderImages(dataset.reader) if isinstance(dataset, ImageDataset) else dataset


# -- transforms ----------------------------------------------------------------------------------------------------


def train_transform(options: Options) -> transforms.Compose:
    """Random crop, flip and RandAugment: PIL image -> (3, S, S) uint8. The device does the rest, see engine.py.

    UsageError if timm does not know the policy of --aa.
    """
    try:
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
    except (AssertionError, LookupError, ValueError) as error:  # all else has been checked
        known = "rand-m9-mstd0.5-inc1, augmix-m3, original, v0, 3a or none"
        raise UsageError(f"--aa {options.aa} is not a policy of timm; try {known}") from error
    if _at_cifar_size(options.data_set, options.input_size):  # as published: shifted, not rescaled
        transform.transforms[0] = transforms.RandomCrop(options.input_size, padding=4)
    return transform


def eval_transform(options: Options) -> transforms.Compose:
    """Resize so that the centre crop is `crop_pct` of the side: PIL image -> (3, S, S) uint8."""
    pixels = pixels_for(options)
    return create_transform(
        input_size=options.input_size,
        is_training=False,
        interpolation=pixels.interpolation,
        normalize=False,
        crop_pct=pixels.crop_pct,
        crop_mode=pixels.crop_mode,
    )


def pixels_for(options: Options) -> Pixels:
    """What images are normalised with, and how evaluation resizes and crops them: as the model wants unless given."""
    crop_pct = eval_crop(options.data_set, options.input_size, options.crop_pct)
    given = {"mean": options.mean, "std": options.std, "interpolation": options.interpolation}
    return pixels_of(options.model, crop_pct=crop_pct, **given)


def eval_crop(data_set: str, input_size: int, crop_pct: float | None) -> float | None:
    """The part of the resized side that evaluation crops, where --crop_pct is `crop_pct`; None: as the model wants."""
    return crop_pct or (1.0 if _at_cifar_size(data_set, input_size) else None)


def _at_cifar_size(data_set: str, input_size: int) -> bool:
    return data_set == "CIFAR" and input_size <= 32


class Transformed(Dataset):
    """A source with a transform, addressed by `Key`: the same key gives the same tensor, whoever computes it.

    numbers: the class number to give for each of the source's; None: as they are. max_pixels: of an image that is read.
    """

    def __init__(
        self,
        source: Dataset,
        transform: Callable[[Image.Image], Tensor],
        seed: int,
        numbers: Sequence[int] | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.source, self.transform, self.seed = source, transform, seed
        self.numbers, self.max_pixels = numbers, max_pixels

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: Key) -> tuple[Tensor, int]:
        named = hasattr(self.source, "name_of")
        image, target = self._read(key.index, self.source.name_of(key.index) if named else f"number {key.index}")
        with seeded(self.seed, key.epoch, key.position):
            return self.transform(image), target if self.numbers is None else self.numbers[target]

    def _read(self, index: int, name: str) -> tuple[Image.Image, Any]:
        def read() -> tuple[Image.Image, Any]:
            image, target = self.source[index]
            return image if isinstance(image, Image.Image) else open_rgb(image, self.max_pixels), target

        try:
            return read_patiently(read, f"image {name}")
        except TemporaryFailure:
            raise
        except ImageRefused as error:
            raise UsageError(f"cannot read image {name}: it {error} (--max_image_pixels)") from error
        except Exception as error:
            # A broken file makes Pillow raise anything from OSError to struct.error.
            kind = type(error).__name__
            raise UsageError(f"cannot read image {name} ({kind}: {error}); repair or remove it") from error


# -- loaders -----------------------------------------------------------------------------------------------------------


@dataclass
class Data:
    """What a run needs to know of its data. train: None when only evaluating; images are (B, 3, S, S) uint8.

    named: whether the images' source names its classes.
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
    named: bool = True

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
    options: Options,
    processes: DistInfo,
    device: torch.device,
    test_source: Dataset | None = None,
    trained: Sequence[str] = (),
) -> Data:
    """Loaders and class names for a run. UsageError for data that cannot be used.

    Args:
        test_source: what to evaluate on (nothing is trained then) instead of what --data_set names.
        trained: the classes that the weights know, by number, where they say so. The images get these numbers.
    """
    train_source, val_source = (test_source, test_source) if test_source is not None else _sources(options, processes)
    found = getattr(train_source, "classes", [])
    classes = _choose_classes(options, found, list(trained))
    num_classes = options.num_classes or len(classes)
    if num_classes == 0:
        raise UsageError(f"--data_set {options.data_set} does not say how many classes it has; pass --num_classes")
    if num_classes < len(classes):
        raise UsageError(f"--num_classes {num_classes} is fewer than the {len(classes)} classes of the data")

    total_batch = options.batch_size * processes.world_size * options.accum_steps
    train, updates = None, 0
    if not options.eval:
        numbers = class_numbers(train_source, classes, options)
        load = _load_stream if isinstance(train_source, IterableDataset) else _load_images
        train, updates = load(train_source, numbers, options, processes, device)
    val, split = _load_test(val_source, class_numbers(val_source, classes, options), options, processes, device)
    val_batches = 0  # unknown
    if not isinstance(val_source, IterableDataset):
        smallest_share = len(val_source) // (processes.world_size if split else 1)
        val_batches = -(-smallest_share // _eval_batch(options))
    images = None if train is None or isinstance(train_source, IterableDataset) else len(train_source)
    return Data(train, val, num_classes, classes, updates, total_batch, split, val_batches, images, bool(found))


def _sources(options: Options, processes: DistInfo) -> tuple[Dataset, Dataset]:
    if options.data_set not in LISTED:
        return open_sources(options)
    return decide(lambda: read_patiently(lambda: open_sources(options), f"--data_path {options.data_path}"), processes)


def _choose_classes(options: Options, found: Sequence[str], trained: list[str]) -> list[str]:
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


def class_numbers(source: Dataset, classes: Sequence[str], options: Options) -> list[int] | None:
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


def _loader_settings(options: Options, device: torch.device, workers: int) -> dict[str, Any]:
    return {
        "num_workers": workers,
        "pin_memory": options.pin_mem and device.type == "cuda",
        "persistent_workers": workers > 0,
        "worker_init_fn": ignore_stop_signals,
    }


def _usable_workers(options: Options) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # not on a Mac
    return min(options.num_workers, cores)


def _load_images(
    source: Dataset, numbers: list[int] | None, options: Options, processes: DistInfo, device: torch.device
) -> tuple[DataLoader, int]:
    """The training loader, and updates per epoch."""
    total_batch = options.batch_size * processes.world_size * options.accum_steps
    sampler = TrainSampler(len(source), total_batch, options, processes)
    dataset = Transformed(source, train_transform(options), options.seed, numbers, options.max_image_pixels)
    settings = _loader_settings(options, device, _usable_workers(options))
    return DataLoader(dataset, options.batch_size, sampler=sampler, drop_last=True, **settings), (
        sampler.length // total_batch
    )


def _load_stream(
    source: Stream, numbers: list[int] | None, options: Options, processes: DistInfo, device: torch.device
) -> tuple[DataLoader, int]:
    """The same of a stream; all processes take as many workers and images."""
    workers = min(gather(source.usable_workers(_usable_workers(options), processes), processes))
    source.split(processes, workers)
    source.transform, source.numbers = train_transform(options), numbers
    source.max_pixels = options.max_image_pixels
    lengths = gather(len(source), processes)  # timm's readers count this process's share alone
    if len(set(lengths)) > 1:
        raise UsageError(f"--data_set {options.data_set} is not the same on all machines: shares of {lengths} images")
    updates = lengths[0] // (options.batch_size * options.accum_steps)
    if updates == 0:
        raise UsageError(f"--data_set {options.data_set} does not fill one batch; lower --batch_size")
    generator = torch.Generator().manual_seed(unite_seeds(options.seed, processes.rank))
    settings = _loader_settings(options, device, workers)
    return DataLoader(source, options.batch_size, drop_last=True, generator=generator, **settings), updates


def _load_test(
    source: Dataset, numbers: list[int] | None, options: Options, processes: DistInfo, device: torch.device
) -> tuple[DataLoader, bool]:
    """The evaluation loader, and whether each process evaluates its own share."""
    workers = _usable_workers(options)
    if isinstance(source, IterableDataset):
        # Split among processes, timm's streams may leave images out or repeat them: each process reads them all.
        source.split(DistInfo(), workers)
        source.transform, source.numbers = eval_transform(options), numbers
        source.max_pixels = options.max_image_pixels
        return DataLoader(source, _eval_batch(options), **_loader_settings(options, device, workers)), False
    split = options.dist_eval and processes.distributed
    sampler = BatchSampler(EvalSampler(len(source), processes, split), _eval_batch(options), drop_last=False)
    dataset = Transformed(source, eval_transform(options), options.seed, numbers, options.max_image_pixels)
    return DataLoader(dataset, batch_sampler=sampler, **_loader_settings(options, device, workers)), split


def _eval_batch(options: Options) -> int:
    return int(1.5 * options.batch_size)


def ignore_stop_signals(worker: int) -> None:
    """Workers leave stop requests to the process they load for, which still needs them to reach its checkpoint."""
    for number in PreemptionHandler.SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def _end_workers() -> None:
    """Python ends left-over workers by SIGTERM, which they ignore, and would wait for them for ever."""
    workers = multiprocessing.active_children()
    if workers:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler takes their death for a crash
    for worker in workers:
        worker.kill()
