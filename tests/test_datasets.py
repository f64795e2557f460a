"""Data: what is read, in which order, and what is said when it cannot be read."""

import hashlib
import io
import json
import pickle
import random
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support import CLASSES, SMALL_RUN, build_data, command

from runtime.distributed import DistInfo
from runtime.errors import UsageError
from runtime.samplers import EvalSampler, Key, TrainSampler
from tasks.classification.sources import Cifar100, Digits
from tasks.classification.transforms import eval_transform, train_transform
from tasks.options import parse_args

ALONE = DistInfo()
CPU = torch.device("cpu")


def options_for(*argv):
    return parse_args(["--model", "debiformer_nano", "--num_workers", "0", "--batch_size", "4", *map(str, argv)])


def stream(size, total_batch, world_size, epoch=0, start=0, repeated_aug=False, seed=0, **settings):
    """What all processes see, in order."""
    shares = []
    for rank in range(world_size):
        info = DistInfo(rank, world_size)
        sampler = TrainSampler(size, total_batch, seed, 3 if repeated_aug else 1, info, **settings)
        sampler.set_position(epoch, start)
        assert len(sampler) == len(list(sampler))
        shares.append(list(sampler))
    return [key for keys in zip(*shares, strict=True) for key in keys]


# -- order


@settings(max_examples=30, derandomize=True, deadline=None)
@given(
    size=st.integers(12, 400),
    world_size=st.sampled_from([1, 2, 3, 4, 6]),
    repeated_aug=st.booleans(),
    epoch=st.integers(0, 5),
)
def test_any_number_of_processes_sees_the_same_stream(size, world_size, repeated_aug, epoch):
    one = stream(size, 12, 1, epoch, repeated_aug=repeated_aug)
    assert stream(size, 12, world_size, epoch, repeated_aug=repeated_aug) == one
    half = len(one) // 24 * 12
    assert stream(size, 12, world_size, epoch, start=half, repeated_aug=repeated_aug) == one[half:]


def test_epoch_shows_each_image_once_in_a_new_order():
    first, second = stream(100, 10, 1, epoch=0), stream(100, 10, 1, epoch=1)
    assert sorted(key.index for key in first) == list(range(100))
    assert [key.index for key in first] != [key.index for key in second]
    assert stream(100, 10, 1, seed=1) != first


def test_repeated_augmentation_shows_a_third_of_the_images_three_times():
    keys = stream(600, 64, 4, repeated_aug=True)
    indices = [key.index for key in keys]
    assert len(keys) == 512
    assert all(len(set(indices[i : i + 3])) == 1 for i in range(0, 510, 3))
    assert len(set(indices)) == 171


def batches_of(keys, size):
    return [[key.index for key in keys[start : start + size]] for start in range(0, len(keys), size)]


@settings(max_examples=30, derandomize=True, deadline=None)
@given(size=st.integers(12, 400), kinds=st.integers(1, 3), updates=st.sampled_from([None, 7]), epoch=st.integers(0, 5))
def test_grouped_images_come_in_the_same_order_to_any_number_of_processes(size, kinds, updates, epoch):
    grouped = {"groups": torch.arange(size) ** 2 % kinds, "updates": updates}
    one = stream(size, 12, 1, epoch, **grouped)
    assert [(key.epoch, key.position) for key in one] == [(epoch, place) for place in range(len(one))]
    for world_size in (2, 3):
        assert stream(size, 12, world_size, epoch, **grouped) == one
        assert stream(size, 12, world_size, epoch, start=len(one) // 24 * 12, **grouped) == one[len(one) // 24 * 12 :]


def test_epoch_of_grouped_images_shows_each_once_in_batches_of_one_group():
    groups = torch.arange(120) % 3 // 2  # 80 and 40
    for epoch in range(3):
        keys = stream(120, 12, 1, epoch, groups=groups)
        assert sorted(key.index for key in keys) == list(range(120))
        mixed = [len({int(groups[index]) for index in batch}) > 1 for batch in batches_of(keys, 12)]
        assert mixed == [False] * 9 + [True]  # 6 x 12 and 3 x 12 fill batches, 8 + 4 are left
        drawn = [key.index for key in stream(120, 12, 1, epoch)]
        assert [key.index for key in keys[-12:]] == [index for index in drawn if index in {k.index for k in keys[-12:]}]
        assert batches_of(keys, 12)[:-1] != batches_of(stream(120, 12, 1, epoch + 1, groups=groups), 12)[:-1]


def test_grouped_images_of_an_endless_stream_keep_their_batches_from_turn_to_turn():
    groups = (torch.arange(50) < 20).int()
    keys = [key for epoch in range(4) for key in stream(50, 8, 1, epoch, groups=groups, updates=25)]
    turns = [[key.index for key in keys[start : start + 50]] for start in range(0, 800, 50)]
    assert all(sorted(turn) == list(range(50)) for turn in turns)
    mixed = sum(len({int(groups[index]) for index in batch}) > 1 for batch in batches_of(keys, 8))
    assert mixed <= 2 * len(turns)  # of 100 batches, where one in five hundred would have one group by chance


@pytest.mark.parametrize("updates", [None, 4])
def test_one_group_leaves_the_order_as_it_was(updates):
    for epoch in range(3):
        plain = stream(50, 8, 2, epoch, updates=updates)
        assert stream(50, 8, 2, epoch, updates=updates, groups=torch.ones(50)) == plain


def test_too_few_images_for_a_batch_is_said():
    with pytest.raises(UsageError, match="lower --batch_size"):
        TrainSampler(10, 16, 0, 1, ALONE)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_split_evaluation_counts_every_image_once(world_size):
    shares = [EvalSampler(1797, DistInfo(rank, world_size), split=True) for rank in range(world_size)]
    indices = [key.index for share in shares for key in share]
    assert sorted(indices) == list(range(1797))


def test_augmentation_depends_on_the_key_alone(shared_images):
    options = options_for("--data_path", shared_images, "--input_size", 48)
    images = build_data(options).train.dataset
    torch.manual_seed(1)
    first = images[Key(3, epoch=2, position=7)]["image"]
    torch.manual_seed(2)
    np.random.seed(5)
    assert torch.equal(images[Key(3, epoch=2, position=7)]["image"], first)
    assert not torch.equal(images[Key(3, epoch=2, position=8)]["image"], first)
    assert not torch.equal(images[Key(3, epoch=3, position=7)]["image"], first)


def test_reading_leaves_the_random_numbers_of_the_process_alone(shared_images):
    options = options_for("--data_path", shared_images)
    images = build_data(options).train.dataset
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    images[Key(0)]
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("size", [(1, 1), (2, 1), (2, 2), (3, 1)])
def test_random_crops_of_tiny_images_have_a_pixel(small_options, size):
    crop = train_transform(small_options()).transforms[0]
    random.seed(0)
    image = Image.new("RGB", size)
    for _ in range(500):
        top, left, height, width = crop.get_params(image, (0.01, 1.0), (3 / 4, 4 / 3))
        assert 0 <= top < top + height <= image.height
        assert 0 <= left < left + width <= image.width


def test_workers_load_what_the_process_itself_would(shared_images):
    batches = []
    for workers in (0, 2):
        options = options_for("--data_path", shared_images, "--num_workers", workers, "--input_size", 32)
        data = build_data(options, ALONE, CPU)
        assert data.set_position(epoch=1, start=8) == 2
        batches.append([batch["images"] for batch in data.train])
    assert all(torch.equal(a, b) for a, b in zip(*batches, strict=True))


# -- sources


def test_folders_give_classes_and_images(shared_images):
    data = build_data(options_for("--data_path", shared_images), ALONE, CPU)
    assert (data.num_classes, tuple(data.classes), len(data.val.dataset)) == (4, CLASSES, 20)
    images, targets = next(iter(data.val)).values()
    assert images.shape == (6, 3, 224, 224)  # 1.5 times the batch
    assert targets.tolist() == [0] * 5 + [1]


def test_digits_are_split_the_same_way_always():
    train, test = Digits(train=True), Digits(train=False)
    assert (len(train), len(test)) == (1437, 360)
    assert sorted(np.bincount(test.targets)) == [35, 35, 36, 36, 36, 36, 36, 36, 37, 37]
    assert not {image.tobytes() for image in train.images} & {image.tobytes() for image in test.images}
    image, _ = test[0]
    assert (image.size, image.mode, image.getextrema()[0][1]) == ((8, 8), "RGB", 255)


def test_evaluating_needs_the_test_images_alone(image_folder):
    shutil.rmtree(image_folder / "train")
    data = build_data(options_for("--data_path", image_folder, "--eval"), ALONE, CPU)
    assert (data.train, data.num_classes, len(data.val.dataset)) == (None, 4, 20)


@pytest.mark.parametrize("workers", [0, 2])
def test_hugging_face_datasets(image_folder, tmp_path, workers):
    """Their package and our module have one name; a whole run in a process of its own shows that they get along."""
    pytest.importorskip("pyarrow")
    (image_folder / "val").rename(image_folder / "validation")
    run = ["main.py", *SMALL_RUN, "--epochs", 1, "--data_set", f"hfds/{image_folder}", "--num_workers", workers]
    done = command(*run, "--output_dir", tmp_path / "run", HF_HOME=str(tmp_path / "cache"), HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert "48 images per epoch" in done.stdout
    assert "on the 20 test images" in done.stdout


def write_inaturalist(root, year):
    names = ("Corvus corax", "Lynx lynx")
    categories = [
        {"id": 7 + i, "name": name, "kingdom": "Animalia", "class": cls}
        for i, (name, cls) in enumerate(zip(names, ("Aves", "Mammalia"), strict=True))
    ]
    (root / "categories.json").write_text(json.dumps(categories))
    for split, count in (("train", 8), ("val", 2)):
        files = [f"{split}/{i}.jpg" for i in range(count)]
        (root / split).mkdir()
        for name in files:
            Image.new("RGB", (20, 20)).save(root / name)
        content = {
            "images": [{"id": i, "file_name": name} for i, name in enumerate(files)],
            "annotations": [{"image_id": i, "category_id": 7 + i % 2} for i in range(count)],
        }
        (root / f"{split}{year}.json").write_text(json.dumps(content))


@pytest.mark.parametrize(("name", "year"), [("INAT", 2018), ("INAT19", 2019)])
def test_inaturalist_at_every_level(tmp_path, name, year):
    write_inaturalist(tmp_path, year)
    for category, classes in (
        ("name", ["Corvus corax", "Lynx lynx"]),
        ("class", ["Aves", "Mammalia"]),
        ("kingdom", ["Animalia"]),
    ):
        options = options_for("--data_set", name, "--data_path", tmp_path, "--inat_category", category)
        data = build_data(options, ALONE, CPU)
        assert data.classes == classes
    with pytest.raises(UsageError, match="genus"):
        build_data(options_for("--data_set", name, "--data_path", tmp_path, "--inat_category", "genus"), ALONE, CPU)


def test_incomplete_annotations_of_inaturalist(tmp_path):
    write_inaturalist(tmp_path, 2018)
    path = tmp_path / "val2018.json"
    path.write_text(path.read_text().replace("file_name", "file"))
    with pytest.raises(UsageError, match=f"{tmp_path}: the annotations are incomplete, they lack 'file_name'"):
        build_data(options_for("--data_set", "INAT", "--data_path", tmp_path), ALONE, CPU)


def test_cifar(tmp_path, monkeypatch):
    folder = tmp_path / Cifar100.base_folder
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (8, 3072)).astype(np.uint8)
    contents = {
        "train": {"data": pixels, "fine_labels": list(range(8))},
        "test": {"data": pixels[:4], "fine_labels": list(range(4))},
        "meta": {"fine_label_names": [f"class {i}" for i in range(100)]},
    }
    for name, content in contents.items():
        (folder / name).write_bytes(pickle.dumps(content))
    checksum = {name: hashlib.md5((folder / name).read_bytes()).hexdigest() for name in contents}
    monkeypatch.setattr(Cifar100, "train_list", [["train", checksum["train"]]])
    monkeypatch.setattr(Cifar100, "test_list", [["test", checksum["test"]]])
    monkeypatch.setattr(Cifar100, "meta", {**Cifar100.meta, "md5": checksum["meta"]})
    data = build_data(options_for("--data_set", "CIFAR", "--data_path", tmp_path, "--input_size", 32), ALONE, CPU)
    assert (data.num_classes, data.updates) == (100, 2)
    assert next(iter(data.train))["images"].shape == (4, 3, 32, 32)


def test_evaluation_crops_the_published_share(shared_images):
    transform = eval_transform(options_for("--data_path", shared_images))
    assert transform.transforms[0].size == 256
    assert transform(Image.new("RGB", (300, 400))).shape == (3, 224, 224)


# -- bad input


def test_missing_folder(tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        build_data(options_for("--data_path", tmp_path / "nowhere"), ALONE, CPU)


def test_no_path():
    with pytest.raises(UsageError, match="needs --data_path"):
        build_data(options_for("--data_set", "IMNET"), ALONE, CPU)


def test_no_val_folder(image_folder):
    (image_folder / "val").rename(image_folder / "test")
    with pytest.raises(UsageError, match=r"val is not a folder"):
        build_data(options_for("--data_path", image_folder), ALONE, CPU)


def test_empty_class_folder(image_folder):
    (image_folder / "train" / "yak").mkdir()
    with pytest.raises(UsageError, match=r"train/yak holds no image"):
        build_data(options_for("--data_path", image_folder), ALONE, CPU)


def test_no_class_folders(tmp_path):
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / split / "x.png")
    with pytest.raises(UsageError, match="no class folders"):
        build_data(options_for("--data_path", tmp_path), ALONE, CPU)


def test_classes_that_differ(image_folder):
    (image_folder / "val" / "owl").rename(image_folder / "val" / "eel")
    with pytest.raises(UsageError, match=r"eel is none of the classes of the training data"):
        build_data(options_for("--data_path", image_folder), ALONE, CPU)


def png_bytes():
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 60, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content", [b"", b"no image", png_bytes()[:900], png_bytes()[:20] + b"\xff" * 200], ids=range(4)
)
@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_images_are_named(image_folder, content, workers):
    broken = image_folder / "train" / "dog" / "broken.png"
    broken.write_bytes(content)
    options = options_for("--data_path", image_folder, "--num_workers", workers, "--no_repeated_aug")
    data = build_data(options, ALONE, CPU)
    with pytest.raises(UsageError) as error:
        list(data.train)
    message = str(error.value)
    assert message.startswith(f"cannot read image {broken}")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("IMAGENET", "unknown --data_set"),
        ("CIFAR", "no CIFAR-100 under"),
        ("INAT", "categories.json is missing"),
        ("TAR", "train.tar is missing"),
        ("wds/nothing", "wds/nothing"),
    ],
)
def test_other_sources_that_are_not_there(tmp_path, name, words):
    with pytest.raises(UsageError, match=words):
        build_data(options_for("--data_set", name, "--data_path", tmp_path), ALONE, CPU)


def test_broken_annotations(tmp_path):
    (tmp_path / "categories.json").write_text("{")
    with pytest.raises(UsageError, match="is not JSON"):
        build_data(options_for("--data_set", "INAT", "--data_path", tmp_path), ALONE, CPU)


def test_watched_images_are_spread_over_the_evaluation_data(small_options):
    data = build_data(small_options(), DistInfo(), torch.device("cpu"))
    images = torch.stack(data.watched(4))
    assert images.shape == (4, 3, 32, 32)
    assert torch.equal(images, torch.stack(data.watched(4)))
    everything = torch.cat([batch["images"] for batch in data.val])
    assert torch.equal(images, everything[[0, 5, 10, 15]])
    assert len(data.watched(1000)) == len(everything)
