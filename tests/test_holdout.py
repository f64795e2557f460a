"""--val_fraction and folders of Hugging Face's save_to_disk: what is trained on, and what is evaluated on."""

import shutil
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import CLASSES, SMALL_RUN, build_data, command, complaint

import main
from models.weights import load_checkpoint
from runtime.checkpoint import BEST, LAST
from runtime.distributed import DistInfo
from tasks.classification.saved import import_hugging_face
from tasks.options import parse_args


def options_for(folder, *argv):
    return parse_args([*SMALL_RUN, "--data_path", str(folder), *map(str, argv)])


@pytest.fixture
def only_train(image_folder):
    """train/ with 12 images of each of four classes, and nothing else."""
    shutil.rmtree(image_folder / "val")
    return image_folder


def parts_of(options, info=None):
    """Names of the images to train on, and of those to evaluate on."""
    data = build_data(options, info or DistInfo())
    return [[loader.dataset.source.name_of(n) for n in range(len(loader.dataset))] for loader in (data.train, data.val)]


@pytest.mark.parametrize(("fraction", "count"), [(0.25, 3), (0.01, 1), (0.99, 11)])
def test_every_class_keeps_its_share(only_train, fraction, count):
    train, val = parts_of(options_for(only_train, "--val_fraction", fraction, "--batch_size", 4))
    assert not set(train) & set(val)
    assert len(train) + len(val) == 48
    assert [sum(f"/{name}/" in path for path in val) for name in CLASSES] == [count] * 4


def test_split_hangs_on_names_alone(only_train, tmp_path):
    before = parts_of(options_for(only_train, "--val_fraction", 0.25))[1]
    again = parts_of(options_for(only_train, "--val_fraction", 0.25, "--seed", 9))[1]
    moved = Path(shutil.copytree(only_train, tmp_path / "elsewhere"))
    there = parts_of(options_for(moved, "--val_fraction", 0.25))[1]
    assert before == again
    assert [Path(path).relative_to(moved) for path in there] == [Path(path).relative_to(only_train) for path in before]
    alone = parts_of(options_for(only_train, "--val_fraction", 0.25))[1]
    assert alone == before


def test_val_is_used_where_it_is_there(image_folder):
    train, val = parts_of(options_for(image_folder, "--val_fraction", 0.25))
    assert (len(train), len(val)) == (48, 20)


def test_without_the_option_its_absence_is_told_with_the_remedy(only_train):
    assert "--val_fraction 0.2" in complaint(build_data, options_for(only_train))


def test_tar_files_are_divided_too(only_train, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        for name in CLASSES:
            tar.add(only_train / "train" / name, name)
    train, val = parts_of(options_for(tmp_path, "--data_set", "TAR", "--val_fraction", 0.25))
    assert (len(train), len(val)) == (36, 12)


def test_resuming_and_evaluating_keep_the_split(only_train, tmp_path):
    run = tmp_path / "run"
    options = options_for(only_train, "--val_fraction", 0.25, "--epochs", 1, "--output_dir", run)
    first = main.run(options)
    held_out = load_checkpoint(run / BEST)["held_out"]
    assert len(held_out) == 12
    assert held_out == load_checkpoint(run / LAST)["held_out"]

    for name in CLASSES:  # new images, which a fresh split would have moved others for
        for path in list((only_train / "train" / name).iterdir()):
            shutil.copy(path, path.with_name(f"new {path.name}"))
    evaluated = main.run(options_for(only_train, "--eval", "--resume", run / BEST))
    best = load_checkpoint(run / BEST)["best"]
    assert evaluated["images"] == 12
    assert evaluated["acc1"] == best["acc1"]
    assert first["epoch"] == 0

    main.run(options_for(only_train, "--val_fraction", 0.25, "--epochs", 2, "--output_dir", run))
    content = load_checkpoint(run / LAST)
    assert content["held_out"] == held_out
    assert content["data"]["images"] == 96 - 12


def test_held_out_image_that_is_gone_is_named(only_train, tmp_path):
    run = tmp_path / "run"
    main.run(options_for(only_train, "--val_fraction", 0.25, "--epochs", 1, "--output_dir", run))
    gone = load_checkpoint(run / BEST)["held_out"][0]
    (only_train / gone).unlink()
    assert gone in complaint(main.run, options_for(only_train, "--eval", "--resume", run / BEST))


def test_two_processes_hold_out_the_same(only_train, tmp_path):
    run = [*SMALL_RUN, "--epochs", 1, "--data_path", only_train, "--val_fraction", 0.25, "--batch_size", 4]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]
    done = command(*launcher, "main.py", *run, "--output_dir", tmp_path / "run", "--dist_eval")
    assert done.returncode == 0, done.stderr
    assert "12 of the training images are kept for evaluation" in done.stderr
    alone = build_data(options_for(only_train, "--val_fraction", 0.25))
    assert load_checkpoint(tmp_path / "run" / BEST)["held_out"] == alone.task.held_out


# -- save_to_disk


@pytest.fixture(scope="module")
def hugging_face():
    """Their datasets. It is read once, and its name given back to this project's module."""
    ours = sys.modules.pop("datasets", None)
    library = import_hugging_face()
    sys.modules.pop("datasets")
    if ours is not None:
        sys.modules["datasets"] = ours
    return library


@pytest.fixture
def library(hugging_face, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", hugging_face)
    return hugging_face


def write_saved(library, folder, **counts):
    """Splits of so many images, of the classes ant and bee in turn."""
    features = library.Features({"image": library.Image(), "label": library.ClassLabel(names=["ant", "bee"])})
    draw = np.random.default_rng(0)
    splits = {}
    for split, count in counts.items():
        pictures = [Image.fromarray(draw.integers(0, 256, (40, 44, 3), dtype=np.uint8)) for _ in range(count)]
        rows = {"image": pictures, "label": [number % 2 for number in range(count)]}
        splits[split] = library.Dataset.from_dict(rows, features=features)
    whole = library.DatasetDict(splits) if len(splits) > 1 else splits["train"]
    whole.save_to_disk(str(folder))


def test_saved_splits_are_read(library, tmp_path):
    write_saved(library, tmp_path / "saved", train=16, validation=6)
    data = build_data(options_for(tmp_path / "saved"))
    assert (data.images, len(data.val.dataset), data.classes) == (16, 6, ["ant", "bee"])
    assert next(iter(data.train))["images"].shape == (8, 3, 32, 32)
    assert next(iter(data.val))["targets"].tolist() == [0, 1, 0, 1, 0, 1]


@pytest.mark.parametrize("counts", [{"train": 16}, {"train": 16, "test": 4}])
def test_saved_splits_without_validation_are_divided(library, tmp_path, counts):
    write_saved(library, tmp_path / "saved", **counts)
    data = build_data(options_for(tmp_path / "saved", "--val_fraction", 0.25))
    assert (data.images, len(data.val.dataset)) == (12, 4)
    assert "--val_fraction 0.2" in complaint(build_data, options_for(tmp_path / "saved"))


def test_saved_table_without_labels_is_told_by_its_columns(library, tmp_path):
    library.Dataset.from_dict({"text": ["a", "b"]}).save_to_disk(str(tmp_path / "saved"))
    words = complaint(build_data, options_for(tmp_path / "saved", "--val_fraction", 0.5))
    assert words.endswith("its columns are text")


def test_run_trains_on_a_saved_folder(library, tmp_path):
    write_saved(library, tmp_path / "saved", train=16, validation=6)
    run = ["main.py", *SMALL_RUN, "--epochs", 1, "--num_workers", 2]
    done = command(*run, "--data_path", tmp_path / "saved", "--output_dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "on the 6 test images" in done.stdout
    assert load_checkpoint(tmp_path / "run" / BEST)["classes"] == ["ant", "bee"]
