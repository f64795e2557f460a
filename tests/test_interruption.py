"""Trainings that are killed, and trainings that go on among another number of processes."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import kill_often
import pytest
from support import ROOT, SMALL_RUN, command, has_trained

from models.weights import load_checkpoint
from runtime.checkpoint import LAST


def test_kill_often_finds_trainings_ending_as_undisturbed_ones():
    done = command("tests/kill_often.py", 4, "--worlds", "1,2", timeout=1800)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "4 kills; every training ended as it should"


TORCHRUN = ("-m", "torch.distributed.run", "--standalone")


@pytest.fixture
def on_two(shared_images, tmp_path):
    """on_two("run"): the arguments of a small run by two processes into a folder."""
    return lambda folder: [*SMALL_RUN, "--data_path", shared_images, "--output_dir", tmp_path / folder]


def test_failing_process_shows_its_own_traceback_and_ends_the_others(on_two):
    done = command(*TORCHRUN, "--nproc_per_node=2", "tests/fail_midway.py", *on_two("run"))
    assert done.returncode == 1
    before, _, after = done.stderr.partition("ZeroDivisionError: a mistake in somebody's code")
    assert before.count("Traceback") == 1
    assert "[rank1]: Traceback" in before
    assert after
    for word in ("gloo", "Connection", "timed out"):
        assert word not in done.stderr


@pytest.mark.slow
def test_torchrun_restarts_interrupted_processes_midway_the_epoch(on_two, tmp_path):
    many = ["--batch_size", 2, "--min_lr", 0, "--print_freq", 1]  # updates, for the stop to fall midway
    done = command(*TORCHRUN, "--nproc_per_node=2", "main.py", *on_two("whole"), *many)
    assert done.returncode == 0, done.stderr

    run = map(str, [*TORCHRUN, "--nproc_per_node=2", "--max-restarts=3", "main.py", *on_two("run"), *many])
    process = subprocess.Popen(
        [sys.executable, *run], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    printed = []
    for line in process.stdout:
        printed.append(line)
        if line.startswith("epoch 1/2  update 2/12") and not any("Continuing" in earlier for earlier in printed):
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            os.kill(int(children[-1]), signal.SIGTERM)
    assert process.wait(300) == 0
    assert any(re.search("Continuing from .*: epoch 1, image [1-9]", line) for line in printed)
    assert kill_often.same_weights(tmp_path / "whole", tmp_path / "run")


def test_torchrun_restarts_need_a_folder(shared_images):
    run = ["--max-restarts=1", "--nproc_per_node=1", "main.py", *SMALL_RUN, "--data_path", shared_images]
    done = command(*TORCHRUN, *run)
    assert "main.py: error: --max-restarts needs --output_dir" in done.stderr


SECONDS_TO_SAVE = float(os.environ.get("SECONDS_TO_SAVE", 35))  # torchrun kills after 30


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
@pytest.mark.parametrize("signalled", ["ranks", "torchrun"])
def test_torchrun_waits_for_a_slow_checkpoint(on_two, tmp_path, signalled):
    """Signalled itself, it needs to be told how long."""
    environment = {"SLOW_SAVE": str(SECONDS_TO_SAVE), "PYTHONPATH": f"{ROOT}/tests/slow_site"}
    if signalled == "torchrun":
        environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = "600"
    run = map(str, [*TORCHRUN, "--nproc_per_node=2", "main.py", *on_two("run"), "--print_freq", 1, "--epochs", 1000])
    process = subprocess.Popen(
        [sys.executable, *run],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if line.startswith("epoch 1/1000  update 2/3"):
            break
    signalled_at = time.monotonic()
    for pid in children(process.pid) if signalled == "ranks" else [process.pid]:
        os.kill(pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=600)
    assert time.monotonic() - signalled_at > SECONDS_TO_SAVE / 2  # one may have begun before
    assert "stopped; checkpoint in" in errors
    assert has_trained(tmp_path / "run")
    assert list((tmp_path / "run").glob(".*.tmp")) == []


def test_killed_loader_is_told_in_one_line_and_may_be_tried_again(shared_images, tmp_path):
    run = [*SMALL_RUN, "--data_path", shared_images, "--output_dir", tmp_path / "run"]
    process = subprocess.Popen(
        [sys.executable, "main.py", *map(str, run), "--num_workers", "1", "--epochs", "1000"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if line.startswith("epoch 2/1000"):
            break
    os.kill(children(process.pid)[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 75, errors
    assert errors.splitlines()[-1].startswith("main.py: error: a process that loads images has died, ")
    assert "Traceback" not in errors


def recorded(path):
    return sorted(tuple(map(int, line.split())) for line in path.read_text().splitlines())


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(1, 2), (4, 2)])
def test_another_number_of_processes_goes_on_at_the_same_image(shared_images, tmp_path, before, after):
    """With the same total batch, no image of the epoch is left out or seen twice."""

    def launch(processes, file, folder, epochs=2):
        torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
        run = [*SMALL_RUN, "--batch_size", 8 // processes, "--epochs", epochs, "--print_freq", 1]
        return [*torchrun, "tests/record_images.py", file, *run, "--data_path", shared_images, "--output_dir", folder]

    done = command(*launch(1, tmp_path / "whole.txt", tmp_path / "whole"))
    assert done.returncode == 0, done.stderr

    arguments = map(str, launch(before, tmp_path / "first.txt", tmp_path / "run", epochs=1000))
    process = subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    for line in process.stdout:
        if line.startswith("epoch 1/1000  update 2/6"):
            break
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=300)
    stopped = load_checkpoint(tmp_path / "run" / LAST)
    assert (stopped["epoch"], 0 < stopped["position"] < 48) == (0, True)

    done = command(*launch(after, tmp_path / "rest.txt", tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    trained = [key for key in recorded(tmp_path / "first.txt") if key[:2] < (0, stopped["position"])]
    assert trained + recorded(tmp_path / "rest.txt") == recorded(tmp_path / "whole.txt")
