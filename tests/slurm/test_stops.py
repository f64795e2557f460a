"""Jobs that are stopped at awkward moments: while they import, and while a slow disk takes their checkpoint."""

import os
import pty
import re
import signal
import subprocess
import sys
import time

import pytest
import stop_often
from support import ROOT, SMALL_RUN, command, has_trained

from slurm.local_cluster import LocalCluster

SECONDS_TO_SAVE = float(os.environ.get("SECONDS_TO_SAVE", 35))


def wait_for_line(path, pattern, timeout=600):
    end = time.monotonic() + timeout
    while not (path.exists() and re.search(pattern, path.read_text())):
        assert time.monotonic() < end, f"{pattern!r} was not printed"
        time.sleep(0.1)


@pytest.mark.slow
def test_stops_at_random_moments_lose_nothing(slurm_installed):
    done, wrong, _ = stop_often.stop_often(stops=4, slow=6, jobs=2, each=2, seed=0)
    assert wrong == []
    assert sum(done.values()) >= 2


@pytest.fixture
def open_folder(short_root):
    """A folder that a job's files may lie in; short_root is removed with all in it."""
    short_root.chmod(0o755)
    return short_root


@pytest.mark.slow
@pytest.mark.parametrize("launcher", stop_often.LAUNCHERS)
def test_job_waits_for_a_slow_checkpoint(cluster, open_folder, launcher):
    job = stop_often.Job(cluster, launcher, open_folder / "job", slow=0, save=SECONDS_TO_SAVE)
    wait_for_line(job.log, "epoch 1/3  update 2/11")
    signalled_at = time.monotonic()
    cluster.call("scancel", "--signal=USR2", str(job.id))
    assert cluster.wait_for_state(job.id, "PENDING", "FAILED", "COMPLETED", timeout=600) == "PENDING"
    assert time.monotonic() - signalled_at > SECONDS_TO_SAVE / 2  # one may have begun before
    assert has_trained(job.folder)
    assert list(job.folder.glob(".*.tmp")) == []


@pytest.mark.slow
def test_srun_waits_for_a_slow_checkpoint(cluster, shared_images, tmp_path):
    folder, log = tmp_path / "run", tmp_path / "out.txt"
    run = [*SMALL_RUN, "--data_path", shared_images, "--output_dir", folder, "--epochs", 1000, "--print_freq", 1]
    slow = {"SLOW_SAVE": str(SECONDS_TO_SAVE), "PYTHONPATH": f"{ROOT}/tests/slow_site"}
    process = subprocess.Popen(
        ["srun", "--job-name=plain", f"--output={log}", "-n2", sys.executable, "main.py", *map(str, run)],
        cwd=ROOT,
        env=cluster.env | slow,
    )
    wait_for_line(log, "epoch 1/1000  update 2/3")
    signalled_at = time.monotonic()
    cluster.call("scancel", "--signal=USR2", "--name=plain")
    assert process.wait(timeout=600) == 75
    assert time.monotonic() - signalled_at > SECONDS_TO_SAVE / 2  # one may have begun before
    assert has_trained(folder)


def test_cancelled_job_does_not_come_back(cluster, open_folder):
    """Its processes may end with the code for another try, and its script live longer than they do."""
    (open_folder / "job.sh").write_text(f"""#!/bin/bash
trap '' TERM
. {ROOT}/slurm/requeue.sh
until [ -e cancelled ]; do sleep 0.1; done
requeue_if_stopped 75
""")
    job = cluster.submit("--output=out.txt", "job.sh", cwd=open_folder)
    cluster.wait_for_state(job, "RUNNING")
    cluster.call("scancel", str(job))
    (open_folder / "cancelled").touch()
    cluster.wait_for_state(job, "CANCELLED")
    assert cluster.job(job)["Restarts"] == "0"


class WithoutRequeue(LocalCluster):
    def _slurm_conf(self) -> str:
        return super()._slurm_conf().replace("JobRequeue=1", "JobRequeue=0")


def test_hydra_job_asks_a_cluster_to_requeue_it(slurm_installed, short_root, tmp_path):
    overrides = ["model=debiformer_nano", "data_set=DIGITS", "device=cpu", "+slurm=example", "slurm.ngpus=1"]
    with WithoutRequeue(short_root / "cluster", nodes=1) as cluster:
        done = command("hydra_main.py", *overrides, f"output_dir={tmp_path}/run", **cluster.env)
        job = int(re.search(r"Submitted job (\d+)", done.stdout)[1])
        assert cluster.job(job)["Requeue"] == "1"


def test_process_in_the_shell_of_srun_is_alone(cluster):
    """The step has two tasks, but only the first has a terminal."""
    script = "from runtime.distributed import find_processes; print(find_processes())"
    shell = f"{sys.executable} -c '{script}'; true"
    master, slave = pty.openpty()
    run = ["srun", "-n2", "--pty", "bash", "-c", shell]
    process = subprocess.Popen(run, cwd=ROOT, env=cluster.env, stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    printed = b""
    try:
        while b"DistInfo" not in printed:
            printed += os.read(master, 1 << 16)
    except OSError:
        pass
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        os.close(master)
    assert b"world_size=1" in printed, printed
