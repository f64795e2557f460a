"""Every optimizer of timm that can train goes on from a checkpoint to the same bits."""

import pytest
import torch
from runtime_state import state_of, train
from timm.optim import list_optimizers

from models.weights import load_checkpoint
from runtime.checkpoint import build_checkpoint, save_checkpoint
from runtime.errors import UsageError

STOP, END = 5, 14  # Lookahead looks back every 6 updates
# Kron draws from a generator of its own, which is not part of its state dict, and compiles itself for minutes.
NAMES = [name for name in list_optimizers() if not name.startswith("kron")]
NAMES += ["lookahead_adamw", "lookahead_lamb", "lookahead_sgd"]


@pytest.mark.parametrize("name", NAMES)
def test_restore_continues_any_optimizer_bit_for_bit(name, tmp_path):
    try:
        whole = state_of(name)
        train(whole, 0, STOP)
    except (UsageError, ImportError, RuntimeError, TypeError) as error:
        pytest.skip(f"cannot train here: {error}")
    whole.epoch = 1
    save_checkpoint(build_checkpoint(whole), tmp_path / "checkpoint.pth")
    train(whole, STOP, END)
    resumed = state_of(name)
    resumed.restore(load_checkpoint(tmp_path / "checkpoint.pth"), tmp_path)
    train(resumed, STOP, END)
    for one, two in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("name", ["adamw", "lamb", "adan", "lookahead_sgd"])
def test_restore_takes_rates_and_decays_of_this_run(name, tmp_path):
    saved = state_of(name)
    train(saved, 0, 2)
    saved.epoch = 1
    changed = state_of(name)
    for group in changed.optimizer.param_groups:
        group["lr"], group["weight_decay"] = 0.123, 0.456
    changed.restore(build_checkpoint(saved), tmp_path)
    for group in changed.optimizer.param_groups:
        assert (group["lr"], group["weight_decay"]) == (0.123, 0.456)


def test_restore_takes_the_betas_of_this_run(tmp_path):
    saved, changed = state_of(), state_of(opt_betas=[0.8, 0.9])
    train(saved, 0, 1)
    saved.epoch = 1
    changed.restore(build_checkpoint(saved), tmp_path)
    assert all(tuple(group["betas"]) == (0.8, 0.9) for group in changed.optimizer.param_groups)
