"""What tests of all folders share."""

import os
import subprocess
import sys
from pathlib import Path

import torch

if not torch.cuda.is_available():  # read when Triton is first imported, which timm and torchvision do
    os.environ["TRITON_INTERPRET"] = "1"

ROOT = Path(__file__).parent.parent
CLASSES = ("cat", "dog", "owl", "pig")
SMALL_RUN = [
    *("--model", "debiformer_nano", "--input_size", "32", "--batch_size", "8", "--epochs", "2"),
    *("--model_kwargs", "embed_dims=16,32,48,64", "depths=1,1,1,1"),
    *("--num_workers", "0", "--device", "cpu", "--warmup_epochs", "1", "--lr", "1e-2", "--model_ema_decay", "0.9"),
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
