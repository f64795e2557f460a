"""Ask a teacher about every place of every training image, and store its answers.

python -m tasks.token_labeling.generate --data_path ./data/in1k --teacher nfnet_f6.dm_in1k --output ./maps
torchrun --nproc_per_node=8 -m tasks.token_labeling.generate ... (or srun) shares the work among processes.
"""

import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from timm.data.transforms import str_to_pil_interp
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

import utils
from models.pixels import Pixels, normalize, pixels_of
from models.weights import WeightsError
from runtime.command_line import build_parser, with_underscores
from runtime.distributed import DistInfo, find_processes
from runtime.errors import UsageError, exit_on_error, explain_dead_workers
from runtime.images import MAX_PIXELS
from runtime.options import check_ranges, option
from runtime.samplers import Key
from tasks.classification.distillation import channel_axis, logits_of_places
from tasks.classification.options import DataOptions
from tasks.classification.sources import Samples, name_in, names_in, open_sources
from tasks.classification.teacher import Candidate
from tasks.loading import Transformed, usable_workers

from .features import BASIS, Basis, fit, read_basis
from .maps import (
    INDEX,
    Index,
    Map,
    ShardedMaps,
    checksum,
    hash_of,
    is_complete,
    read_index,
    write_atomically,
    write_shard,
)

STRIDE = 16
"""Pixels, of an image of the teacher's own size, from place to place."""
KEPT = 5
"""Classes that are stored of each place."""
SAMPLE = 1024
"""Images whose features decide which components are stored."""
OTHER_MAPS = "{} holds maps of another teacher, size or data set; choose another --output"


@dataclass
class Teacher:
    """A model that says what it sees at every place. side: of the images that it is shown, in pixels.

    labels: whether it says classes; basis: by which it says features, None if it does not.
    """

    model: nn.Module
    pixels: Pixels
    side: int
    device: torch.device
    dtype: torch.dtype | None = None
    labels: bool = True
    basis: Basis | None = None

    def say(self, images: Tensor) -> Map:
        """Images (B, 3, S, S) uint8 -> their maps, each part (B, ..., H, W). UsageError if it has no map."""
        last, features = self.features(images)
        found = self.label(last) if self.labels else {}
        if self.basis is not None:
            found["features"] = self.basis.encode(features).cpu()
        return found

    @torch.no_grad()
    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images -> the last features, and these as a map (B, C, H, W), a vision transformer's tokens, too."""
        images = normalize(images.to(self.device), self.pixels)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            if not hasattr(self.model, "forward_intermediates"):
                features = self.model.forward_features(images)
                return features, features.movedim(channel_axis(features, self.model.num_features, "--teacher"), 1)
            last, maps = self.model.forward_intermediates(images, indices=1, norm=True)
            return last, maps[-1]

    @torch.no_grad()
    def label(self, features: Tensor) -> Map:
        """The last features -> the likeliest classes' log probabilities and numbers, each (B, k, H, W).

        What the classifier makes of the whole image's pooled features, it makes of those at each place.
        """
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            logits = logits_of_places(self.model, features, "--teacher")
        top = logits.log_softmax(-1).topk(min(KEPT, logits.shape[-1]))
        values, indices = (part.permute(0, 3, 1, 2).cpu() for part in top)
        numbers = torch.int16 if logits.shape[-1] <= 2**15 else torch.int32
        return {"values": values.half(), "indices": indices.to(numbers)}


class Squash:
    """Resizes images whole to a square, so that a place in it is a fraction of the image: -> (3, S, S) uint8."""

    def __init__(self, teacher: Teacher) -> None:
        self.side, self.interpolation = teacher.side, str_to_pil_interp(teacher.pixels.interpolation)

    def __call__(self, sample: dict[str, Any]) -> Tensor:
        return pil_to_tensor(sample["image"].resize((self.side, self.side), self.interpolation))


@dataclass
class GenerateOptions(DataOptions):
    """Making maps"""

    eval = False  # training images are opened
    seed = 0

    teacher: str = option(
        "",
        "any model of timm whose last features are a map, or one of this project; for features "
        "alone also vision transformers",
    )
    teacher_path: str = option("", "checkpoint of the teacher; empty: timm's pretrained weights")
    output: str = option("", "folder of the maps; complete shards that it holds are kept")
    labels: bool = option(True, f"store the {KEPT} likeliest classes of every place")
    features: int = option(
        0, "also store so many principal components of the features at every place, a byte each; 0: none", at_least=0
    )
    input_size: int | None = option(
        None,
        f"side in pixels that images are squashed to; null: so that places are {STRIDE} pixels apart in an image of "
        "the teacher's own size",
        at_least=1,
    )
    batch_size: int = option(64, "images per process and step", at_least=1)
    shard_size: int = option(4096, "images per file", at_least=1)
    num_workers: int = option(10, "processes that load images, at most one per core", at_least=0)
    max_image_pixels: int = option(MAX_PIXELS, "larger images are refused", at_least=1)
    amp: str = option("none", "number format of the teacher", choices=tuple(utils.AMP_DTYPES))
    device: str = option("auto", "auto (a GPU if there is one), cuda, cuda:N, mps or cpu")


def parse(argv: Sequence[str] | None = None) -> GenerateOptions:
    """The options of a command line. Exits with code 2 on a bad one."""
    parser = build_parser("tasks.token_labeling.generate", (GenerateOptions,))
    parser.description, parser.epilog = "Store what a teacher says about every place of every training image.", None
    argv = [with_underscores(arg) for arg in (sys.argv[1:] if argv is None else argv)]
    options = GenerateOptions(**vars(parser.parse_args(argv)))
    try:
        check_ranges(options, prefix="--")
        for name in ("teacher", "output"):
            if not getattr(options, name):
                raise UsageError(f"--{name} is missing, see --help")
        if not (options.labels or options.features):
            raise UsageError("--no_labels without --features leaves nothing to store")
    except UsageError as error:
        parser.error(str(error))
    return options


def build_teacher(options: GenerateOptions, classes: Sequence[str], device: torch.device) -> Teacher:
    """Load the teacher. UsageError if it cannot be had, or knows other classes than the data's."""
    name = options.teacher
    candidate = Candidate(name, options.teacher_path, "--teacher")
    if options.labels:
        candidate.check_classes(classes)
    own, reduction = candidate.side, candidate.reduction
    side = options.input_size or -(-own * max(reduction // STRIDE, 1) // reduction) * reduction
    if side % reduction:
        raise UsageError(f"--input_size {side} is no multiple of {reduction}: {name} would see places beyond the image")
    model = candidate.build((options.num_classes or len(classes)) if options.labels else None, side)
    model = model.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
    return Teacher(model, pixels_of(name), side, device, utils.AMP_DTYPES[options.amp], options.labels)


def plan(options: GenerateOptions, source: Dataset, teacher: Teacher) -> Index:
    """Say what is to be made."""
    path, classes = options.teacher_path, list(getattr(source, "classes", []))
    blank = torch.zeros(1, 3, teacher.side, teacher.side, dtype=torch.uint8)
    teacher.say(blank)  # what it cannot say comes out here
    return Index(
        teacher=f"{options.teacher} {path and (checksum(Path(path)) or path)}".strip(),
        names=hash_of(names_in(source, options.data_path)),
        images=len(source),
        classes=classes,
        num_classes=teacher.model.num_classes if teacher.labels else options.num_classes or len(classes),
        grid=list(teacher.features(blank)[1].shape[2:]),
        side=teacher.side,
        shard_size=options.shard_size,
        shards={},
        labels=teacher.labels,
    )


def find_basis(options: GenerateOptions, index: Index, images: Dataset, teacher: Teacher, info: DistInfo) -> Basis:
    """The basis of the features, which the main process makes of evenly spaced images unless the folder holds it.

    UsageError if that one is of something else.
    """
    folder = Path(options.output)
    path, job = folder / BASIS, hash_of([index.job, str(options.features)])
    if not path.exists():
        if (folder / INDEX).exists():
            raise UsageError(OTHER_MAPS.format(folder))
        if info.is_main:
            places = torch.linspace(0, index.images - 1, min(index.images, SAMPLE)).long().tolist()
            maps = (teacher.features(batch)[1] for batch in loaded(options, images, [places]))
            basis, kept = fit(maps, options.features)
            write_atomically(path, basis.to_bytes(job))
            print(f"{options.features} components hold {kept:.1%} of the variance of {len(places)} images' features")
    while not path.exists():
        time.sleep(0.5)
    basis, made_for = read_basis(folder)
    if made_for != job:
        raise UsageError(OTHER_MAPS.format(folder))
    return basis


def prepare(folder: Path, index: Index) -> None:
    """Remove what is damaged from the folder. UsageError if it holds maps of something else."""
    done = read_index(folder)
    if done is None:
        return
    if done.job != index.job:
        raise UsageError(OTHER_MAPS.format(folder))
    damaged = ShardedMaps(folder, done).damaged()
    for name in [INDEX, *damaged] if damaged else []:
        (folder / name).unlink(missing_ok=True)


def generate(options: GenerateOptions, info: DistInfo) -> None:
    """Make the shards that this process has to and that are not there yet; the last to finish writes the index.

    Processes share nothing but the folder: shard n is made by process n modulo their number.
    """
    source, _ = open_sources(options)
    if isinstance(source, IterableDataset):
        raise UsageError(f"--data_set {options.data_set} is a stream, whose images have no numbers; use files or TAR")
    device, folder = utils.choose_device(options.device, info), Path(options.output)
    try:
        teacher = build_teacher(options, getattr(source, "classes", []), device)
        index = plan(options, source, teacher)
    except (UsageError, WeightsError):
        raise
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:  # of a size that it cannot take
        raise UsageError(f"--teacher {options.teacher}: {str(error).partition(chr(10))[0]}") from error
    images = Transformed(Samples(source, None), Squash(teacher), 0, options.max_image_pixels)
    folder.mkdir(parents=True, exist_ok=True)
    if options.features:
        teacher.basis = find_basis(options, index, images, teacher, info)
        index.basis = str(checksum(folder / BASIS))
    prepare(folder, index)
    mine = range(info.rank, len(index.files), info.world_size)
    missing = [number for number in mine if not is_complete(folder / index.files[number], index)]
    with tqdm(total=sum(map(len, map(index.numbers, missing))), unit="image", disable=not info.is_main) as bar:
        batches = loaded(options, images, map(index.numbers, missing))
        for number in missing:
            places, said = index.numbers(number), []
            for _ in range(0, len(places), options.batch_size):
                said.append(teacher.say(batch := next(batches)))
                bar.update(len(batch))
            maps = {part: torch.cat([each[part] for each in said]) for part in index.parts}
            names = [name_in(source, options.data_path, place) for place in places]
            write_shard(folder / index.files[number], maps, names, index.job)
    finish(folder, index)


def loaded(options: GenerateOptions, images: Dataset, groups: Iterable[Sequence[int]]) -> Iterator[Tensor]:
    """Images (B, 3, S, S) by their numbers, in batches that do not reach over the end of a group."""
    size = options.batch_size
    batches = [
        [Key(place) for place in group[start : start + size]]
        for group in groups
        for start in range(0, len(group), size)
    ]
    return iter(DataLoader(images, batch_sampler=batches, num_workers=usable_workers(options.num_workers)))


def finish(folder: Path, index: Index) -> None:
    """Write the index if all shards are there."""
    waiting = [name for name in index.files if not is_complete(folder / name, index)]
    if waiting:
        print(f"{len(waiting)} of {len(index.files)} shards are still to come from other processes", flush=True)
        return
    shards = {name: checksum(folder / name) for name in index.files}
    content = json.dumps({**asdict(index), "shards": shards}, indent=1)
    write_atomically(folder / INDEX, content.encode())
    rows, columns = index.grid
    print(f"Maps of {index.images} images, {rows} x {columns} places each, in {folder}", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    with explain_dead_workers():
        generate(parse(argv), find_processes())


if __name__ == "__main__":
    exit_on_error("tasks.token_labeling.generate", main)
