"""Streams: shards of webdataset, their workers, counts, random numbers, and what is said of damaged ones."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support import SMALL_RUN, build_data, command

from runtime.distributed import DistInfo
from runtime.errors import UsageError
from tasks.classification.streams import Stream
from tasks.options import parse_args

pytest.importorskip("webdataset")

CPU = torch.device("cpu")


def write_shards(root: Path, shards: int, images: int = 48, announced: int | None = None) -> Path:
    """ROOT with so many shards for training and one for validation, of images whose brightness tells them apart."""
    root.mkdir(exist_ok=True)
    splits = {}
    for split, count in {"train": shards, "validation": 1}.items():
        names = [f"images-{split}-{number:04}.tar" for number in range(count)]
        for first, name in enumerate(names):
            with tarfile.open(root / name, "w") as shard:
                for number in range(first, images, count):
                    image = io.BytesIO()
                    Image.new("RGB", (40, 40), (number, number, number)).save(image, "PNG")
                    for suffix, content in {"png": image.getvalue(), "cls": str(number % 4).encode()}.items():
                        entry = tarfile.TarInfo(f"{number:04}.{suffix}")
                        entry.size = len(content)
                        shard.addfile(entry, io.BytesIO(content))
        lengths = [len(range(first, images, count)) for first in range(count)]
        total = announced or images
        splits[split] = {"name": split, "filenames": names, "shard_lengths": lengths, "num_samples": total}
    (root / "_info.json").write_text(json.dumps({"splits": splits}))
    return root


def options_for(root, *argv):
    run = [*SMALL_RUN, "--data_set", "wds/images", "--data_path", root, "--num_classes", 4, "--batch_size", 4]
    return parse_args(list(map(str, [*run, *argv])))


def epoch_of(data, epoch):
    data.set_position(epoch)
    return [batch["images"] for batch in data.train]


def test_shards_are_trained_on_and_evaluated_whole(tmp_path):
    data = build_data(options_for(write_shards(tmp_path, 2)), DistInfo(), CPU)
    assert data.updates == 12
    data.set_position(0)
    images, targets = next(iter(data.train)).values()
    assert images.shape == (4, 3, 32, 32)
    assert set(targets.tolist()) <= {0, 1, 2, 3}
    seen = torch.cat([batch["images"][:, 0, 0, 0] for batch in data.val])
    assert sorted(seen.tolist()) == list(range(48))


def test_epoch_of_a_stream_is_the_same_when_it_begins_again(tmp_path):
    write_shards(tmp_path, 2)
    went_on, begun_again = (build_data(options_for(tmp_path), DistInfo(), CPU) for _ in range(2))
    first = epoch_of(went_on, 0)
    second = epoch_of(went_on, 1)
    torch.manual_seed(5)
    assert all(torch.equal(a, b) for a, b in zip(second, epoch_of(begun_again, 1), strict=True))
    assert not torch.equal(torch.cat(first), torch.cat(second))


def test_processes_and_workers_draw_other_random_numbers(tmp_path):
    """One shard for all, so that they see the same images."""
    stream = build_data(options_for(write_shards(tmp_path, 1)), DistInfo(), CPU).train.dataset
    stream.transform = lambda sample: float(np.random.rand()) + float(torch.rand(()))
    drawn = set()
    for rank in range(2):
        stream.reader.dist_rank = rank
        stream.reader.split_info.filenames = ("images-train-0000.tar",) * 2
        stream.reader.dist_num_replicas = 2
        drawn.add(next(iter(stream)))
    assert len(drawn) == 2


def test_no_more_workers_than_shards_for_each_process(tmp_path):
    stream = build_data(options_for(write_shards(tmp_path, 5)), DistInfo(), CPU).train.dataset
    assert isinstance(stream, Stream)
    assert [stream.usable_workers(10, DistInfo(0, world)) for world in (1, 2, 3)] == [5, 2, 1]
    assert stream.usable_workers(1, DistInfo(0, 2)) == 1
    with pytest.raises(UsageError, match="has 5 shards for 6 processes; write more shards, or start fewer"):
        stream.usable_workers(10, DistInfo(0, 6))


def test_stream_of_one_shard_trains_all_updates_with_two_workers(tmp_path):
    options = options_for(write_shards(tmp_path, 1), "--num_workers", 2)
    data = build_data(options, DistInfo(), CPU)
    assert data.train.num_workers == 1
    assert len(epoch_of(data, 0)) == data.updates == 12


def test_two_processes_share_three_shards(tmp_path):
    """Shares are unequal; all processes make as many updates."""
    run = [*SMALL_RUN, "--data_set", "wds/images", "--data_path", write_shards(tmp_path / "data", 3), "--epochs", 1]
    launch = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "main.py"]
    done = command(*launch, *run, "--num_classes", 4, "--num_workers", 2, "--output_dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "48 images per epoch" in done.stdout
    assert "on the 48 test images" in done.stdout


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"png": b"torn"}, "cannot read image 0000 of "),
        ({"png": None}, "holds no jpg, png"),
        ({"cls": b"cat"}, "says no class number"),
    ],
)
def test_unusable_samples_are_named(tmp_path, content, words):
    write_shards(tmp_path, 1)
    with tarfile.open(tmp_path / "images-train-0000.tar", "w") as shard:
        for suffix, value in {"txt": b"", "png": b"", "cls": b"1", **content}.items():
            if value is not None:
                entry = tarfile.TarInfo(f"0000.{suffix}")
                entry.size = len(value)
                shard.addfile(entry, io.BytesIO(value))
    with pytest.raises(UsageError, match=words) as error:
        epoch_of(build_data(options_for(tmp_path), DistInfo(), CPU), 0)
    assert "\n" not in str(error.value)


def test_torn_shard_is_named(tmp_path):
    shard = write_shards(tmp_path, 1) / "images-train-0000.tar"
    shard.write_bytes(shard.read_bytes()[:5000])
    with pytest.raises(UsageError, match=r"a shard is damaged .*images-train-0000\.tar"):
        epoch_of(build_data(options_for(tmp_path), DistInfo(), CPU), 0)
