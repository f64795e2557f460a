"""Images that come as a stream: webdataset's shards, and what timm streams from Hugging Face and TensorFlow."""

import io
import json
import os
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from PIL import Image
from timm.data.readers.shared_count import SharedCount
from torch.utils.data import IterableDataset, get_worker_info

from runtime.distributed import DistInfo
from runtime.errors import TemporaryFailure, UsageError
from runtime.images import MAX_PIXELS, ImageRefused, open_rgb, to_rgb
from runtime.storage import is_transient
from utils import seeded, unite_seeds

IMAGE_KEYS = ("jpg", "png", "jpeg", "webp")
"""What the image of a shard's sample may be called."""

Sample = tuple[Any, int]


class Stream(IterableDataset):
    """A process's share of a stream, transformed.

    Which images come, in which order, and every random choice about them is a function of (seed, epoch, process,
    worker), so that a run that begins an epoch again sees the same.

    reader: of timm. numbers: the class number to give for each of the reader's; None: as they are.
    """

    def __init__(self, reader: Any, name: str, training: bool, seed: int) -> None:
        self.reader, self.name, self.training, self.seed = reader, name, training, seed
        number_of = getattr(reader, "class_to_idx", None) or {}
        self.classes: list[str] = sorted(number_of, key=number_of.get)
        self.transform: Callable[[dict[str, Any]], dict[str, Any]] = lambda sample: sample
        self.numbers: Sequence[int] | None = None
        self.max_pixels = MAX_PIXELS
        self.epoch = SharedCount()

    def __len__(self) -> int:
        """Images that this process gets, once `split` has said among how many workers."""
        return len(self.reader)

    @property
    def shards(self) -> int | None:
        """Shards of the whole stream; None where it can be split anywhere."""
        if hasattr(self.reader, "split_info") and hasattr(self.reader.split_info, "filenames"):
            return len(self.reader.split_info.filenames)
        if hasattr(self.reader, "builder") and hasattr(self.reader.builder, "as_streaming_dataset"):
            return self.reader.builder.as_streaming_dataset(split=self.reader.split).num_shards
        return None

    def usable_workers(self, wanted: int, processes: DistInfo) -> int:
        """At most `wanted` workers, so that each has a shard. UsageError if there are fewer shards than processes."""
        shards = self.shards
        if shards is None:
            return wanted
        share = shards // processes.world_size
        if share == 0:
            raise UsageError(
                f"--data_set {self.name} has {shards} shards for {processes.world_size} processes; "
                "write more shards, or start fewer processes"
            )
        return min(wanted, share)

    def split(self, processes: DistInfo, workers: int) -> None:
        """Take this process's share of the stream, to be read by `workers`."""
        self.reader.dist_rank, self.reader.dist_num_replicas = processes.rank, processes.world_size
        self.reader.set_loader_cfg(num_workers=workers)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that comes next; workers that already run learn of it."""
        self.epoch.value = epoch
        if hasattr(self.reader, "set_epoch"):
            self.reader.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        seeds = self.seed, self.epoch.value, self.reader.dist_rank, worker
        shards = hasattr(self.reader, "split_info") and hasattr(self.reader.split_info, "filenames")
        samples = self._of_shards(worker, workers, seeds) if shards else self._of_reader()
        for count, (image, target) in enumerate(samples):
            with seeded(*seeds, count):
                yield self.transform({"image": image, "target": self._numbered(target)})

    def _numbered(self, target: int) -> int:
        return target if self.numbers is None else self.numbers[target]

    def _of_reader(self) -> Iterator[Sample]:
        for image, target in self.reader:
            yield to_rgb(image), int(target)

    def _of_shards(self, worker: int, workers: int, seeds: tuple[int, ...]) -> Iterator[Sample]:
        """In training shuffled, and again from the start until this worker's count is full."""
        import webdataset as wds

        reader = self.reader
        paths = [os.path.join(reader.root, name) for name in reader.split_info.filenames]
        if self.training:
            random.Random(unite_seeds(self.seed, self.epoch.value)).shuffle(paths)
        first, step = reader.dist_rank * workers + worker, reader.dist_num_replicas * workers
        if not paths[first::step]:
            return
        stages = [wds.SimpleShardList(paths[first::step]), wds.tarfile_to_samples()]
        if self.training:
            generator = random.Random(unite_seeds(*seeds))
            stages.append(wds.shuffle(reader.sample_shuffle_size, initial=reader.sample_initial_size, rng=generator))
        samples = wds.DataPipeline(*stages)
        if self.training:
            samples = samples.with_epoch(len(reader) // workers)
        try:
            for sample in samples:
                target = self._target_of(sample)
                if target is not None:
                    yield self._image_of(sample), target
        except UsageError:
            raise
        except Exception as error:  # of a torn shard, webdataset raises almost anything
            if is_transient(error):
                raise TemporaryFailure(f"the storage of --data_set {self.name} fails ({error})") from error
            reason = f"{type(error).__name__}: {error}"
            raise UsageError(f"--data_set {self.name}: a shard is damaged ({reason}); repair or remove it") from error

    def _target_of(self, sample: dict[str, bytes]) -> int | None:
        """The number in `cls`, or in the JSON where the split says so; None of images marked there by -1."""
        label = self.reader.split_info.alt_label
        try:
            target = int(json.loads(sample["json"])[label]) if label else int(sample["cls"])
        except (KeyError, TypeError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise UsageError(f"sample {_name_of(sample)} says no class number ({reason}); pack it anew") from error
        return None if label and target < 0 else target

    def _image_of(self, sample: dict[str, bytes]) -> Image.Image:
        content = next((sample[key] for key in IMAGE_KEYS if key in sample), None)
        if content is None:
            raise UsageError(f"sample {_name_of(sample)} holds no {', '.join(IMAGE_KEYS)}; pack it anew")
        try:
            return open_rgb(io.BytesIO(content), self.max_pixels)
        except ImageRefused as error:
            raise UsageError(f"cannot use image {_name_of(sample)}: it {error}") from error
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise UsageError(f"cannot read image {_name_of(sample)} ({reason}); repair or remove it") from error


def _name_of(sample: dict[str, Any]) -> str:
    return f"{sample.get('__key__')} of {sample.get('__url__')}"
