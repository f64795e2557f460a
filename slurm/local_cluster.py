"""A throw-away Slurm cluster on this machine: munged, slurmctld and one slurmd per node, all in one folder.

Nothing outside the folder is written: no systemd, no database, no cgroups, nothing under /etc. It starts in a fifth of
a second and is meant for trying out job scripts and for tests; CPUs, memory and GPUs are only pretended.

    python slurm/local_cluster.py --help

In Python:

    with LocalCluster("/tmp/slurm") as cluster:
        print(cluster.call("srun", "-N2", "hostname"))
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pwd
import random
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

INSTALL = "apt-get update && apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge"
PROGRAMS = (
    *("munged", "munge", "slurmctld", "slurmd"),
    *("sbatch", "scancel", "scontrol", "sinfo", "squeue", "srun"),
    *("bash", "setpriv", "unshare"),
)

# `sacct` needs a database that this cluster does not have, and submitit polls `sacct`: without an answer, a job that
# dies silently would be waited for forever. This stand-in asks the controller. A waiting array is "7_[0-3]".
SACCT = r"""#!/bin/sh
# Stand-in for `sacct -o JobID,State,NodeList --parsable2 -j ID [-j ID ...]`, answered by the controller.
while [ $# -gt 0 ]; do
  case "$1" in -j) ids="$ids $(echo "$2" | tr , ' ')"; shift ;; esac
  shift
done
echo "JobID|State|NodeList"
for id in $ids; do scontrol show job -o "$id" 2>/dev/null; done | awk '{
  split("", field)
  for (i = 1; i <= NF; i++) {
    at = index($i, "="); key = substr($i, 1, at - 1)
    if (at && !(key in field)) field[key] = substr($i, at + 1)
  }
  id = field["JobId"]; task = field["ArrayTaskId"]
  if (task != "") id = field["ArrayJobId"] "_" (task ~ /^[0-9]+$/ ? task : "[" task "]")
  print id "|" field["JobState"] "|" field["NodeList"]
}'
"""

# The daemons in order. As soon as one ends, so does this script, and with it all the others.
START = """\
ready() {{
    for _ in $(seq 200); do
        "$@" >/dev/null 2>&1 && return
        kill -0 $! || break
        sleep 0.05
    done
    echo "no answer from: $*" >&2
    exit 1
}}
daemon() {{ setpriv --pdeathsig KILL "$@" & }}

daemon munged -F --key-file={root}/munge/key --socket={root}/munge/socket --pid-file={root}/munge/pid \\
    --seed-file={root}/munge/seed --log-file={root}/log/munged.log
ready munge -S {root}/munge/socket -n
daemon slurmctld -D -c
ready scontrol ping
for node in {nodes}; do
    {slurmd}
done
wait -n
echo "a daemon has ended" >&2
exit 1
"""
PLAIN_SLURMD = 'daemon slurmd -D -N "$node"'
NAMESPACE_SLURMD = """\
daemon unshare --uts --mount bash -c \\
        'hostname "$0" && mount --bind {root}/etc/hosts /etc/hosts && exec slurmd -D -N "$0"' "$node"\
"""


def missing_programs() -> list[str]:
    """The programs needed but not found; empty where a cluster can be started (else `INSTALL` says how)."""
    return [name for name in PROGRAMS if shutil.which(name, path=_search_path()) is None]


def namespace_available() -> bool:
    """Whether this user may create pid, mount and host-name namespaces (CAP_SYS_ADMIN)."""
    command = ["unshare", "--pid", "--fork", "--uts", "--mount-proc", "true"]
    return subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 0


class LocalCluster:
    """A private Slurm cluster; a context manager that starts it and stops it.

    root: a new or empty folder, at most 60 characters long (Unix sockets allow 107 for the whole path), its parents
        open to everybody (munged refuses a socket below a closed folder, which rules out pytest's `tmp_path`).
    nodes, cpus, gpus: number of nodes, and pretended CPUs and GPUs of each.
    namespace: run in a pid namespace; None: where possible. There the nodes are node1, node2, ... with host names of
        their own, and whatever ends this process, SIGKILL included, ends the cluster and its jobs. Without one the
        nodes are 127.0.0.1, 127.0.0.2, ... (a node name must resolve, as it is the master address of a job), and jobs
        that are running when this process is killed by SIGKILL survive it.

    The partition `main` is the default; jobs in `high` preempt those in `main`, which then have 30 s to save their
    work. `env` is the environment that Slurm's commands need.
    """

    def __init__(
        self, root: str | Path, nodes: int = 2, cpus: int = 8, gpus: int = 2, namespace: bool | None = None
    ) -> None:
        self.root = Path(root).resolve()
        self.cpus, self.gpus = cpus, gpus
        self.namespace = namespace_available() if namespace is None else namespace
        self.nodes = [f"node{i}" if self.namespace else f"127.0.0.{i}" for i in range(1, nodes + 1)]
        self.conf = self.root / "etc" / "slurm.conf"
        self.user = pwd.getpwuid(os.getuid()).pw_name
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def env(self) -> dict[str, str]:
        """The environment for clients of this cluster; free of what an enclosing Slurm job may have set."""
        env = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "SBATCH_", "SRUN_"))}
        return {**env, "SLURM_CONF": str(self.conf), "PATH": f"{self.root / 'bin'}:{_search_path()}"}

    def start(self) -> LocalCluster:
        """Start the daemons and wait until every node is idle.

        Raises ValueError for an unsuitable root, RuntimeError with the end of the logs if a daemon fails.
        """
        self._check_root()
        self._write()
        command = ["setpriv", "--pdeathsig", "KILL", "bash", str(self.root / "bin" / "start.sh")]
        if self.namespace:
            command[3:3] = ["unshare", "--pid", "--fork", "--kill-child=SIGKILL", "--mount-proc"]
        try:
            # The parent-death signal follows the thread: start from one that lives as long as the cluster shall.
            with open(self.root / "log" / "start.log", "wb") as log:
                self._process = subprocess.Popen(
                    command,
                    env=self.env,
                    cwd=self.root,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            # sinfo sleeps for a second when there is no controller yet; ping answers at once.
            _wait_until(self._answers, 30, "the controller to answer")
            _wait_until(self._idle, 30, "the nodes to be idle")
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """End the daemons and every job at once; returns when no process is left. Logs stay in `root`."""
        if self._process is not None:
            # One signal for the whole group: a controller that outlives its nodes would requeue their jobs, and a job
            # step that outlives munged would wait for it.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None
        _wait_until(self._all_killed, 10, "the cluster's processes to end")

    def wait(self) -> None:
        """Wait for ever. Raises RuntimeError, with the end of the logs, should a daemon end."""
        assert self._process is not None, "start the cluster first"
        self._process.wait()
        raise RuntimeError(self._failure())

    def __enter__(self) -> LocalCluster:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def processes(self) -> dict[int, str]:
        """Process ids and names of this cluster's daemons, job steps and jobs. Clients such as srun do not count.

        Works for a cluster that another process has started in `root`, too.
        """
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                env = (folder / "environ").read_bytes().split(b"\0")
                name = (folder / "comm").read_text().strip()
            except OSError:
                continue
            # Whoever exports SLURM_CONF is a client, unless it is a daemon or slurmd has set its node name.
            daemon = name in ("munged", "slurmctld", "slurmscriptd", "slurmd", "slurmstepd")
            if f"SLURM_CONF={self.conf}".encode() in env and (
                daemon or any(entry.startswith(b"SLURMD_NODENAME=") for entry in env)
            ):
                found[int(folder.name)] = name
        return found

    def call(self, *command: str, cwd: str | Path | None = None, timeout: float = 30) -> str:
        """Run a client command and return what it prints. Raises RuntimeError with its message if it fails.

        The time limit is not decoration: srun waits for ever when nodes are not available.
        """
        done = subprocess.run(command, env=self.env, cwd=cwd, timeout=timeout, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{shlex.join(command)} exited with {done.returncode}:\n{done.stdout}{done.stderr}")
        return done.stdout

    def submit(self, *arguments: str, cwd: str | Path | None = None) -> int:
        """`sbatch` with these arguments, from the folder `cwd`; returns the job id."""
        return int(self.call("sbatch", "--parsable", *arguments, cwd=cwd))

    def job(self, job_id: int) -> dict[str, str]:
        """What the controller knows of a job: JobState, Restarts, ExitCode, NodeList, ..."""
        fields = self.call("scontrol", "show", "job", "--oneliner", str(job_id)).split()
        return dict(field.split("=", 1) for field in fields if "=" in field)

    def wait_for_state(self, job_id: int, *states: str, timeout: float = 300) -> str:
        """Wait until a job is in one of the states (RUNNING, COMPLETED, ...) and return that. Raises TimeoutError."""
        state = ""

        def reached() -> bool:
            nonlocal state
            state = self.job(job_id)["JobState"]
            if state == "PENDING":
                self._revive()
            return state in states

        _wait_until(reached, timeout, f"job {job_id} to be {' or '.join(states)}", lambda: f"it is {state}")
        return state

    def cancel_all(self, timeout: float = 30) -> None:
        """Cancel every job and wait until the queue is empty and the nodes are idle."""
        self.call("scancel", "--user", self.user)
        _wait_until(lambda: not self.call("squeue", "--noheader"), timeout, "the queue to be empty")
        _wait_until(self._idle, timeout, "the nodes to be idle")

    def _check_root(self) -> None:
        if len(str(self.root)) > 60:
            raise ValueError(f"{self.root} is longer than 60 characters, too long for sockets: take one under /tmp")
        self.root.mkdir(parents=True, exist_ok=True)
        if any(self.root.iterdir()):
            raise ValueError(f"{self.root} is not empty: take a new folder")
        closed = [str(parent) for parent in self.root.parents if not parent.stat().st_mode & 0o001]
        if closed:
            raise ValueError(f"{closed[-1]} is not open to everybody, as munged asks: take a folder under /tmp")
        self.root.chmod(0o755)

    def _write(self) -> None:
        for name in ("bin", "controller", "dev", "etc", "log", "munge", "run", *(f"spool/{n}" for n in self.nodes)):
            (self.root / name).mkdir(parents=True)
        (self.root / ".gitignore").write_text("*\n")
        key = self.root / "munge" / "key"
        key.touch(0o600)
        key.write_bytes(os.urandom(1024))
        # Slurm hands out GPUs only as device files; a link to one is enough, a mere count is not.
        for i in range(self.gpus):
            (self.root / "dev" / f"gpu{i}").symlink_to("/dev/null")
        self.conf.write_text(self._slurm_conf())
        devices = f"NodeName={','.join(self.nodes)} Name=gpu File={self.root}/dev/gpu[0-{self.gpus - 1}]\n"
        (self.root / "etc" / "gres.conf").write_text(devices if self.gpus else "")
        hosts = "".join(f"127.0.0.{i} {name}\n" for i, name in enumerate(self.nodes, start=2))
        (self.root / "etc" / "hosts").write_text(Path("/etc/hosts").read_text() + hosts)
        sacct = self.root / "bin" / "sacct"
        sacct.write_text(SACCT)
        sacct.chmod(0o755)
        slurmd = NAMESPACE_SLURMD.format(root=self.root) if self.namespace else PLAIN_SLURMD
        start = START.format(root=self.root, nodes=" ".join(self.nodes), slurmd=slurmd)
        (self.root / "bin" / "start.sh").write_text(start)

    def _slurm_conf(self) -> str:
        root, nodes = self.root, ",".join(self.nodes)
        host = socket.gethostname().split(".")[0]
        controller_port, *ports = _free_ports(1 + len(self.nodes))
        resources = f"CPUs={self.cpus} RealMemory=64000" + (f" Gres=gpu:{self.gpus}" if self.gpus else "")
        node_lines = "\n".join(
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} {resources}"
            for name, port in zip(self.nodes, ports, strict=True)
        )
        # - A requeued job waits until its old credentials have expired: 5 s is the least allowed, 120 s the default.
        # - FirstJobId is random, so that files named after a job of an earlier cluster are not taken for this one's.
        # - config_overrides believes the CPUs and memory above, whatever the machine has.
        # - SlurmdTimeout=0, long time-outs: on a busy machine daemons answer late, and none shall be taken for dead.
        # - preempt_send_user_signal: a job that asked for a signal (--signal) gets that one when it is preempted.
        return f"""\
ClusterName=local
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={self.user}
SlurmdUser={self.user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={root}/munge/socket,cred_expire=5
FirstJobId={random.randrange(1000, 60000)}

StateSaveLocation={root}/controller
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/slurmd.%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd.%n.log

MailProg=/bin/true
MpiDefault=none
SwitchType=switch/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none

SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
KillWait=5
CompleteWait=0
SlurmdTimeout=0
MessageTimeout=60
TCPTimeout=30
MinJobAge=3600

GresTypes=gpu
{node_lines}
PartitionName=main Nodes={nodes} Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=30
PartitionName=high Nodes={nodes} MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
"""

    def _answers(self) -> bool:
        """Whether the controller is up. Raises RuntimeError if a daemon has ended."""
        if self._process is not None and self._process.poll() is not None:
            raise RuntimeError(self._failure())
        command = ["scontrol", "ping"]
        return subprocess.run(command, env=self.env, timeout=10, capture_output=True).returncode == 0

    def _idle(self) -> bool:
        if not self._answers():
            return False
        self._revive()
        states = self.call("sinfo", "--noheader", "--Node", "--partition=main", "--format=%N %T")
        return sorted(states.splitlines()) == sorted(f"{name} idle" for name in self.nodes)

    def _revive(self) -> None:
        """Give back nodes that Slurm has drained because a step would not end.

        SIGKILL ends every process; what hung was Slurm's own supervisor of the step, as it rarely does when a job is
        requeued at the moment at which it ends.
        """
        drained = self.call("sinfo", "--noheader", "--Node", "--states=drain", "--format=%N|%E")
        for name, _, reason in {line.partition("|") for line in drained.splitlines()}:
            if reason == "Kill task failed":
                self.call("scontrol", "update", f"NodeName={name}", "State=RESUME")

    def _failure(self) -> str:
        logs = sorted((self.root / "log").glob("*.log"))
        tails = [f"--- {log}\n{log.read_text(errors='replace')[-1000:]}" for log in logs]
        return "\n".join(["the local Slurm cluster has ended", *tails])

    def _all_killed(self) -> bool:
        """SIGKILL to all that is left; True once nothing is."""
        left = self.processes()
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return not left


def _search_path() -> str:
    """PATH with the folders of the daemons, which an ordinary user's PATH lacks on Debian."""
    return ":".join(filter(None, [os.environ.get("PATH"), "/usr/sbin", "/sbin"]))


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def _wait_until(
    condition: Callable[[], bool], timeout: float, what: str, detail: Callable[[], str] = lambda: ""
) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout:g} s for {what} {detail()}".rstrip())
        time.sleep(0.05)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description="Run a throw-away Slurm cluster on this machine until Ctrl-C or SIGTERM.",
        epilog=f"""\
It prints an `export` line; paste that into another terminal, and Slurm's commands talk to this cluster:

    sinfo                                     two nodes, idle
    srun -N2 hostname                         run something on both
    sbatch -N2 --gpus-per-node=2 --cpus-per-task=8 slurm/train.sbatch --model ...
    sbatch -p high -N2 --exclusive JOB        preempt the jobs of the default partition

The daemons' logs are in DIR/log. CPUs and GPUs are pretended: ask for as many as the real cluster has, but jobs
share what this machine has. Made for Debian 12's packages (Slurm 22.05):

    {INSTALL}
""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "dir",
        metavar="DIR",
        nargs="?",
        help="new or empty folder for the cluster, kept at the end; short, and open to everybody "
        "(default: one in /tmp, removed at the end)",
    )
    parser.add_argument("--nodes", metavar="N", type=int, default=2, help="number of nodes (default: %(default)s)")
    parser.add_argument("--cpus", metavar="N", type=int, default=8, help="CPUs per node (default: %(default)s)")
    parser.add_argument("--gpus", metavar="N", type=int, default=2, help="GPUs per node (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.nodes < 1 or args.cpus < 1 or args.gpus < 0:
        parser.error("--nodes and --cpus must be at least 1, --gpus at least 0")

    missing = missing_programs()
    if missing:
        print(f"local_cluster: no {', '.join(missing)} on this machine; install: {INSTALL}", file=sys.stderr)
        return 2

    for signum in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.default_int_handler)
    root = args.dir or tempfile.mkdtemp(prefix="slurm-", dir="/tmp")
    try:
        with LocalCluster(root, args.nodes, args.cpus, args.gpus) as cluster:
            print(f"Slurm is running on {', '.join(cluster.nodes)}. In another terminal:\n")
            print(f'    export SLURM_CONF={shlex.quote(str(cluster.conf))} PATH={cluster.root}/bin:"$PATH"\n')
            print("then sinfo, srun, sbatch, ... Ctrl-C ends the cluster and its jobs.", flush=True)
            cluster.wait()
    except KeyboardInterrupt:
        return 0
    except (ValueError, RuntimeError, TimeoutError) as error:
        print(f"local_cluster: {error}", file=sys.stderr)
        return 1
    finally:
        if not args.dir:
            shutil.rmtree(root)
    return 0


if __name__ == "__main__":
    sys.exit(main())
