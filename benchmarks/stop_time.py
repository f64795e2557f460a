"""Seconds from a stop signal to a complete checkpoint.

    python -m benchmarks.stop_time                       debiformer_base, one process
    python -m benchmarks.stop_time --processes 2         two of them, of which only the last hears the signal

Starts a training of real digits at 224 pixels, sends SIGTERM in the middle of its fourth update, and waits for the
checkpoint: that is the rest of the update, among several processes one more, and the writing, which is shown by itself.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from models.weights import load_checkpoint
from runtime.checkpoint import LAST, save_checkpoint
from runtime.errors import exit_on_error

ROOT = Path(__file__).resolve().parent.parent


def time_stop(model: str, batch_size: int, processes: int, folder: Path) -> tuple[float, float]:
    """Seconds of one update, and from the signal until the checkpoint has its final name."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [*(torchrun if processes > 1 else []), "main.py", "--model", model, "--batch_size", str(batch_size)]
    command += ["--data_set", "DIGITS", "--input_size", "224", "--print_freq", "1", "--num_workers", "1"]
    command += ["--output_dir", str(folder)]
    run = subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    finished = []
    for line in run.stdout:
        if "  update " in line:
            finished.append(time.monotonic())
        if len(finished) == 3:
            break
    update = finished[2] - finished[1]
    time.sleep(update / 2)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    began = time.monotonic()
    os.kill(int(children[-1]) if processes > 1 else run.pid, signal.SIGTERM)
    while not (folder / LAST).exists():
        if run.poll() is not None:
            raise RuntimeError(f"the training ended with code {run.returncode} and without a checkpoint")
        time.sleep(0.01)
    seconds = time.monotonic() - began
    run.communicate()
    return update, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="debiformer_base")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--processes", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        update, stop = time_stop(args.model, args.batch_size, args.processes, folder)
        checkpoint = load_checkpoint(folder / LAST)
        began = time.monotonic()
        save_checkpoint(checkpoint, folder / "again.pth")
        write = time.monotonic() - began
        megabytes = (folder / LAST).stat().st_size / 2**20
    print(f"{args.model}, {args.processes} process(es), batch {args.batch_size}, torch {torch.__version__}:")
    print(f"an update takes {update:.1f} s, stopping {stop:.1f} s, of it writing {megabytes:.0f} MB {write:.1f} s")


if __name__ == "__main__":
    exit_on_error("benchmarks.stop_time", main)
