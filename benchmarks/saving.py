"""How long a checkpoint keeps training waiting: weights, their average and AdamW's memory.

    python -m benchmarks.saving                              debiformer_base
    python -m benchmarks.saving --folder /scratch --write    on another disk; benchmarks/results/saving-cpu.md

Updates are made undisturbed, and right after a save has begun, while the file is being written. The training thread
waits for the check of the weights, the list of the state's tensors (`Saver.save`), and their copy, before the update
changes them. Beside it: the same state written by the training thread itself.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

import models  # noqa: F401 (registers with timm)
from optim_factory import build_ema, build_optimizer
from runtime.checkpoint import TrainingState, build_checkpoint, save_checkpoint
from runtime.distributed import DistInfo
from runtime.errors import OneLineParser, exit_on_error
from runtime.meters import LossMeter, check_weights
from runtime.run_folder import RunFolder
from runtime.run_log import RunLog
from runtime.saving import Saver
from tasks.options import Options

from .markdown import table
from .measure import RESULTS, describe_machine, machine_line, synchronize, write_result

TARGET_MS = 50.0
WAITS = {"check": "check of the weights", "list": "list of the tensors", "copy": "copy, beyond the gradients' time"}


class Training:
    """Updates of a model on random images, and its state."""

    def __init__(self, model: str, batch_size: int, input_size: int, device: torch.device) -> None:
        torch.manual_seed(0)
        options = Options(model=model, batch_size=batch_size, input_size=input_size)
        network = timm.create_model(model).to(device, memory_format=torch.channels_last)
        self.ema, self.device = build_ema(network, options), device
        self.images = torch.randn(batch_size, 3, input_size, input_size, device=device)
        optimizer = build_optimizer(network, options, batch_size)
        self.state = TrainingState(
            network,
            optimizer,
            torch.amp.GradScaler(device.type, enabled=False),
            meter=LossMeter(device, DistInfo()),
            history=RunLog(None, None),
            args={"model": model},
            classes=[],
            data={},
            model_ema=self.ema.module,
        )

    def update(self, before: Callable[[], None]) -> None:
        """Make one update; `before` is called when the gradients are there."""
        network: nn.Module = self.state.model
        network(self.images).square().mean().backward()
        before()
        self.state.optimizer.step()
        self.state.optimizer.zero_grad()
        self.ema.update(network)
        synchronize(self.device)


def timed(action: Callable[[], object]) -> dict[str, float]:
    """Milliseconds that an action takes, and those of its thread on a processor."""
    began, cpu = time.perf_counter(), time.thread_time()
    action()
    return {"ms": 1e3 * (time.perf_counter() - began), "cpu_ms": 1e3 * (time.thread_time() - cpu)}


def measure(training: Training, folder: Path, repeats: int) -> list[dict[str, Any]]:
    """Save so often; of each time, what the training thread waited for, and how long updates took."""
    state, rows = training.state, []
    run_folder = RunFolder(folder)
    for number in range(repeats + 1):
        with Saver(run_folder, training.device) as saver:
            quiet = timed(lambda: training.update(lambda: None))
            state.position += 1
            row: dict[str, Any] = {"check": timed(lambda: check_weights(state.model, 0))}
            row["list"] = timed(lambda saver=saver: saver.save(state))
            copy: dict[str, float] = {}
            beside = timed(
                lambda saver=saver, copy=copy: training.update(lambda: copy.update(timed(saver.wait_for_copy)))
            )
            row |= {"copy": copy, "update": quiet["ms"], "update_while_writing": beside["ms"]}
            row["until_written"] = row["list"]["ms"] + beside["ms"] + timed(saver.wait)["ms"]
        row["training_thread"] = timed(lambda: save_checkpoint(build_checkpoint(state), folder / "beside.pth"))
        if number:  # the first one asks the system for memory
            rows.append(row)
    return rows


def page_of(result: dict[str, Any]) -> str:
    """The result for reading."""
    rows = result["rows"]

    def middle(*names: str) -> list[float]:
        """Medians over the saves of the times of these parts together: by the clock, and on a processor."""
        return [statistics.median(sum(row[name][kind] for name in names) for row in rows) for kind in ("ms", "cpu_ms")]

    waits = middle(*WAITS)
    lines = [[words, *middle(name)] for name, words in WAITS.items()]
    lines += [["together", *waits], ["written by the training thread itself", *middle("training_thread")]]
    clock, processor = ("reached" if each <= TARGET_MS else "missed" for each in waits)
    quiet, beside, whole = (
        statistics.median(row[name] for row in rows) / 1e3
        for name in ("update", "update_while_writing", "until_written")
    )
    about = (
        f"{result['model']} with its average and AdamW's memory, {result['tensors']} tensors, "
        f"{result['megabytes']:.0f} MB; batch {result['batch_size']} of {result['input_size']} pixels; "
        f"medians of {len(rows)} saves. {machine_line(result['machine'])}."
    )
    target = (
        f"Target: {TARGET_MS:.0f} ms; {clock} by the clock, {processor} in time on a processor. An update takes "
        f"{quiet:.2f} s, and {beside:.2f} s while a checkpoint is copied and written, which takes {whole:.1f} s in all."
    )
    header = ["the training thread waits for", "ms", "ms on a processor"]
    numbers = [[words, *(f"{each:.1f}" for each in times)] for words, *times in lines]
    return "\n".join(
        ["# What a checkpoint keeps training waiting for", "", about, "", table(header, numbers), "", target]
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = OneLineParser(
        prog="python -m benchmarks.saving",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="debiformer_base")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--input_size", type=int, default=224)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--folder", type=Path, help="where to write, for a moment; default: the system's")
    parser.add_argument("--write", action="store_true", help="also write the results")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where to")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    training = Training(args.model, args.batch_size, args.input_size, device)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        rows = measure(training, Path(name), args.repeats)
        megabytes = (Path(name) / "beside.pth").stat().st_size / 2**20
    content = build_checkpoint(training.state)
    tensors = len(content["model"]) + len(content["model_ema"]) + sum(map(len, content["optimizer"]["state"].values()))
    result = {"machine": describe_machine(device), "tensors": tensors, "megabytes": megabytes, "rows": rows}
    result |= {name: getattr(args, name) for name in ("model", "batch_size", "input_size")}
    page = page_of(result)
    print(page)
    if args.write:
        write_result("saving", result, page, args.results)


if __name__ == "__main__":
    exit_on_error("benchmarks.saving", main)
