"""From a task's sources to batches.

Every random choice about an image is a function of (seed, epoch, position), see runtime/samplers.py; the state of a
worker never matters.
"""

import atexit
import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset

from runtime.agreement import gather
from runtime.distributed import DistInfo
from runtime.errors import TemporaryFailure, UsageError
from runtime.images import MAX_PIXELS, ImageRefused, open_rgb, read_pixels
from runtime.options import RunOptions
from runtime.preemption import PreemptionHandler
from runtime.samplers import EvalSampler, Key, TrainSampler
from runtime.storage import read_patiently
from utils import seeded, unite_seeds

from .base import Batch, Sample, Task


class Transformed(Dataset):
    """A source with a transform, addressed by `Key`: the same key gives the same tensors, whoever computes them.

    max_pixels: of an image that is read.
    """

    def __init__(
        self, source: Dataset, transform: Callable[[Sample], Sample], seed: int, max_pixels: int = MAX_PIXELS
    ) -> None:
        self.source, self.transform, self.seed, self.max_pixels = source, transform, seed, max_pixels
        self._left_to_pillow = multiprocessing.Value("q", 0)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: Key) -> Sample:
        sample = self.read(key.index)
        with seeded(self.seed, key.epoch, key.position):
            return self.transform(sample)

    def read(self, index: int) -> Sample:
        """Return a sample with its image opened. Raises UsageError, naming the file, if that cannot be done."""
        fast = getattr(self.transform, "takes_pixels", False)
        open_image = partial(read_pixels, refused=self._count_refused) if fast else open_rgb
        return opened(lambda: self.source[index], self.source.name_of(index), self.max_pixels, open_image)

    def _count_refused(self) -> None:
        with self._left_to_pillow.get_lock():
            self._left_to_pillow.value += 1

    def take_refused(self) -> int:
        """Return how many JPEGs this process and its workers have left to Pillow, and begin to count anew."""
        with self._left_to_pillow.get_lock():
            count, self._left_to_pillow.value = self._left_to_pillow.value, 0
        return count


def opened(get: Callable[[], Sample], name: str, max_pixels: int, open_image: Callable = open_rgb) -> Sample:
    """Return the sample of `get` with its image opened. Raises UsageError, with this name, if that cannot be done."""

    def read() -> Sample:
        sample = get()
        image = sample["image"]
        return {**sample, "image": image if isinstance(image, Image.Image) else open_image(image, max_pixels)}

    try:
        return read_patiently(read, f"image {name}")
    except (TemporaryFailure, UsageError):
        raise
    except ImageRefused as error:
        raise UsageError(f"cannot read image {name}: it {error} (--max_image_pixels)") from error
    except Exception as error:
        # A broken file makes Pillow raise anything from OSError to struct.error.
        kind = type(error).__name__
        raise UsageError(f"cannot read image {name} ({kind}: {error}); repair or remove it") from error


def open_image(path: str) -> Image.Image:
    """Open an image file as RGB. Raises UsageError, naming it, if that cannot be done."""
    return opened(lambda: {"image": path}, path, MAX_PIXELS)["image"]


@dataclass
class Data:
    """What a run needs to know of its data. train: None when only evaluating.

    updates: optimizer updates per epoch; total_batch: images per update over all processes.
    dist_eval: each process evaluates its own share; val_batches: batches that every process has at least.
    images: how many there are to train on; None in a stream.
    """

    train: DataLoader | None
    val: DataLoader
    updates: int
    total_batch: int
    dist_eval: bool
    val_batches: int
    images: int | None = None

    @property
    def epoch_images(self) -> int:
        """Images that all processes together see in an epoch."""
        return self.updates * self.total_batch

    def watched(self, count: int) -> Sequence[Tensor]:
        """Return up to `count` evaluation images (3, H, W) uint8, spread over the data, the same each time."""
        dataset = self.val.dataset
        if isinstance(dataset, IterableDataset):  # a stream's first ones
            return next(iter(self.val))["images"][:count]
        count = min(count, len(dataset))
        return [dataset[Key(number * len(dataset) // count)]["image"] for number in range(count)]

    def first_batch(self) -> Batch:
        """Return a training batch, the same each time, without touching the loader."""
        dataset, size = self.train.dataset, self.train.batch_size
        if isinstance(dataset, IterableDataset):
            return next(iter(self.val))
        with seeded(0):
            samples = [dataset.transform(dataset.read(number % len(dataset))) for number in range(size)]
        return self.train.collate_fn(samples)

    @property
    def streamed(self) -> bool:
        """Whether training images come as a stream, which cannot be entered midway."""
        return self.train is not None and isinstance(self.train.dataset, IterableDataset)

    def remarks(self, info: DistInfo) -> list[str]:
        """Say what was odd about the training images since the last time, a line each; all processes call this."""
        count = 0 if self.streamed else sum(gather(self.train.dataset.take_refused(), info))
        return [f"JPEGs that only Pillow reads, which takes longer (CMYK, turned or damaged): {count}"] if count else []

    def set_position(self, epoch: int, start: int = 0) -> int:
        """Set the training loader to image `start` (of a stream 0) of `epoch`. Returns the update it stands at."""
        if self.streamed:
            self.train.dataset.set_epoch(epoch)
        else:
            self.train.sampler.set_position(epoch, start)
        return start // self.total_batch


def build_data(task: Task, options: RunOptions, trained: Sequence[str] = ()) -> Data:
    """Build the loaders of a run. Raises UsageError for data that cannot be used.

    trained: the classes that the weights know, by number, where they say so. The images get these numbers.
    """
    info = task.info
    train_source, val_source = task.sources(trained)
    train, updates, images = None, 0, None
    total_batch = options.batch_size * info.world_size * options.accum_steps
    if isinstance(train_source, IterableDataset):
        train, updates = _load_stream(train_source, task, options)
    elif train_source is not None:
        images = len(train_source)
        train, updates = _load_images(train_source, task, options, total_batch)
    val, split = _load_test(val_source, task, options)
    val_batches = 0  # unknown
    if not isinstance(val_source, IterableDataset):
        smallest_share = len(val_source) // (info.world_size if split else 1)
        val_batches = -(-smallest_share // task.eval_batch_size)
    return Data(train, val, updates, total_batch, split, val_batches, images)


def _loader(task: Task, options: RunOptions, dataset: Dataset, workers: int, **settings: Any) -> DataLoader:
    return DataLoader(
        dataset,
        num_workers=workers,
        pin_memory=options.pin_mem and task.device.type == "cuda",
        persistent_workers=workers > 0,
        worker_init_fn=ignore_stop_signals,
        collate_fn=task.collate,
        **settings,
    )


def usable_workers(asked: int) -> int:
    """Return how many of the processes asked for are worth it: at most one per core, of this process's share of them.

    torchrun's processes on a machine share its cores; Slurm gives each task its own.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # not on a Mac
    return min(asked, max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def _load_images(source: Dataset, task: Task, options: RunOptions, total_batch: int) -> tuple[DataLoader, int]:
    """The training loader, and updates per epoch."""
    updates = options.eval_every if options.iterations else None
    groups = task.groups(source)
    sampler = TrainSampler(len(source), total_batch, options.seed, task.repeats, task.info, updates, groups)
    dataset = Transformed(source, task.transform(train=True), options.seed, options.max_image_pixels)
    load = partial(_loader, task, options, dataset, usable_workers(options.num_workers))
    return load(batch_size=options.batch_size, sampler=sampler, drop_last=True), sampler.length // total_batch


def _load_stream(source: IterableDataset, task: Task, options: RunOptions) -> tuple[DataLoader, int]:
    """The same of a stream; all processes take as many workers and images."""
    info = task.info
    workers = min(gather(source.usable_workers(usable_workers(options.num_workers), info), info))
    source.split(info, workers)
    source.transform, source.max_pixels = task.transform(train=True), options.max_image_pixels
    lengths = gather(len(source), info)  # timm's readers count this process's share alone
    if len(set(lengths)) > 1:
        raise UsageError(f"--data_set {source.name} is not the same on all machines: shares of {lengths} images")
    updates = lengths[0] // (options.batch_size * options.accum_steps)
    if updates == 0:
        raise UsageError(f"--data_set {source.name} does not fill one batch; lower --batch_size")
    generator = torch.Generator().manual_seed(unite_seeds(options.seed, info.rank))
    settings = {"batch_size": options.batch_size, "drop_last": True, "generator": generator}
    return _loader(task, options, source, workers, **settings), updates


def _load_test(source: Dataset, task: Task, options: RunOptions) -> tuple[DataLoader, bool]:
    """The evaluation loader, and whether each process evaluates its own share."""
    workers = usable_workers(options.num_workers)
    if isinstance(source, IterableDataset):
        # Split among processes, timm's streams may leave images out or repeat them: each process reads them all.
        source.split(DistInfo(), workers)
        source.transform, source.max_pixels = task.transform(train=False), options.max_image_pixels
        return _loader(task, options, source, workers, batch_size=task.eval_batch_size), False
    split = options.dist_eval and task.info.distributed
    sampler = BatchSampler(EvalSampler(len(source), task.info, split), task.eval_batch_size, drop_last=False)
    dataset = Transformed(source, task.transform(train=False), options.seed, options.max_image_pixels)
    return _loader(task, options, dataset, workers, batch_sampler=sampler), split


def ignore_stop_signals(worker: int) -> None:
    """Leave stop requests to the process that a worker loads for, which needs it to reach its checkpoint."""
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
