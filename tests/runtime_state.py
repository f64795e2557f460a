"""A training's state without a training: what tests of checkpoints need."""

import timm
import torch

import models  # noqa: F401 (registers with timm)
from engine import Precision
from optim_factory import build_optimizer
from runtime.checkpoint import TrainingState
from runtime.distributed import DistInfo
from runtime.meters import LossMeter
from runtime.run_log import RunLog
from tasks.options import Options

CPU = torch.device("cpu")
RECORD = {"epoch": 0, "train_loss": 1.0, "train_lr": 0.1, "test_acc1": 50.0, "n_parameters": 3, "seconds": 1.5}


def state_of(opt: str = "adamw", **changes) -> TrainingState:
    """The state of a run on a small debiformer_nano, 48 images in batches of 8, before its first update."""
    torch.manual_seed(0)
    options = Options(opt=opt, weight_decay=0.05, lr=1e-2, **changes)
    model = timm.create_model("debiformer_nano", num_classes=4, embed_dims=(8, 16, 24, 32), depths=(1, 1, 1, 1))
    return TrainingState(
        model,
        build_optimizer(model, options, total_batch=8),
        Precision(CPU).scaler,
        meter=LossMeter(CPU, DistInfo()),
        history=RunLog(None, None),
        args={"model": "debiformer_nano", "opt": opt},
        classes=["cat", "dog", "owl", "pig"],
        data={"images per epoch": 48, "total batch": 8, "images": 50, "seed": 0},
    )


def train(state: TrainingState, first: int, last: int) -> None:
    """Updates `first` to `last` - 1, with gradients that depend on the update alone."""
    for update in range(first, last):
        torch.manual_seed(update)
        for parameter in state.model.parameters():
            parameter.grad = 0.01 * torch.randn_like(parameter)
        state.optimizer.step()
