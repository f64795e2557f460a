"""Kills a training again and again, and checks that it ends with the weights of one that was left alone.

    python tests/kill_often.py 50

Each kill is a SIGKILL of all its processes at a random moment; then the same command runs again. The newest
checkpoint must be readable every time.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from checkpoint import LAST, load_latest  # noqa: E402
from models.weights import load_checkpoint  # noqa: E402

OPTIONS = [
    *("--model", "debiformer_nano", "--model_kwargs", "embed_dims=16,32,48,64", "depths=1,1,1,1"),
    *("--data_set", "DIGITS", "--input_size", "32", "--batch_size", "64", "--no_repeated_aug", "--drop_path", "0.1"),
    *("--model_ema_decay", "0.9", "--warmup_epochs", "1", "--device", "cpu", "--num_workers", "1", "--print_freq", "5"),
    *("--checkpoint_minutes", "0.001"),
]


def start(folder: Path, epochs: int) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "main.py", *OPTIONS, "--epochs", str(epochs), "--output_dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def train(folder: Path, epochs: int) -> None:
    """One training, undisturbed. RuntimeError with its output if it fails."""
    process = start(folder, epochs)
    output, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(output)


def train_with_kills(folder: Path, epochs: int, kills: int, seed: int) -> list[str]:
    """Returns where each interrupted start had begun, as it printed."""
    moments, places = random.Random(seed), []
    while len(places) < kills:
        process, began = start(folder, epochs), "from scratch"
        for line in process.stdout:
            if line.startswith("Continuing"):
                began = line.strip()
            if "images per epoch" in line:
                break
        time.sleep(moments.uniform(0, 3))
        if process.poll() is not None:
            raise RuntimeError(f"the training ended after {len(places)} kills: {process.stdout.read()}")
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        load_latest(folder)  # raises if there is one that cannot be read
        places.append(began)
    train(folder, epochs)
    return places


def same_weights(one: Path, two: Path) -> bool:
    first, second = load_checkpoint(one / LAST), load_checkpoint(two / LAST)
    return all(
        torch.equal(value, second[key][name]) for key in ("model", "model_ema") for name, value in first[key].items()
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kills", type=int, nargs="?", default=50)
    parser.add_argument("--epochs", type=int, help="default: enough for the kills to fall within the training")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    epochs = args.epochs or 2 + args.kills // 2
    with tempfile.TemporaryDirectory() as root:
        whole, killed = Path(root, "whole"), Path(root, "killed")
        train(whole, epochs)
        for number, place in enumerate(train_with_kills(killed, epochs, args.kills, args.seed), start=1):
            print(f"kill {number}: had begun {place}")
        same = same_weights(whole, killed)
    print(f"{args.kills} kills, {epochs} epochs: the weights are {'identical' if same else 'NOT identical'}")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
