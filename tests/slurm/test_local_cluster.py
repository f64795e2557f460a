"""The throw-away cluster behaves like Slurm and leaves nothing behind."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from slurm import local_cluster
from slurm.local_cluster import INSTALL, LocalCluster, namespace_available

COMMAND = [sys.executable, local_cluster.__file__]


def wait_for_text(path: Path, text: str, timeout: float = 30) -> None:
    deadline = time.monotonic() + timeout
    while not (path.exists() and text in path.read_text()):
        assert time.monotonic() < deadline, f"{text!r} did not appear in {path}"
        time.sleep(0.05)


def test_nodes_are_idle_and_run_commands(cluster):
    states = cluster.call("sinfo", "--noheader", "--Node", "--partition=main", "--format=%N %T").splitlines()
    assert sorted(states) == [f"{name} idle" for name in cluster.nodes]
    names = cluster.call("srun", "--nodes=2", "printenv", "SLURMD_NODENAME").split()
    assert sorted(names) == cluster.nodes
    if cluster.namespace:
        assert sorted(cluster.call("srun", "--nodes=2", "hostname").split()) == ["node1", "node2"]


def test_gpus_are_handed_out(cluster):
    devices = cluster.call("srun", "--nodes=2", "--gpus-per-node=2", "printenv", "CUDA_VISIBLE_DEVICES").split()
    assert devices == ["0,1", "0,1"]


def test_failing_command_is_reported_with_its_message(cluster):
    with pytest.raises(RuntimeError, match="Invalid partition"):
        cluster.call("srun", "--partition=nowhere", "true")


def test_requeued_job_runs_again(cluster, tmp_path):
    out = tmp_path / "out"
    script = 'echo "restarts: ${SLURM_RESTART_COUNT-none}"; [ -n "${SLURM_RESTART_COUNT-}" ] || sleep 100'
    job = cluster.submit("--requeue", "--open-mode=append", f"--output={out}", "--wrap", script)
    wait_for_text(out, "none")
    cluster.call("scontrol", "requeue", str(job))
    cluster.wait_for_state(job, "COMPLETED")
    assert re.findall("restarts: (.*)", out.read_text()) == ["none", "1"]
    assert cluster.job(job)["Restarts"] == "1"


def test_high_partition_preempts(cluster, tmp_path):
    out = tmp_path / "out"
    script = """
        trap 'echo saved; scontrol requeue "$SLURM_JOB_ID"; exit' USR2
        echo "restarts: ${SLURM_RESTART_COUNT-none}"
        [ -n "${SLURM_RESTART_COUNT-}" ] || { sleep 100 & wait; }
    """
    options = ("--nodes=2", "--requeue", "--open-mode=append", "--signal=B:USR2@60")
    low = cluster.submit(*options, f"--output={out}", "--wrap", script)
    wait_for_text(out, "none")
    high = cluster.submit("--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap", "true")
    cluster.wait_for_state(high, "COMPLETED")
    cluster.wait_for_state(low, "COMPLETED")
    text = out.read_text()
    assert text.index("none") < text.index("saved") < text.index("restarts: 1")


def test_node_whose_step_slurm_took_for_unkillable_is_given_back(cluster, tmp_path):
    cluster.call("scontrol", "update", "NodeName=node1", "State=DRAIN", "Reason=Kill task failed")
    job = cluster.submit("-N2", "--wrap", "true", cwd=tmp_path)
    assert cluster.wait_for_state(job, "COMPLETED") == "COMPLETED"
    cluster.call("scontrol", "update", "NodeName=node1", "State=DRAIN", "Reason=Kill task failed")
    cluster.cancel_all()


def test_sacct_stand_in_answers(cluster):
    job = cluster.submit("--output=/dev/null", "--wrap", "true")
    failed = cluster.submit("--output=/dev/null", "--wrap", "exit 3")
    waiting = cluster.submit("--output=/dev/null", "--hold", "--array=0-3", "--wrap", "true")
    cluster.wait_for_state(job, "COMPLETED")
    cluster.wait_for_state(failed, "FAILED")
    ids = [str(job), str(failed), str(waiting)]
    fields = ("sacct", "-o", "JobID,State,NodeList", "--parsable2")
    lines = cluster.call(*fields, "-j", ids[0], "-j", ids[1], "-j", ids[2]).splitlines()
    first = cluster.nodes[0]
    assert lines[:3] == ["JobID|State|NodeList", f"{job}|COMPLETED|{first}", f"{failed}|FAILED|{first}"]
    assert lines[3].startswith(f"{waiting}_[0-3]|PENDING|")
    assert cluster.call(*fields, "-j", ",".join(ids)).splitlines() == lines
    assert cluster.call(*fields, "-j", "1").splitlines() == lines[:1]


def test_folder_is_kept_out_of_repositories(cluster):
    assert (cluster.root / ".gitignore").read_text() == "*\n"


def test_plain_form(slurm_installed, short_root):
    with LocalCluster(short_root, nodes=3, cpus=1, gpus=0, namespace=False) as cluster:
        assert sorted(cluster.call("srun", "--nodes=3", "printenv", "SLURMD_NODENAME").split()) == cluster.nodes
        job = cluster.submit("--output=/dev/null", "--wrap", "sleep 1000")
        cluster.wait_for_state(job, "RUNNING")
        deadline = time.monotonic() + 120
        while "slurmstepd" not in cluster.processes().values():
            assert time.monotonic() < deadline, cluster.processes()
            time.sleep(0.05)
    assert cluster.processes() == {}


@pytest.mark.parametrize(
    ("path", "message"),
    [("x" * 60, "longer than 60 characters"), ("closed/root", "not open to everybody"), ("", "not empty")],
)
def test_unsuitable_roots_are_refused(short_root, path, message):
    (short_root / "closed").mkdir(0o700)
    with pytest.raises(ValueError, match=message):
        LocalCluster(short_root / path).start()


def test_daemon_that_fails_is_reported_with_its_log(slurm_installed, short_root, monkeypatch):
    conf = LocalCluster._slurm_conf
    monkeypatch.setattr(LocalCluster, "_slurm_conf", lambda self: conf(self) + "NoSuchOption=1\n")
    with pytest.raises(RuntimeError, match="NoSuchOption"):
        LocalCluster(short_root).start()


def start_from_command_line(*arguments: str) -> tuple[subprocess.Popen, LocalCluster]:
    """Start the command and return it with a view of its cluster, made from the line that it prints for the user."""
    as_in_foreground = ["env", "--default-signal=INT,HUP"]  # the shell ignores them for what runs in the background
    process = subprocess.Popen([*as_in_foreground, *COMMAND, *arguments], stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        export = re.match(r"\s*export SLURM_CONF=(\S+)/etc/slurm.conf PATH=", line)
        if export:
            return process, LocalCluster(export[1])
    raise AssertionError(f"no export line; exit code {process.wait()}")


def wait_for_end(cluster: LocalCluster) -> None:
    deadline = time.monotonic() + 120
    while cluster.processes():
        assert time.monotonic() < deadline, f"left behind: {cluster.processes()}"
        time.sleep(0.05)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_command_line_stops_cleanly(slurm_installed, signum):
    process, cluster = start_from_command_line("--nodes", "1", "--gpus", "0")
    cluster.wait_for_state(cluster.submit("--output=/dev/null", "--wrap", "sleep 1000"), "RUNNING")
    process.send_signal(signum)
    assert process.wait(120) == 0
    assert cluster.processes() == {}
    assert not cluster.root.exists()


def test_command_line_killed_leaves_nothing(slurm_installed, short_root):
    if not namespace_available():
        pytest.skip("may not create a pid namespace")
    process, cluster = start_from_command_line(str(short_root))
    cluster.wait_for_state(cluster.submit("--output=/dev/null", "--wrap", "sleep 1000"), "RUNNING")
    process.kill()
    process.wait()
    wait_for_end(cluster)


def test_command_line_reports_a_daemon_that_ends(slurm_installed, short_root):
    process, cluster = start_from_command_line(str(short_root))
    (controller,) = (pid for pid, name in cluster.processes().items() if name == "slurmctld")
    os.kill(controller, signal.SIGKILL)
    assert process.wait(120) == 1
    wait_for_end(cluster)


def test_command_line_without_slurm():
    done = subprocess.run(COMMAND, env={"PATH": ""}, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert INSTALL in done.stderr


def test_help_teaches():
    done = subprocess.run([*COMMAND, "--help"], capture_output=True, text=True, check=True)
    for word in ("DIR", "--nodes N", "--cpus N", "--gpus N", "sbatch", "-p high", INSTALL):
        assert word in done.stdout
