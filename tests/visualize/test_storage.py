"""The demo page's folder: private, swept, and gone with the page."""

import os
import stat
import tempfile
import time

import pytest

from visualize.storage import LOCK, Storage


@pytest.fixture(autouse=True)
def _own_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def write(path, age=0.0, size=10):
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(bytes(size))
    then = time.time() - age
    os.utime(path, (then, then))
    os.utime(path.parent, (then, then))
    return path


def test_storage_is_private_and_goes_when_it_is_left(tmp_path):
    with Storage() as storage:
        assert stat.S_IMODE(storage.folder.stat().st_mode) == 0o700
        storage.write_report("one", "text")
    assert list(tmp_path.iterdir()) == []


def test_storage_removes_what_killed_pages_left_and_nothing_else(tmp_path):
    write(tmp_path / "visualize-killed" / LOCK)
    write(tmp_path / "visualize-killed" / "report.html")
    other = write(tmp_path / "visualize-of-somebody" / "report.html")
    with Storage() as running, Storage() as storage:
        assert set(tmp_path.iterdir()) == {running.folder, storage.folder, other.parent}


def test_sweep_removes_old_files_and_their_folders():
    with Storage() as storage:
        old, young = write(storage.folder / "old" / "a", age=100), write(storage.folder / "young" / "b")
        storage.sweep(lifetime=50)
        assert (old.parent.exists(), young.exists()) == (False, True)
        os.utime(storage.folder / LOCK, (0, 0))
        storage.sweep(lifetime=50)
        assert (storage.folder / LOCK).exists()


def test_sweep_keeps_the_newest_within_the_bound():
    with Storage() as storage:
        files = [write(storage.folder / str(number) / "a", age=100 - number, size=1000) for number in range(5)]
        storage.sweep(most_bytes=2500)
        assert [path.exists() for path in files] == [False, False, False, True, True]


def test_visitor_has_one_report_and_each_has_a_path_of_its_own():
    with Storage() as storage:
        first, other = storage.write_report("one", "first"), storage.write_report("two", "other")
        second = storage.write_report("one", "second")
        assert first != second
        assert not first.exists()
        assert (second.read_text(), other.read_text()) == ("second", "other")
        storage.forget("one")
        assert list(storage.folder.rglob("*.html")) == [other]


def test_discard_removes_only_files_of_the_folder(tmp_path):
    with Storage() as storage:
        own, other = write(storage.folder / "hash" / "a.png"), write(tmp_path / "a.png")
        storage.discard(own)
        storage.discard(other)
        storage.discard(storage.folder / "hash" / ".." / ".." / "a.png")
        assert (own.exists(), other.exists()) == (False, True)
