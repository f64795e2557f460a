"""What a checkpoint holds, and what happens to files that are none."""

import argparse
import os
import pickle
import resource
import signal
from pathlib import Path

import pytest
import timm
import torch

import models  # noqa: F401
from checkpoint import (
    LAST,
    PREVIOUS,
    load_checkpoint,
    load_latest,
    load_to_finetune,
    load_weights,
    save_checkpoint,
    weights_of,
)
from errors import UsageError


def nano(**kwargs):
    return timm.create_model("debiformer_nano", **{"num_classes": 4, **kwargs})


def complaint(function, *args):
    with pytest.raises(UsageError) as error:
        function(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_file_is_replaced_at_once_and_its_predecessor_kept(tmp_path):
    for number in range(3):
        save_checkpoint({"number": number}, tmp_path / LAST)
    assert load_checkpoint(tmp_path / LAST) == {"number": 2}
    assert load_checkpoint(tmp_path / PREVIOUS) == {"number": 1}
    assert sorted(os.listdir(tmp_path)) == [PREVIOUS, LAST]


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, damage):
    for number in range(2):
        save_checkpoint({"number": number, "weights": torch.arange(1000.0)}, tmp_path / LAST)
    content = bytearray((tmp_path / LAST).read_bytes())
    if damage == "truncate":
        content = content[: len(content) // 2]
    elif damage == "flip":
        content[len(content) // 2] ^= 0xFF
    else:
        content = b""
    (tmp_path / LAST).write_bytes(content)
    with pytest.warns(UserWarning, match="falling back"):
        checkpoint, path = load_latest(tmp_path)
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


def test_published_kinds_of_file_are_read(tmp_path):
    weights = nano().state_dict()
    arguments = argparse.Namespace(model="debiformer_nano", output_dir=Path("x"))
    kinds = {
        "deit": {"model": weights, "optimizer": {}, "epoch": 3, "args": arguments},
        "ddp": {"state_dict": {f"module.{name}": value for name, value in weights.items()}},
        "bare": dict(weights),
    }
    for name, content in kinds.items():
        torch.save(content, tmp_path / name)
        model = nano()
        load_weights(model, weights_of(load_checkpoint(tmp_path / name), name), name)
        assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


class Exploit:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


@pytest.mark.parametrize("save", [torch.save, lambda obj, path: path.write_bytes(pickle.dumps(obj))])
def test_code_is_refused_and_not_run(tmp_path, save):
    save({"model": Exploit(tmp_path / "ran")}, tmp_path / "evil.pth")
    message = complaint(load_checkpoint, tmp_path / "evil.pth")
    assert str(tmp_path / "evil.pth") in message
    assert not (tmp_path / "ran").exists()


def test_the_refused_class_is_named(tmp_path):
    torch.save({"model": Exploit(tmp_path / "ran")}, tmp_path / "evil.pth")
    assert "posix.system" in complaint(load_checkpoint, tmp_path / "evil.pth")


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04" + b"\0" * 50, bytes(range(256)) * 8], ids=range(4))
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "x.pth").write_bytes(content)
    assert "x.pth is not a checkpoint" in complaint(load_checkpoint, tmp_path / "x.pth")


def test_other_content_is_refused(tmp_path):
    torch.save([1, 2], tmp_path / "list.pth")
    assert "holds a list" in complaint(load_checkpoint, tmp_path / "list.pth")
    torch.save({"epoch": 3}, tmp_path / "epoch.pth")
    content = load_checkpoint(tmp_path / "epoch.pth")
    assert "holds no weights" in complaint(weights_of, content, "epoch.pth")
    assert "does not exist" in complaint(load_checkpoint, tmp_path / "nowhere.pth")
    assert "does not exist" in complaint(load_checkpoint, tmp_path)


def test_another_models_weights_are_refused_and_change_nothing():
    model = nano()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    other = timm.create_model("biformer_tiny").state_dict()
    message = complaint(load_weights, model, other, "other.pth")
    assert "other.pth is of another model: it lacks" in message
    assert len(message) < 500
    assert "head.bias [1000] where the model has [4]" in complaint(
        load_weights, model, nano(num_classes=1000).state_dict(), "x"
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_finetuning_adapts_classes_and_input_size():
    source = nano()
    target = nano(num_classes=7, img_size=128)
    fresh = load_to_finetune(target, source.state_dict(), "x")
    assert fresh == ["head.weight", "head.bias"]
    table = target.stages[0][0].attn2.rpe_table
    original = source.stages[0][0].attn2.rpe_table
    assert table.shape == (1, 63, 63)
    assert original.shape == (1, 31, 31)
    torch.testing.assert_close(table[:, 0, 0], original[:, 0, 0])
    torch.testing.assert_close(table[:, 31, 31], original[:, 15, 15])
    same = target.stages[1][0].mlp1.linear1[0].weight
    assert torch.equal(same, source.stages[1][0].mlp1.linear1[0].weight)


def test_finetuning_from_another_model_is_refused():
    assert "another model" in complaint(load_to_finetune, nano(), timm.create_model("biformer_tiny").state_dict(), "x")
