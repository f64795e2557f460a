"""How checkpoints are written, and which of a run's is read."""

import os
import resource
import signal

import pytest
import torch
from support import complaint

from models.weights import load_checkpoint
from runtime.checkpoint import LAST, PREVIOUS, load_latest, save_checkpoint


def test_a_file_is_replaced_at_once_and_its_predecessor_kept(tmp_path):
    for number in range(3):
        save_checkpoint({"number": number}, tmp_path / LAST, tmp_path / PREVIOUS)
    assert load_checkpoint(tmp_path / LAST) == {"number": 2}
    assert load_checkpoint(tmp_path / PREVIOUS) == {"number": 1}
    assert sorted(os.listdir(tmp_path)) == [PREVIOUS, LAST]


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, damage, capsys):
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


def test_killed_between_the_two_renames(tmp_path):
    save_checkpoint({"number": 7}, tmp_path / PREVIOUS)
    checkpoint, _ = load_latest(tmp_path)
    assert checkpoint["number"] == 7


def test_an_empty_folder_has_no_checkpoint(tmp_path):
    assert load_latest(tmp_path) is None


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path):
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
