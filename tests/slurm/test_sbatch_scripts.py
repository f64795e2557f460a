"""The job scripts start every rank of main.py alike, pass arguments on, and run an interrupted job again.

They run here beside a tiny main.py, in a folder laid out like the project.
"""

import json
import os
import shutil
import sys
import time
from pathlib import Path

import pytest

SLURM = Path(__file__).parents[2] / "slurm"

# Writes down what each rank sees: rank-0.json, ... and, in the second run of the job, rank-0-again.json, ...
PROLOGUE = """
import json, os, signal, sys, time
from pathlib import Path

again = "SLURM_RESTART_COUNT" in os.environ
received = []
for signum in (signal.SIGTERM, signal.SIGUSR2):
    signal.signal(signum, lambda signum, frame: received.append(signum))

def report(**more):
    path = Path(f"rank-{os.environ['RANK']}{'-again' if again else ''}.json")
    seen = {"argv": sys.argv[1:], "env": dict(os.environ), **more}
    path.with_suffix(".part").write_text(json.dumps(seen))
    path.with_suffix(".part").rename(path)

def wait_for_signal():
    deadline = time.monotonic() + 600
    while not received and time.monotonic() < deadline:
        time.sleep(0.02)
"""


OUTPUT = ("--output_dir", "out")


class Project:
    """A folder with the job scripts and a main.py of the test's choice."""

    def __init__(self, folder: Path, cluster) -> None:
        self.folder, self.cluster = folder, cluster
        shutil.copytree(SLURM, folder / "slurm")

    def submit(self, script: str, *arguments: str, main: str, nodes: int = 2) -> int:
        (self.folder / "main.py").write_text(PROLOGUE + main)
        requests = (f"--nodes={nodes}", "--gpus-per-node=2", "--cpus-per-task=2")
        return self.cluster.submit(*requests, f"slurm/{script}", *arguments, cwd=self.folder)

    def reports(self, count: int, suffix: str = "", timeout: float = 600) -> list[dict]:
        """What the first `count` ranks wrote, in order; waits for it."""
        paths = [self.folder / f"rank-{rank}{suffix}.json" for rank in range(count)]
        deadline = time.monotonic() + timeout
        while not all(path.exists() for path in paths):
            assert time.monotonic() < deadline, f"no report from every rank:\n{self.log()}"
            time.sleep(0.05)
        return [json.loads(path.read_text()) for path in paths]

    def log(self) -> str:
        return "".join(path.read_text() for path in self.folder.glob("*.out"))


@pytest.fixture
def project(cluster, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.delenv("NPROC", raising=False)
    return Project(tmp_path / "project", cluster)


ALL_REDUCE = """
import torch
import torch.distributed as dist

dist.init_process_group("gloo")
total = torch.tensor(dist.get_rank() + 1)
dist.all_reduce(total)
report(total=int(total), rank=dist.get_rank(), size=dist.get_world_size())
dist.destroy_process_group()
"""


def test_train_starts_consistent_ranks(project, cluster):
    arguments = ["--model", "debiformer_tiny", "--output_dir", "a folder", "--note", 'it\'s "$HOME"']
    job = project.submit("train.sbatch", *arguments, main=ALL_REDUCE)
    assert cluster.wait_for_state(job, "COMPLETED", "FAILED") == "COMPLETED", project.log()
    reports = project.reports(4)
    for rank, report in enumerate(reports):
        env = report["env"]
        assert (report["rank"], report["size"], report["total"]) == (rank, 4, 1 + 2 + 3 + 4)
        assert report["argv"] == arguments
        assert env["MASTER_ADDR"] == cluster.nodes[0]
        assert env["MASTER_PORT"] == str(10000 + job % 20000)
        assert env["SLURMD_NODENAME"] == cluster.nodes[rank // 2]
        assert env["LOCAL_RANK"] == str(rank % 2)
        assert env["LOCAL_WORLD_SIZE"] == "2"
        assert env["CUDA_VISIBLE_DEVICES"] == "0,1"
    assert (project.folder / f"train-{job}.out").exists()


def test_without_a_folder_for_its_checkpoint_no_job_starts(project, cluster):
    job = project.submit("train.sbatch", "--model", "debiformer_tiny", nodes=1, main="report()")
    assert cluster.wait_for_state(job, "COMPLETED", "FAILED") == "FAILED"
    assert (
        project.log()
        == "train.sbatch: error: add --output_dir, where the job finds its checkpoint when it runs again\n"
    )


def test_nproc_overrules_the_number_of_gpus(project, cluster, monkeypatch):
    monkeypatch.setenv("NPROC", "3")
    job = project.submit("train.sbatch", *OUTPUT, nodes=1, main="report()")
    assert cluster.wait_for_state(job, "COMPLETED", "FAILED") == "COMPLETED", project.log()
    assert {report["env"]["WORLD_SIZE"] for report in project.reports(3)} == {"3"}


def test_eval_adds_its_flag(project, cluster):
    job = project.submit("eval.sbatch", "--dist_eval", "--resume", "best.pth", main="report()")
    assert cluster.wait_for_state(job, "COMPLETED", "FAILED") == "COMPLETED", project.log()
    for report in project.reports(4):
        assert report["argv"] == ["--eval", "--dist_eval", "--resume", "best.pth"]
        assert report["env"]["WORLD_SIZE"] == "4"


def test_exit_code_75_runs_the_job_again(project, cluster):
    job = project.submit(
        "train.sbatch", *OUTPUT, "--epochs", "3", nodes=1, main="report(); sys.exit(0 if again else 75)"
    )
    assert cluster.wait_for_state(job, "COMPLETED", "FAILED") == "COMPLETED", project.log()
    assert cluster.job(job)["Restarts"] == "1"
    first, second = project.reports(2), project.reports(2, "-again")
    assert [report["argv"] for report in first] == [report["argv"] for report in second]
    assert project.log().count("stopped, back to the queue") == 1


SAVE_AND_LEAVE = """
report()
if not again:
    wait_for_signal()
    time.sleep(0.5 * int(os.environ["RANK"]))  # saving takes some ranks longer than others
    print(f"saved {os.environ['RANK']} after {received[0]}\\n", end="", flush=True)
    sys.exit(75)
"""


@pytest.mark.parametrize(
    ("nodes", "scancel", "signum"),
    # The warning before the time limit goes to the batch shell; a preemption without a warning, to every process.
    [(2, ("--batch", "--signal=USR2"), 12), (1, ("--signal=TERM",), 15)],
    ids=["warning", "preemption"],
)
def test_signals_reach_every_rank_and_the_job_runs_again(project, cluster, nodes, scancel, signum):
    job = project.submit("train.sbatch", *OUTPUT, nodes=nodes, main=SAVE_AND_LEAVE)
    project.reports(2 * nodes)
    cluster.call("scancel", *scancel, str(job))
    assert cluster.wait_for_state(job, "COMPLETED", "FAILED") == "COMPLETED", project.log()
    assert cluster.job(job)["Restarts"] == "1"
    for rank in range(2 * nodes):
        assert f"saved {rank} after {signum}" in project.log()
    project.reports(2 * nodes, "-again")


def test_cancelled_job_saves_and_stays_cancelled(project, cluster):
    job = project.submit("train.sbatch", *OUTPUT, main=SAVE_AND_LEAVE)
    project.reports(4)
    cluster.call("scancel", str(job))
    cluster.wait_for_state(job, "CANCELLED")
    for rank in range(4):
        assert f"saved {rank} after 15" in project.log()
    assert cluster.job(job)["Restarts"] == "0"


@pytest.mark.parametrize(("end", "code"), [("sys.exit(3)", 3), ("os.kill(os.getpid(), signal.SIGKILL)", 137)])
def test_failure_is_not_run_again(project, cluster, end, code):
    main = f"if os.environ['RANK'] == '1': {end}\nwait_for_signal()"
    job = project.submit("train.sbatch", *OUTPUT, nodes=1, main=main)
    assert cluster.wait_for_state(job, "COMPLETED", "FAILED") == "FAILED"
    assert cluster.job(job)["ExitCode"] == f"{code}:0"
    assert cluster.job(job)["Restarts"] == "0"
