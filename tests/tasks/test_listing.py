"""Lists of images: what is in them, when folders are read again, and who shares a list."""

import os
import pickle
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from support import ROOT

from tasks.classification import listing
from tasks.classification.listing import list_images

NUMBERS = {"owl": 4, "cat": 7, "dog": 1}
FILES = ("b.png", "a.JPEG", "notes.txt", "inner/z.jpg", "inner/deep/é.webp", "a inner/c.png")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Three class folders of five images; lists of any length are kept, and believed at once."""
    for name in NUMBERS:
        for file in FILES:
            path = tmp_path / "data" / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    monkeypatch.setenv("DEBIFORMER_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(listing, "KEPT_FROM", 1)
    monkeypatch.setattr(listing, "SETTLED_NS", 0)
    return tmp_path / "data"


@pytest.fixture
def walked(folder, monkeypatch):
    """How often each class folder was walked."""
    walk, counts = os.walk, Counter()

    def counting(top, **settings):
        counts[Path(top).name] += 1
        return walk(top, **settings)

    monkeypatch.setattr(os, "walk", counting)
    return counts


def paths_of(folder, numbers=NUMBERS):
    paths, targets = list_images(folder, numbers)
    return [(os.path.relpath(path, folder), int(target)) for path, target in zip(paths, targets, strict=True)]


def expected(*names):
    order = ("a.JPEG", "b.png", "a inner/c.png", "inner/z.jpg", "inner/deep/é.webp")
    return [(f"{name}/{file}", NUMBERS[name]) for name in names for file in order]


def kept(folder):
    return sorted((folder.parent / "cache").iterdir())


def test_images_come_by_class_folder_and_name(folder):
    for _ in range(2):  # listed, and read from the cache
        assert paths_of(folder) == expected("cat", "dog", "owl")


def test_second_list_reads_no_folder(folder, walked):
    paths_of(folder)
    assert walked == {"cat": 1, "dog": 1, "owl": 1}
    paths_of(folder)
    assert paths_of(folder, dict.fromkeys(NUMBERS, 0)) == [(name, 0) for name, _ in paths_of(folder)]
    assert walked == {"cat": 1, "dog": 1, "owl": 1}


def test_changed_folder_alone_is_read_again(folder, walked):
    paths_of(folder)
    (folder / "dog" / "inner" / "deep" / "é.webp").rename(folder / "dog" / "inner" / "deep" / "new.webp")
    found = [name for name, _ in paths_of(folder)]
    assert walked == {"cat": 1, "dog": 2, "owl": 1}
    assert "dog/inner/deep/new.webp" in found
    assert "dog/inner/deep/é.webp" not in found
    assert len(found) == 15


def test_class_folders_come_and_go(folder, walked):
    assert paths_of(folder, {"cat": 7, "owl": 4}) == expected("cat", "owl")
    assert paths_of(folder) == expected("cat", "dog", "owl")
    assert paths_of(folder, {"dog": 1}) == expected("dog")
    assert walked == {"cat": 1, "dog": 1, "owl": 1}


def test_folder_that_has_just_changed_is_read_again(folder, walked, monkeypatch):
    monkeypatch.setattr(listing, "SETTLED_NS", 3_600_000_000_000)
    for _ in range(2):
        paths_of(folder)
    assert walked == {"cat": 2, "dog": 2, "owl": 2}


def halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def change_a_letter(path):
    path.write_bytes(path.read_bytes().replace(b"dog/b.png", b"dog/x.png"))


@pytest.mark.parametrize("damage", [halve, change_a_letter, lambda path: path.write_bytes(b"")], ids=["half", "1", "0"])
def test_damaged_list_is_made_anew(folder, walked, damage):
    paths_of(folder)
    damage(*kept(folder))
    assert paths_of(folder) == expected("cat", "dog", "owl")
    assert walked == {"cat": 2, "dog": 2, "owl": 2}
    assert paths_of(folder) == expected("cat", "dog", "owl")
    assert walked == {"cat": 2, "dog": 2, "owl": 2}


def test_cache_that_cannot_be_written_is_told_once(folder, monkeypatch, capsys):
    (folder.parent / "file").touch()
    monkeypatch.setenv("DEBIFORMER_HOME", str(folder.parent / "file" / "cache"))
    for _ in range(2):
        assert paths_of(folder) == expected("cat", "dog", "owl")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"note: the list of images cannot be kept in {folder.parent}/file/cache (Not a directory)")


def test_list_that_somebody_else_keeps_is_read(folder, walked, monkeypatch):
    paths_of(folder)

    def refuse(path, times=None):
        raise PermissionError

    monkeypatch.setattr(os, "utime", refuse)
    assert paths_of(folder) == expected("cat", "dog", "owl")
    assert walked == {"cat": 1, "dog": 1, "owl": 1}


def test_short_lists_are_not_kept(folder, monkeypatch):
    monkeypatch.setattr(listing, "KEPT_FROM", 16)
    paths_of(folder)
    assert not (folder.parent / "cache").exists()


def test_list_that_another_run_may_read_outlives_a_new_one_for_a_month(folder):
    paths_of(folder)
    (first,) = kept(folder)
    (folder / "cat" / "d.png").touch()
    paths_of(folder)
    assert len(kept(folder)) == 2
    os.utime(first, (0, 0))
    (folder / "cat" / "e.png").touch()
    paths_of(folder)
    assert len(kept(folder)) == 2
    assert first not in kept(folder)


def test_pickled_list_is_the_name_of_its_file(folder):
    paths, _ = list_images(folder, NUMBERS)
    content = pickle.dumps(paths)
    assert b"b.png" not in content
    there = pickle.loads(content)
    assert there.found
    assert list(there) == list(paths)
    kept(folder)[0].unlink()
    assert not pickle.loads(content).found


SCRIPT = """
import sys
from datetime import timedelta
from pathlib import Path
import torch
from runtime.distributed import DistInfo, process_group
from tasks.classification import listing
from tasks.classification.holdout import hold_out
from tasks.classification.sources import ImageFiles

rank, url, folder, sees = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), sys.argv[4] == "sees"
listing.KEPT_FROM, processes = 1, DistInfo(rank, 2)
if not sees and rank == 1:
    listing._read = lambda root, path: None

def choose():
    paths, targets = listing.list_images(folder, {"cat": 0, "dog": 1})
    images = ImageFiles(paths, targets, ["cat", "dog"])
    return hold_out(images, list(paths), 0.2, [], "here")

with process_group(processes, torch.device("cpu"), url, timedelta(minutes=5)):
    train, test = listing.decide_listed(choose, processes)
    print(train.source.paths.file is not None, *(part[index] for part in (train, test) for index in range(len(part))))
"""


@pytest.mark.parametrize("sees", ["sees", "not"])
def test_processes_read_one_list_and_are_sent_it_where_they_do_not_see_the_cache(folder, tmp_path, sees):
    argv = [sys.executable, "-c", SCRIPT]
    ranks = [
        subprocess.Popen([*argv, str(rank), f"file://{tmp_path}/meet", folder, sees], cwd=ROOT, stdout=subprocess.PIPE)
        for rank in range(2)
    ]
    first, second = (rank.communicate()[0].decode() for rank in ranks)
    assert first == second
    assert first.startswith(str(sees == "sees"))
    assert first.count("png") + first.count("JPEG") + first.count("jpg") + first.count("webp") == 10
