"""Images in tar files."""

import hashlib
import shutil
import tarfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch
from support import CLASSES, SMALL_RUN, build_data, command, complaint

import runtime.tar
from runtime.distributed import DistInfo
from runtime.tar import TarFiles
from tasks.options import parse_args

CPU = torch.device("cpu")
SUFFIXES = (".png",)


def options_for(data_set, root, *argv):
    run = [*SMALL_RUN, "--data_set", data_set, "--data_path", root, "--batch_size", 4]
    return parse_args(list(map(str, [*run, *argv])))


def pack(folder, root, arcname="."):
    """train.tar and val.tar of FOLDER/train and FOLDER/val."""
    root.mkdir(exist_ok=True)
    for split in ("train", "val"):
        with tarfile.open(root / f"{split}.tar", "w") as tar:
            tar.add(folder / split, arcname=arcname)
    return root


@pytest.mark.parametrize("arcname", [".", "some/where"])
def test_tar_file_is_read_as_the_folder_it_was_made_of(image_folder, tmp_path, arcname):
    for split in ("train", "val"):
        for number, name in enumerate(CLASSES):  # names that sort otherwise as numbers than as letters
            (image_folder / split / name).rename(image_folder / split / f"class{(2, 10, 1, 9)[number]}")
    pack(image_folder, tmp_path / "packed", arcname)
    options = (options_for("IMNET", image_folder), options_for("TAR", tmp_path / "packed"))
    folder, tar = (build_data(given, DistInfo(), CPU) for given in options)
    assert folder.classes == tar.classes == ["class1", "class10", "class2", "class9"]
    for a, b in ((folder.train, tar.train), (folder.val, tar.val)):
        for batch, same in zip(a, b, strict=True):
            assert all(torch.equal(batch[name], same[name]) for name in ("images", "targets"))


def test_tar_files_inside_a_tar_file_are_classes(shared_images, tmp_path):
    """As ImageNet is published."""
    with tarfile.open(tmp_path / "train.tar", "w") as outer:
        for name in CLASSES:
            with tarfile.open(tmp_path / f"{name}.tar", "w") as inner:
                for path in sorted((shared_images / "train" / name).iterdir()):
                    inner.add(path, arcname=path.name)
            outer.add(tmp_path / f"{name}.tar", arcname=f"{name}.tar")
    files = TarFiles(tmp_path / "train.tar", SUFFIXES)
    assert files.names[0] == "cat/0.png"
    found = sorted(hashlib.sha256(files.read(number)).digest() for number in range(len(files)))
    originals = (shared_images / "train").rglob("*.png")
    assert found == sorted(hashlib.sha256(path.read_bytes()).digest() for path in originals)


def _digests(job):
    files, numbers = job
    return [hashlib.sha256(files.read(number)).hexdigest() for number in numbers]


_shared = None


def _forked_digests(numbers):
    return [hashlib.sha256(_shared.read(number)).hexdigest() for number in numbers]


def test_forked_processes_read_the_same_file_at_once(shared_images, tmp_path):
    """One descriptor, opened before the fork; each process reads in another order."""
    global _shared
    _shared = TarFiles(pack(shared_images, tmp_path) / "train.tar", SUFFIXES)
    expected = _digests((_shared, range(len(_shared))))
    orders = [list(range(len(_shared)))[::step] * 50 for step in (1, -1)]
    with ProcessPoolExecutor(2, mp_context=get_context("fork")) as pool:
        for order, found in zip(orders, pool.map(_forked_digests, orders), strict=True):
            assert found == [expected[number] for number in order]


def test_attention_of_tar_files_is_logged_while_workers_read_them(shared_images, tmp_path):
    """The main process reads some images before its workers start."""
    run = [*SMALL_RUN, "--data_set", "TAR", "--data_path", pack(shared_images, tmp_path / "data"), "--epochs", 1]
    done = command("main.py", *run, "--num_workers", 2, "--log_attention", 1, "--output_dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr


def test_two_processes_train_on_a_tar_file(shared_images, tmp_path):
    """One of them lists it and tells the other."""
    run = [*SMALL_RUN, "--data_set", "TAR", "--data_path", pack(shared_images, tmp_path / "data"), "--epochs", 1]
    launch = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "main.py"]
    done = command(*launch, *run, "--output_dir", tmp_path / "run", DEBIFORMER_HOME=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["train.tar", "val.tar"]
    (tmp_path / "data" / "val.tar").write_bytes(b"")
    failed = command(*launch, *run, "--output_dir", tmp_path / "other")
    assert failed.stderr.count(f"main.py: error: {tmp_path / 'data' / 'val.tar'} is no uncompressed tar archive") == 2


def test_index_of_a_large_file_is_kept_in_the_cache(shared_images, tmp_path, monkeypatch):
    monkeypatch.setattr(runtime.tar, "CACHED_FROM", 10)
    path, cache = pack(shared_images, tmp_path / "data") / "train.tar", tmp_path / "cache"
    first = TarFiles(path, SUFFIXES, cache)
    (kept,) = cache.iterdir()
    monkeypatch.setattr(runtime.tar, "_scan", None)  # not to be called again
    again = TarFiles(path, SUFFIXES, cache)
    assert list(again.names) == list(first.names)
    assert again.read(7) == first.read(7)
    monkeypatch.undo()
    monkeypatch.setattr(runtime.tar, "CACHED_FROM", 10)
    kept.write_bytes(kept.read_bytes()[:100])  # damaged: made anew
    assert list(TarFiles(path, SUFFIXES, cache).names) == list(first.names)
    shutil.copy(path.with_name("val.tar"), path)  # another file of the same name
    assert len(TarFiles(path, SUFFIXES, cache)) == 20


def test_unusable_tar_files_get_one_line(shared_images, tmp_path):
    path = pack(shared_images, tmp_path) / "train.tar"
    content = path.read_bytes()
    path.write_bytes(content[:50_000])
    assert f"{path} is no uncompressed tar archive, or it is damaged" in complaint(TarFiles, path, SUFFIXES)
    with tarfile.open(path, "w:gz") as tar:
        tar.add(shared_images / "train", arcname=".")
    assert f"{path} is no uncompressed tar archive" in complaint(TarFiles, path, SUFFIXES)
    with tarfile.open(path, "w") as tar:
        tar.add(shared_images / "train" / "cat" / "0.png", arcname="0.png")
    options = options_for("TAR", tmp_path)
    assert "must hold class folders" in complaint(build_data, options, DistInfo(), CPU)
