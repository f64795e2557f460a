"""Stops jobs of a real Slurm again and again, and checks that none fails and none loses a step.

    python tests/stop_often.py 100 --slow 20 --jobs 4

It starts a throw-away cluster and submits the same small training by both ways, slurm/train.sbatch and hydra_main.py.
Each job gets stop signals at random moments, from the start of its first process to its end, until it has had `--each`;
then it may finish. Its imports are slowed, for most of the danger lies there.
"""

import argparse
import os
import random
import re
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from kill_often import same_weights  # noqa: E402

from slurm.local_cluster import LocalCluster  # noqa: E402

EPOCHS = 3
OPTIONS = {
    **{"model": "debiformer_nano", "data_set": "DIGITS", "input_size": 32, "batch_size": 64, "epochs": EPOCHS},
    **{"warmup_epochs": 1, "lr": 4e-3, "model_ema_decay": 0.9, "num_workers": 0, "device": "cpu", "print_freq": 1},
    **{"repeated_aug": "false", "dist_eval": "true"},
}
SMALL_MODEL = {"embed_dims": "16,32,48,64", "depths": "1,1,1,1"}
SIGNALS = ("USR2", "TERM", "INT", "HUP")
LAUNCHERS = ("train.sbatch", "hydra_main.py")


class Job:
    """One training by two processes, submitted by one of the launchers."""

    def __init__(self, cluster: LocalCluster, launcher: str, root: Path, slow: float, save: float = 0) -> None:
        self.cluster, self.launcher, self.folder = cluster, launcher, root / "run"
        root.mkdir()
        env = {"SLOW_IMPORTS": str(slow), "SLOW_SAVE": str(save), "PYTHONPATH": f"{ROOT}/tests/slow_site"}
        env |= {"OMP_NUM_THREADS": "1", "NPROC": "2"}
        path = f"{Path(sys.executable).parent}:{cluster.env['PATH']}"
        command = ["env", f"PATH={path}", *(f"{name}={value}" for name, value in env.items())]
        printed = cluster.call(*command, *getattr(self, launcher.partition(".")[0])(root), cwd=ROOT, timeout=600)
        self.id = int(re.search(r"(?:^|Submitted job )(\d+)", printed, re.MULTILINE)[1])
        self.log = root / "out.txt" if launcher == "train.sbatch" else self.folder / f"{self.id}_0_log.out"

    def train(self, root: Path) -> list[str]:
        flags = [part for name, value in OPTIONS.items() for part in (f"--{name}", str(value))]
        model = ["--model_kwargs", *(f"{name}={value}" for name, value in SMALL_MODEL.items())]
        requests = ["--gpus-per-node=0", "--cpus-per-task=2", f"--output={root}/out.txt", "--time=60"]
        return [
            "sbatch",
            "--parsable",
            *requests,
            "slurm/train.sbatch",
            *flags,
            *model,
            "--output_dir",
            str(self.folder),
        ]

    def hydra_main(self, root: Path) -> list[str]:
        overrides = [f"{name}={value}" for name, value in OPTIONS.items()]
        overrides += [f"+model_kwargs.{name}=[{value}]" for name, value in SMALL_MODEL.items()]
        job = ["+slurm=example", "slurm.nodes=1", "slurm.ngpus=2", "slurm.cpus_per_task=1", "slurm.timeout=1"]
        return [sys.executable, "hydra_main.py", *overrides, *job, f"output_dir={self.folder}"]

    def state(self) -> tuple[str, int]:
        """JobState, and how often the job has been started again."""
        job = self.cluster.job(self.id)
        return job["JobState"], int(job["Restarts"])

    def wait_for_start(self, restarts: int) -> bool:
        """Wait until the job step of a start exists; False if the job has ended."""
        while True:
            state, count = self.state()
            if state in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"):
                return False
            steps = self.cluster.call("squeue", "--steps", "--noheader", "--format=%i")
            if state == "RUNNING" and count >= restarts and f"{self.id}.0" in steps.split():
                return True
            time.sleep(0.2)

    def lives(self) -> list[tuple[int, int]]:
        """Of each start that trained: where it began, and the last update that it printed, counted from the first."""
        found, begin, last = [], 0, 0
        for line in self.log.read_text().splitlines() if self.log.exists() else ():
            if match := re.search(r"Continuing from .*: epoch (\d+), image (\d+)", line):
                found.append((begin, last))
                begin = last = (int(match[1]) - 1) * 11 + int(match[2]) // 128
            elif match := re.match(r"epoch (\d+)/\d+ +update (\d+)/11 ", line):
                update = (int(match[1]) - 1) * 11 + int(match[2])
                if update <= last:
                    found.append((begin, last))
                    begin = 0
                last = update
        return [*found, (begin, last)]

    def lost_steps(self) -> int:
        """Updates that were made, and made again."""
        lives = self.lives()
        return sum(max(0, last - begin) for (_, last), (begin, _) in pairwise(lives))


def stop_one(job: Job, times: int, span: float, moments: random.Random, done: Counter) -> list[str]:
    """Stop a job so many times; returns what went wrong."""
    sent, restarts, trained = 0, 0, 0
    while sent < times and job.wait_for_start(restarts):
        moment, name = moments.uniform(0, span), moments.choice(SIGNALS)
        end = time.monotonic() + moment
        while time.monotonic() < end and job.state()[0] == "RUNNING":
            time.sleep(0.1)
        state, count = job.state()
        if state != "RUNNING" or count < restarts:
            continue
        before, trained = trained, job.lives()[-1][1]
        try:
            job.cluster.call("scancel", f"--signal={name}", str(job.id))
        except RuntimeError:
            continue  # it has just ended
        sent += 1
        state = job.cluster.wait_for_state(job.id, "PENDING", "COMPLETED", "FAILED", timeout=1800)
        done[job.launcher, f"SIG{name}", "midway" if trained > before else "before training", state] += 1
        print(f"job {job.id}: SIG{name} after {moment:.0f} s and {trained} updates: {state}", flush=True)
        restarts = count + 1
        if state != "PENDING":
            break
    state = job.cluster.wait_for_state(job.id, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", timeout=3600)
    wrong = [] if state == "COMPLETED" else [f"job {job.id} is {state}"]
    return wrong + ([f"job {job.id} lost {job.lost_steps()} updates"] if job.lost_steps() else [])


def stop_often(stops: int, slow: float, jobs: int, each: int, seed: int) -> tuple[Counter, list[str], float]:
    """How each stop ended; what went wrong; how long an undisturbed job runs, in seconds."""
    done = Counter()
    with tempfile.TemporaryDirectory(prefix="stops-", dir="/tmp") as root, ExitStack() as stack:
        os.chmod(root, 0o755)
        cluster = stack.enter_context(LocalCluster(f"{root}/cluster", cpus=64))
        whole = Job(cluster, "train.sbatch", Path(root, "whole"), slow)
        whole.wait_for_start(0)
        began = time.monotonic()
        if cluster.wait_for_state(whole.id, "COMPLETED", "FAILED", timeout=1800) == "FAILED":
            return done, [f"the undisturbed job failed: {whole.log.read_text()}"], 0.0
        span = time.monotonic() - began

        def one(number: int) -> list[str]:
            time.sleep(2 * (number % jobs))
            launcher = LAUNCHERS[number % len(LAUNCHERS)]
            job = Job(cluster, launcher, Path(root, str(number)), slow)
            wrong = stop_one(job, each, span, random.Random(f"{seed}-{number}"), done)
            if not wrong and not same_weights(whole.folder, job.folder):
                wrong.append(f"job {job.id} ended with other weights")
            if wrong:
                print(*wrong, job.log.read_text()[-3000:], sep="\n", flush=True)
            return wrong

        wrong, number = [], 0
        with ThreadPoolExecutor(jobs) as pool:
            while sum(done.values()) < stops and number < 10 * stops:
                count = min(jobs, -(-(stops - sum(done.values())) // each))
                wrong += [line for lines in pool.map(one, range(number, number + count)) for line in lines]
                number += count
    return done, wrong, span


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stops", type=int, nargs="?", default=100)
    parser.add_argument("--slow", type=float, default=20, help="seconds that the imports of each process take longer")
    parser.add_argument("--jobs", type=int, default=4, help="at once")
    parser.add_argument("--each", type=int, default=5, help="stops per job")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    done, wrong, span = stop_often(args.stops, args.slow, args.jobs, args.each, args.seed)
    print(f"{sum(done.values())} stops, imports slowed by {args.slow:g} s, {span:.0f} s an undisturbed job")
    for (launcher, name, when, state), count in sorted(done.items()):
        print(f"| {launcher} | {name} | {when} | {'back to the queue' if state == 'PENDING' else state} | {count} |")
    print("\n".join(wrong) or "no job failed, none lost an update, all ended with the same weights")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
