"""What tests of all folders share."""

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

if not torch.cuda.is_available():  # read when Triton is first imported, which timm and torchvision do
    os.environ["TRITON_INTERPRET"] = "1"

import engine
import main
from models.weights import WeightsError, load_checkpoint
from runtime.checkpoint import LAST
from runtime.distributed import DistInfo
from runtime.errors import Stopped, UsageError
from tasks import find_task, loading

ROOT = Path(__file__).parent.parent
CLASSES = ("cat", "dog", "owl", "pig")
SMALL_RUN = [
    *("--model", "debiformer_nano", "--input_size", "32", "--batch_size", "8", "--epochs", "2"),
    *("--model_kwargs", "embed_dims=16,32,48,64", "depths=1,1,1,1"),
    *("--num_workers", "0", "--device", "cpu", "--warmup_epochs", "0", "--lr", "1e-2", "--model_ema_decay", "0.9"),
    *("--print_freq", "2", "--no_repeated_aug"),
]
"""A run of 6 updates an epoch on `image_folder`."""


def command(*argv: object, timeout: float = 300, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    """Run a command of the project with this Python, as a user would, and capture what it prints."""
    return subprocess.run(
        [sys.executable, *map(str, argv)],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def has_trained(folder: Path) -> bool:
    """Whether the newest checkpoint of a run stands after its first update."""
    content = load_checkpoint(folder / LAST)
    return (content["epoch"], content["position"]) > (0, 0)


def stop_after(monkeypatch: pytest.MonkeyPatch, updates: int) -> None:
    """Have SIGTERM come in the middle of the update with this number."""
    step, calls = engine.TrainStep.step, []

    def counting(self, *args):
        calls.append(None)
        if len(calls) == updates:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *args)

    monkeypatch.setattr(engine.TrainStep, "step", counting)


def run_until_stopped(options: Any, updates: int, monkeypatch: pytest.MonkeyPatch) -> Stopped:
    """Train until SIGTERM comes in the middle of the update with this number; how the run ended."""
    with monkeypatch.context() as patch:
        stop_after(patch, updates)
        with pytest.raises(Stopped) as end:
            main.run(options)
    return end.value


def complaint(function: Callable, *args: object) -> str:
    """The one line with which a function refuses what it was given."""
    with pytest.raises((UsageError, WeightsError)) as error:
        function(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


def scrambled(model: nn.Module, seed: int) -> nn.Module:
    """The model with noise on every parameter and running statistic, so that none is alike another's by chance."""
    generator = torch.Generator().manual_seed(seed)
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.add_(0.2 * torch.rand(value.shape, generator=generator) - 0.1)
    return model.eval()


def save_as_authors(path: Path, model: nn.Module, ema: nn.Module | None = None, zipped: bool = True) -> Path:
    """A checkpoint as the authors' training script leaves it.

    Weights under a DistributedDataParallel's names, optimizer, options as a Namespace with paths in it; `zipped=False`
    for torch's format before 1.6.
    """
    content = {
        "model": {f"module.{name}": value for name, value in model.state_dict().items()},
        "optimizer": torch.optim.AdamW(model.parameters()).state_dict(),
        "lr_scheduler": {"t_initial": 300, "base_values": [5e-4, 5e-4]},
        "epoch": 299,
        "model_ema": None if ema is None else {f"module.{name}": value for name, value in ema.state_dict().items()},
        "scaler": torch.amp.GradScaler("cpu").state_dict(),
        "args": argparse.Namespace(output_dir=Path("outputs") / "cls", lr=5e-4, distributed=True, opt_betas=None),
        "max_accuracy": 81.9,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


def write_images(folder: Path, count: int, shade: int, seed: int) -> None:
    """PNG files 0.png, 1.png, ... of noise about a shade of grey, 44 x 40 pixels."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    for number in range(count):
        noise = generator.integers(0, 60, (40, 44, 3)) + shade
        Image.fromarray(noise.astype(np.uint8)).save(folder / f"{number}.png")


def build_data(options, info: DistInfo | None = None, device: object = "cpu", trained: tuple | list = ()) -> Any:
    """The loaders of a run with these options, and what its task knows: `task`, `classes`, `num_classes`."""
    task = find_task(options.task)(options, info or DistInfo(), device)
    data = loading.build_data(task, options, trained)
    data.task, data.classes, data.num_classes = task, list(task.classes), task.num_classes
    return data
