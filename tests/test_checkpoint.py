"""How checkpoints are written, and which of a run's is read."""

import os
import resource
import signal

import pytest
import torch
from support import complaint

from models.weights import load_checkpoint
from runtime.checkpoint import LAST, PREVIOUS, load_latest, save_checkpoint
from runtime.distributed import DistInfo
from runtime.resume import find_checkpoint
from runtime.run_folder import RunFolder


def test_save_checkpoint_replaces_a_file_at_once_and_keeps_its_predecessor(tmp_path):
    for number in range(3):
        save_checkpoint({"number": number}, tmp_path / LAST, tmp_path / PREVIOUS)
    assert load_checkpoint(tmp_path / LAST) == {"number": 2}
    assert load_checkpoint(tmp_path / PREVIOUS) == {"number": 1}
    assert sorted(os.listdir(tmp_path)) == [PREVIOUS, LAST]


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty"])
def test_load_latest_falls_back_from_a_damaged_checkpoint(tmp_path, damage, capsys):
    for number in range(2):
        save_checkpoint({"number": number, "weights": torch.arange(1000.0)}, tmp_path / LAST, tmp_path / PREVIOUS)
    content = bytearray((tmp_path / LAST).read_bytes())
    if damage == "truncate":
        content = content[: len(content) // 2]
    elif damage == "flip":
        content[len(content) // 2] ^= 0xFF
    else:
        content = b""
    (tmp_path / LAST).write_bytes(content)
    checkpoint, path = load_latest(tmp_path)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: ")
    assert line.endswith(f"falling back to {PREVIOUS}")
    assert (checkpoint["number"], path.name) == (0, PREVIOUS)


def test_load_latest_after_a_kill_between_the_two_renames(tmp_path):
    save_checkpoint({"number": 7}, tmp_path / PREVIOUS)
    checkpoint, _ = load_latest(tmp_path)
    assert checkpoint["number"] == 7


def test_load_latest_finds_none_in_an_empty_folder(tmp_path):
    assert load_latest(tmp_path) is None


def test_save_checkpoint_leaves_the_old_one_on_a_full_disk(tmp_path):
    save_checkpoint({"number": 1}, tmp_path / LAST)
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        message = complaint(save_checkpoint, {"number": 2, "weights": torch.zeros(100_000)}, tmp_path / LAST)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert "earlier checkpoints are intact" in message
    assert load_checkpoint(tmp_path / LAST) == {"number": 1}
    assert os.listdir(tmp_path) == [LAST]


@pytest.mark.usefixtures("offline")
def test_find_checkpoint_says_where_other_processes_read_an_address_too(tmp_path, server):
    save_checkpoint({"number": 7}, tmp_path / "x.pth")
    server.files["/x.pth"] = (tmp_path / "x.pth").read_bytes()
    content, place = find_checkpoint(RunFolder(tmp_path / "run"), f"{server.url}/x.pth", True, DistInfo())
    assert content == load_checkpoint(place) == {"number": 7}
    assert str(place) == f"{server.url}/x.pth"
