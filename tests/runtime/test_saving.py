"""Checkpoints that are written while training goes on."""

import copy
import os
import threading
import time
from pathlib import Path

import pytest
import torch
from runtime_state import state_of, train

from models.weights import load_checkpoint
from runtime import checkpoint
from runtime.checkpoint import BEST, LAST, build_checkpoint, save_checkpoint
from runtime.errors import UsageError
from runtime.run_folder import RunFolder
from runtime.saving import Saver

CPU = torch.device("cpu")


@pytest.fixture
def gate(monkeypatch):
    """Writing waits, after the first bytes, until this is set."""
    gate, save = threading.Event(), torch.save

    def wait_and_save(content, file):
        file.write(b"first bytes")
        file.flush()
        assert gate.wait(300)
        file.seek(0)
        save(content, file)

    monkeypatch.setattr(torch, "save", wait_and_save)
    yield gate
    gate.set()


@pytest.fixture
def writes(monkeypatch):
    """The names of the files that are serialised, in their order."""
    names = []

    def noting(content, path, *args):
        names.append(path.name)
        save_checkpoint(content, path, *args)

    monkeypatch.setattr("runtime.run_folder.save_checkpoint", noting)
    return names


def place(state, epoch, position=0, evaluated=True):
    state.epoch, state.position, state.evaluated = epoch, position, evaluated
    return state


def assert_same(one, two):
    assert type(one) is type(two)
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, two)
        assert one.stride() == two.stride()
    elif isinstance(one, dict):
        assert list(one) == list(two)
        for key in one:
            assert_same(one[key], two[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(two)
        for each, other in zip(one, two, strict=True):
            assert_same(each, other)
    else:
        assert one == two


def test_what_is_written_is_the_state_at_the_save_though_training_goes_on(tmp_path, gate):
    state = state_of()
    train(state, 0, 2)
    place(state, 1, 16)
    saver = Saver(RunFolder(tmp_path), CPU)
    expected = copy.deepcopy(build_checkpoint(state))
    saver.save(state)
    saver.wait_for_copy()
    train(state, 2, 4)  # while the file is being written
    assert not (tmp_path / LAST).exists()
    gate.set()
    saver.wait()
    assert_same(load_checkpoint(tmp_path / LAST), expected)
    assert not torch.equal(next(iter(expected["model"].values())), next(state.model.parameters()))


def test_buffers_are_copied_at_once(tmp_path, monkeypatch):
    """Those of BatchNorm change in a forward pass, which waits for nothing."""
    state, copying = place(state_of(), 1, 8), threading.Event()
    state.model.register_buffer("seen", torch.zeros(1))
    copy_all = torch._foreach_copy_
    monkeypatch.setattr(torch, "_foreach_copy_", lambda *lists, **how: (copying.wait(300), copy_all(*lists, **how)))
    with Saver(RunFolder(tmp_path), CPU) as saver:
        saver.save(state)
        state.model.seen += 1
        copying.set()
    assert load_checkpoint(tmp_path / LAST)["model"]["seen"] == 0


def test_evaluated_state_is_copied_once_and_the_same_one_written_once(tmp_path, writes, monkeypatch):
    copied, copy_all = [], torch._foreach_copy_
    monkeypatch.setattr(torch, "_foreach_copy_", lambda *lists: (copied.append(len(lists[0])), copy_all(*lists)))
    state = state_of()
    train(state, 0, 2)
    with Saver(RunFolder(tmp_path, save_every=1), CPU) as saver:
        saver.save(place(state, 1, evaluated=False))
        saver.save(place(state, 1, evaluated=False))
        state.best = {"acc1": 50.0, "epoch": 0, "weights": "model"}
        saver.save(place(state, 1), best="model")
        saver.save(place(state, 1))
        train(state, 2, 3)
        saver.save(place(state, 1, 8))
    assert writes == [LAST, BEST, LAST, LAST]
    assert len(copied) == 2
    assert load_checkpoint(tmp_path / "checkpoint.0001.pth")["best"] == state.best
    best = load_checkpoint(tmp_path / BEST)
    assert best.keys() == {"model", "args", "classes", "held_out", "best"}
    assert_same(best["model"], dict(load_checkpoint(tmp_path / "checkpoint.0001.pth")["model"]))


def test_tensors_that_share_memory_are_written_once(tmp_path):
    state = place(state_of(), 1, 8)
    large = torch.zeros(300_000)
    state.model.register_parameter("one", torch.nn.Parameter(large, requires_grad=False))
    with Saver(RunFolder(tmp_path), CPU) as saver:
        saver.save(state)
    alone = (tmp_path / LAST).stat().st_size
    state.model.register_parameter("two", state.model.one)
    state.position = 16
    with saver:
        saver.save(state)
    assert "two" in load_checkpoint(tmp_path / LAST)["model"]
    assert (tmp_path / LAST).stat().st_size < alone + large.nbytes / 2


def test_next_save_waits_for_the_one_before(tmp_path, gate, writes):
    state, saver = state_of(), Saver(RunFolder(tmp_path), CPU)
    saver.save(place(state, 1, 8))
    threading.Timer(0.5, gate.set).start()
    saver.save(place(state, 1, 16))
    assert gate.is_set()
    assert load_checkpoint(tmp_path / LAST)["position"] in (8, 16)
    saver.wait()
    assert load_checkpoint(tmp_path / LAST)["position"] == 16


def test_leaving_waits_for_the_disk_also_because_of_a_mistake(tmp_path, gate):
    state = place(state_of(), 1, 8)
    saver = Saver(RunFolder(tmp_path), CPU)
    saver.save(state)
    threading.Timer(0.5, gate.set).start()
    with pytest.raises(ZeroDivisionError), saver:
        raise ZeroDivisionError
    assert load_checkpoint(tmp_path / LAST)["position"] == 8


@pytest.mark.parametrize("method", ["check", "wait", "save"])
def test_what_fails_while_writing_is_raised_in_the_training_thread(tmp_path, method):
    state = place(state_of(), 1, 8)
    saver = Saver(RunFolder(tmp_path / "missing"), CPU)
    saver.save(state)
    saver._writing.join()
    arguments = [place(state, 1, 16)] if method == "save" else []
    with pytest.raises(UsageError, match="have been removed while the run wrote there"), saver:
        getattr(saver, method)(*arguments)


def test_second_ctrl_c_gives_up_what_is_being_written(tmp_path, monkeypatch):
    began = threading.Event()

    def write_for_ever(content, file):
        began.set()
        while True:
            time.sleep(0.01)

    monkeypatch.setattr(torch, "save", write_for_ever)
    saver = Saver(RunFolder(tmp_path), CPU)
    saver.save(place(state_of(), 1, 8))
    assert began.wait(300)
    with pytest.raises(KeyboardInterrupt), saver:
        raise KeyboardInterrupt
    assert not saver._writing.is_alive()
    assert not (tmp_path / LAST).exists()


def test_processes_forked_meanwhile_do_not_keep_the_file(tmp_path, gate):
    saver = Saver(RunFolder(tmp_path), CPU)
    saver.save(place(state_of(), 1, 8))
    while not checkpoint._being_written:
        time.sleep(0.01)
    child = os.fork()
    if child == 0:
        try:
            held = [os.readlink(each) for each in Path("/proc/self/fd").iterdir() if each.is_symlink()]
            os._exit(any(str(tmp_path) in each for each in held))
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    gate.set()
    saver.wait()
    assert load_checkpoint(tmp_path / LAST)["position"] == 8
