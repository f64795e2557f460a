"""Who may write in a run's folder, and which states stay there."""

import contextlib
import os
import signal
import socket
import subprocess
import sys

import pytest
from support import ROOT, complaint

from models.weights import load_checkpoint
from runtime import lock
from runtime.checkpoint import LAST, PREVIOUS, load_latest
from runtime.run_folder import RunFolder

HOLD = """
import os, sys, time
from pathlib import Path
from runtime.lock import lock
lock(Path(sys.argv[1]))
if len(sys.argv) > 2 and os.fork() == 0:  # like a worker that loads data
    print("worker", flush=True)
    time.sleep(600)
print("held", flush=True)
time.sleep(600)
"""


def state(epoch, position=0, evaluated=True):
    return {"epoch": epoch, "position": position, "evaluated": evaluated}


@pytest.fixture
def holder(tmp_path):
    """Starts a process that holds the lock of tmp_path/run; killed at the end with all of its own."""
    (tmp_path / "run").mkdir()
    processes = []

    def start(*argv):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, tmp_path / "run", *argv],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        processes.append(process)
        for _ in range(1 + len(argv)):
            assert process.stdout.readline()
        return process

    yield start
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()


def test_run_folder_refuses_a_second_run_while_the_first_lives(holder, tmp_path):
    process = holder()
    message = complaint(RunFolder(tmp_path / "run").open)
    assert message.startswith(f"a run is going on in {tmp_path / 'run'} (process {process.pid} on ")
    assert "choose another --output_dir" in message


def test_run_folder_is_free_once_its_run_is_killed(holder, tmp_path):
    process = holder("with a worker")
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    folder = RunFolder(tmp_path / "run")
    folder.open()  # though the worker lives
    folder.close()
    assert os.listdir(tmp_path / "run") == []


def test_lock_waits_for_another_machine_that_may_be_dead(holder, tmp_path, monkeypatch, capsys):
    process = holder()
    monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")
    monkeypatch.setattr(lock, "SECONDS_TO_NOTICE_DEATH", 0.5)
    assert "wait for its end" in complaint(lock.lock, tmp_path / "run")
    assert "waiting whether it is alive" in capsys.readouterr().err
    monkeypatch.setattr(lock, "SECONDS_TO_NOTICE_DEATH", 600)
    monkeypatch.setattr(lock.time, "sleep", lambda seconds: (process.kill(), process.wait()))
    lock.unlock(tmp_path / "run", lock.lock(tmp_path / "run"))


def test_run_folder_is_made_only_when_there_is_something_to_write(tmp_path):
    folder = RunFolder(tmp_path / "outputs" / "run")
    folder.open()
    assert folder.newest() is None
    assert not (tmp_path / "outputs").exists()
    folder.make()
    assert (tmp_path / "outputs" / "run").is_dir()
    folder.close()


def test_run_folder_refuses_to_begin_where_another_has_begun_meanwhile(tmp_path):
    first, second = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "run")
    second.open()
    first.make()
    assert "a run is going on" in complaint(second.make)
    first.save(state(1))
    first.close()
    assert load_latest(tmp_path / "run") is not None


def test_run_folder_removes_what_a_killed_writer_left(tmp_path):
    (tmp_path / f".{LAST}.123.tmp").write_bytes(b"half")
    (tmp_path / ".mine.tmp").write_bytes(b"not a checkpoint")
    folder = RunFolder(tmp_path)
    folder.open()
    assert sorted(os.listdir(tmp_path)) == [".lock", ".mine.tmp"]
    folder.close()


def refused(*_):
    """What a file system without hard links says."""
    raise PermissionError


def places(folder):
    return [tuple(load_checkpoint(folder / name).values())[:2] for name in (LAST, PREVIOUS) if (folder / name).exists()]


def test_save_keeps_the_end_of_the_epoch_before_as_previous(tmp_path):
    folder = RunFolder(tmp_path)
    folder.save(state(1, evaluated=False))
    folder.save(state(1))
    assert places(tmp_path) == [(1, 0)]
    folder.save(state(2, evaluated=False))
    assert places(tmp_path) == [(2, 0), (1, 0)]
    folder.save(state(2))
    assert places(tmp_path) == [(2, 0), (1, 0)]
    for position in (8, 16, 24):
        folder.save(state(2, position))
        assert places(tmp_path) == [(2, position), (2, 0)]
    folder.save(state(3, evaluated=False))
    assert places(tmp_path) == [(3, 0), (2, 0)]


@pytest.mark.parametrize("links", [True, False], ids=["links", "no-links"])
def test_newest_state_is_under_its_name_at_every_moment(tmp_path, links, monkeypatch):
    """On a file system without hard links there is a moment without; the one before is there then."""
    replace, missing = os.replace, []

    def observed(source, target):
        replace(source, target)
        missing.append(not (tmp_path / LAST).exists())
        assert load_latest(tmp_path) is not None

    monkeypatch.setattr(os, "replace", observed)
    if not links:
        monkeypatch.setattr(os, "link", refused)
    folder = RunFolder(tmp_path)
    for epoch in (1, 2, 3):
        folder.save(state(epoch))
    assert any(missing) is not links
    assert places(tmp_path) == [(3, 0), (2, 0)]
    assert not list(tmp_path.glob(".*.tmp"))


def test_save_never_replaces_the_state_that_a_damaged_one_fell_back_to(tmp_path):
    folder = RunFolder(tmp_path)
    for epoch in (1, 2):
        folder.save(state(epoch))
    (tmp_path / LAST).write_bytes(b"damaged")
    again = RunFolder(tmp_path)
    content, path = again.newest()
    assert path.name == PREVIOUS
    again.set_position(path, content["epoch"], content["position"])
    again.save(state(1, 8))
    assert places(tmp_path) == [(1, 8), (1, 0)]


def test_save_keeps_what_another_run_left_as_previous(tmp_path):
    RunFolder(tmp_path).save(state(7))
    RunFolder(tmp_path).save(state(0, 8))
    assert places(tmp_path) == [(0, 8), (7, 0)]


@pytest.mark.parametrize("links", [True, False], ids=["links", "no-links"])
@pytest.mark.parametrize(("keep", "expected"), [(0, [2, 4, 6, 8]), (2, [6, 8]), (1, [8])])
def test_save_every_keeps_the_newest_states(tmp_path, keep, expected, links, monkeypatch):
    if not links:
        monkeypatch.setattr(os, "link", refused)
    folder = RunFolder(tmp_path, save_every=2, keep=keep)
    for epoch in range(1, 10):
        folder.save(state(epoch, evaluated=False))
        folder.save(state(epoch))
        folder.save(state(epoch, 8))
    kept = [f"checkpoint.{epoch:04d}.pth" for epoch in expected]
    assert sorted(os.listdir(tmp_path)) == sorted([LAST, PREVIOUS, *kept])
    assert [load_checkpoint(tmp_path / name)["epoch"] for name in kept] == expected


def test_newest_falls_back_to_the_kept_states_newest_first(tmp_path, capsys):
    folder = RunFolder(tmp_path, save_every=1)
    for epoch in range(1, 12):
        folder.save(state(epoch))
    for name in (LAST, PREVIOUS, "checkpoint.0011.pth"):
        (tmp_path / name).unlink()  # it may be the same file as another
        (tmp_path / name).write_bytes(b"damaged")
    content, path = load_latest(tmp_path)
    assert (content["epoch"], path.name) == (10, "checkpoint.0010.pth")
    assert len(capsys.readouterr().err.splitlines()) == 3


def test_save_says_that_its_folder_was_removed(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.make()
    folder.save(state(1))
    for path in (tmp_path / "run").iterdir():
        path.unlink()
    (tmp_path / "run").rmdir()
    message = complaint(folder.save, state(2))
    assert "have been removed" in message
    assert "intact" not in message
    folder.close()
