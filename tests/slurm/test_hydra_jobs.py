"""Runs of hydra_main.py as jobs of a real Slurm: two nodes with two processes each."""

import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest
import submitit
import torch
from support import ROOT, SMALL_RUN, command, has_trained

from models.weights import load_checkpoint
from runtime.checkpoint import LAST

OPTIONS = {
    "model": "debiformer_nano",
    "data_set": "DIGITS",
    "input_size": 32,
    "batch_size": 16,
    "epochs": 2,
    "warmup_epochs": 1,
    "lr": 4e-3,
    "drop_path": 0.1,
    "model_ema_decay": 0.9,
    "num_workers": 0,
    "device": "cpu",
    "print_freq": 1,
    "repeated_aug": "false",
    "dist_eval": "true",
}
SMALL_MODEL = {"embed_dims": "16,32,48,64", "depths": "1,1,1,1"}


def for_main(folder):
    argv = [part for name, value in OPTIONS.items() for part in (f"--{name}", str(value))]
    return [
        *argv,
        "--model_kwargs",
        *(f"{name}={value}" for name, value in SMALL_MODEL.items()),
        "--output_dir",
        folder,
    ]


def for_hydra(folder, *more):
    overrides = [f"{name}={value}" for name, value in OPTIONS.items()]
    overrides += [f"+model_kwargs.{name}=[{value}]" for name, value in SMALL_MODEL.items()]
    job = ["+slurm=example", "slurm.nodes=2", "slurm.ngpus=2", "slurm.cpus_per_task=2", "slurm.timeout=10"]
    return ["hydra_main.py", *overrides, *job, f"output_dir={folder}", *more]


def log_of(folder):
    records = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    return [{name: value for name, value in record.items() if name != "seconds"} for record in records]


def assert_same_run(one, two):
    """The same weights bit for bit, and the same log: nothing was trained twice or left out."""
    first, second = load_checkpoint(one / LAST), load_checkpoint(two / LAST)
    for key in ("model", "model_ema"):
        assert first[key].keys() == second[key].keys()
        for name, value in first[key].items():
            assert torch.equal(value, second[key][name]), name
    assert log_of(one) == log_of(two)


@pytest.fixture(scope="module")
def undisturbed(slurm_installed, tmp_path_factory):
    """The run's folder after four torchrun processes on one host."""
    folder = tmp_path_factory.mktemp("torchrun")
    done = command("-m", "torch.distributed.run", "--nproc_per_node=4", "--standalone", "main.py", *for_main(folder))
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def submit(cluster, tmp_path, monkeypatch):
    """submit("slurm.requeues=0"): submits the run, without waiting. Returns its submitit job; folder: tmp_path/run."""
    for name in ("PATH", "SLURM_CONF"):
        monkeypatch.setenv(name, cluster.env[name])

    def run(*more):
        done = command(*for_hydra(tmp_path / "run", *more))
        assert done.returncode == 0, done.stderr
        job_id = re.search(r"Submitted job (\d+)", done.stdout)[1]
        return submitit.SlurmJob(tmp_path / "run", job_id, tasks=[0, 1, 2, 3])

    return run


def wait_for_line(job, pattern, timeout=600):
    """Until the main process has printed a line; its whole output."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        text = job.paths.stdout.read_text() if job.paths.stdout.exists() else ""
        if re.search(pattern, text):
            return text
        time.sleep(0.05)
    raise TimeoutError(f"{pattern!r} was not printed:\n{text}\n{job.paths.stderr.read_text()}")


def test_job_trains_to_the_same_weights_as_torchrun(cluster, undisturbed, tmp_path):
    done = command(*for_hydra(tmp_path / "run", "wait=true"), **cluster.env)
    assert done.returncode == 0, done.stderr
    for words in (
        r"Submitted job \d+",
        rf"follow it: tail -F {tmp_path}/run/\d+_0_log.out",
        r"Job \d+ is done\nBest accuracy [\d.]+%",
    ):
        assert re.search(words, done.stdout)
    assert_same_run(undisturbed, tmp_path / "run")


def requeue(cluster, job):
    cluster.call("scontrol", "requeue", job.job_id)


def preempt(cluster, job):
    job._interrupt(timeout=False)


def run_out_of_time(cluster, job):
    job._interrupt(timeout=True)


@pytest.mark.slow
@pytest.mark.parametrize("disturb", [requeue, preempt, run_out_of_time])
def test_disturbed_job_goes_on_midway_the_epoch(cluster, submit, undisturbed, tmp_path, disturb):
    # In one case images are loaded in processes of their own, which get the signals, too.
    job = submit(f"num_workers={1 if disturb is preempt else 0}")
    wait_for_line(job, r"epoch 2/2  update 2/22")
    disturb(cluster, job)
    text = wait_for_line(job, r"Continuing from .*checkpoint.pth: epoch \d, image \d+")
    job.results()
    epoch, image = map(int, re.search(r"Continuing from .*: epoch (\d), image (\d+)", text).groups())
    assert (epoch, image > 0) == (2, True)
    # submitit preempts with two signals; the second may reach the job when it has come back already.
    signals = 2 if disturb is preempt else 1
    assert 1 <= int(cluster.job(int(job.job_id))["Restarts"]) <= signals
    assert_same_run(undisturbed, tmp_path / "run")


@pytest.mark.slow
def test_job_preempted_by_another_one_comes_back(cluster, submit, undisturbed, tmp_path):
    job = submit("slurm.partition=main")
    wait_for_line(job, r"epoch 1/2  update 3/22")
    other = cluster.submit("-p", "high", "-N2", "--exclusive", "--wrap", "sleep 1", cwd=tmp_path)
    cluster.wait_for_state(other, "COMPLETED", timeout=600)
    job.results()
    assert_same_run(undisturbed, tmp_path / "run")


@pytest.mark.slow
def test_after_the_last_requeue_the_checkpoint_stands_and_the_log_says_how_to_go_on(submit, undisturbed, tmp_path):
    job = submit("slurm.requeues=0", "slurm.timeout=0.1")  # so short that submitit takes any signal for a time-out
    wait_for_line(job, r"epoch 1/2  update 2/22")
    job._interrupt(timeout=True)
    with pytest.raises(submitit.core.utils.UncompletedJobError, match="timed-out too many times"):
        job.results()
    told = job.paths.stderr.read_text()
    assert f"To go on, with the same launcher: python main.py --recipe {tmp_path}/run/options.yaml" in told
    assert has_trained(tmp_path / "run")
    submit().results()  # the same command
    assert_same_run(undisturbed, tmp_path / "run")


def test_dead_process_takes_the_others_down(cluster, submit):
    job = submit("epochs=1000")
    wait_for_line(job, r"epoch 1/1000  update 2/22")
    victim = next(pid for pid, name in ranks_of(cluster).items() if name == "2")
    os.kill(victim, signal.SIGKILL)
    assert cluster.wait_for_state(int(job.job_id), "FAILED", timeout=600) == "FAILED"


def test_process_that_fails_under_plain_srun_is_heard_first(cluster, shared_images, tmp_path):
    run = [*SMALL_RUN, "--data_path", shared_images, "--output_dir", tmp_path / "run"]
    with pytest.raises(RuntimeError) as failure:
        cluster.call("srun", "-N2", sys.executable, "tests/fail_midway.py", *map(str, run), cwd=ROOT, timeout=600)
    before, found, _ = str(failure.value).partition("ZeroDivisionError: a mistake in somebody's code")
    assert found
    assert "gloo" not in before


@pytest.mark.slow
def test_job_that_runs_into_its_time_limit_goes_on(cluster, submit, tmp_path):
    """By the clock: Slurm sends the warning signal itself, before a limit of one minute."""
    job = submit("slurm.timeout=0.0167", "slurm.signal_delay=30", "slurm.ngpus=1", "epochs=1000")
    text = wait_for_line(job, r"Continuing from .*checkpoint.pth: epoch \d+, image [1-9]\d*", timeout=600)
    epoch = int(re.search(r"Continuing from .*: epoch (\d+)", text)[1])
    wait_for_line(job, rf"epoch {epoch + 1}/1000  update 1/")
    cluster.call("scancel", job.job_id)
    assert int(cluster.job(int(job.job_id))["Restarts"]) >= 1
    assert [record["epoch"] for record in log_of(tmp_path / "run")][: epoch + 1] == list(range(epoch))


def ranks_of(cluster):
    """Process ids of the running job's main processes, with their ranks."""
    ranks = {}
    for pid in cluster.processes():
        environment = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
        variables = dict(entry.partition("=")[::2] for entry in environment)
        command_line = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
        if "submitit.core._submit" in command_line and "SLURM_PROCID" in variables:
            ranks.setdefault(pid, variables["SLURM_PROCID"])
    return ranks


def test_mistake_of_the_user_comes_back_as_one_line(cluster, tmp_path):
    done = command(*for_hydra(tmp_path / "run", "wait=true", "batch_size=2000"), **cluster.env)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines() == [
        "hydra_main.py: error: 1437 training images do not fill one batch of 8000 "
        "(batch_size x processes x accum_steps); lower --batch_size"
    ]


def test_slurms_own_words_when_it_refuses(cluster, tmp_path):
    done = command(*for_hydra(tmp_path / "run", "slurm.partition=moon"), **cluster.env)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert "invalid partition specified: moon" in line


def test_controller_that_does_not_answer_is_named(cluster, tmp_path):
    conf = tmp_path / "slurm.conf"
    text = re.sub(r"SlurmctldPort=\d+", "SlurmctldPort=1", Path(cluster.env["SLURM_CONF"]).read_text())
    conf.write_text(f"{text}\nMessageTimeout=2\n")
    done = command(*for_hydra(tmp_path / "run"), **{**cluster.env, "SLURM_CONF": str(conf)})
    assert done.returncode == 2
    assert done.stderr.strip().splitlines() == [
        "hydra_main.py: error: Slurm's controller does not answer; see scontrol ping, and submit again when it does"
    ]


def test_multirun_submits_one_job_per_point(cluster, tmp_path):
    overrides = [part for part in for_hydra("")[1:] if not part.startswith(("output_dir", "lr", "epochs", "warmup"))]
    swept = [*overrides, "epochs=1", "warmup_epochs=0", "lr=1e-4,5e-4"]
    done = command(ROOT / "hydra_main.py", "-m", *swept, cwd=tmp_path, **cluster.env)
    assert done.returncode == 0, done.stderr
    jobs = re.findall(r"Submitted job (\d+)", done.stdout)
    assert len(jobs) == 2
    for job in jobs:
        assert cluster.wait_for_state(int(job), "COMPLETED", timeout=600) == "COMPLETED"
    folders = [path.parent for path in tmp_path.glob("outputs/cls/*/*/log.txt")]
    assert sorted(float(re.search(r"-lr\.(.+?)-model", str(folder))[1]) for folder in folders) == [1e-4, 5e-4]
    assert [len(log_of(folder)) for folder in folders] == [1, 1]


def test_plain_srun_finds_the_others(cluster, undisturbed, tmp_path):

    cluster.call(
        *("srun", "-N2", "--ntasks-per-node=2", "--cpus-per-task=2", sys.executable, "main.py"),
        *map(str, for_main(tmp_path / "run")),
        cwd=ROOT,
        timeout=600,
    )
    assert_same_run(undisturbed, tmp_path / "run")
