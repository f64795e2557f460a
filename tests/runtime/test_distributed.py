"""How processes find each other: environment variables, ports, and two hosts made of network namespaces."""

import os
import shutil
import socket
import subprocess
import sys

import pytest
from support import ROOT, SMALL_RUN

from runtime.distributed import DistInfo, _meet, port_of_job
from runtime.errors import TemporaryFailure
from utils import timedelta


def test_port_of_job_changes_with_each_restart(monkeypatch):
    ports = []
    for restart in ("0", "1", "2"):
        monkeypatch.setenv("SLURM_RESTART_COUNT", restart)
        ports.append(port_of_job("123_4"))
    assert len(set(ports)) == 3
    assert all(10_000 <= port < 30_000 for port in ports)


def test_port_that_is_taken_is_a_temporary_failure(monkeypatch):
    with socket.create_server(("", 0)) as other:
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(other.getsockname()[1]))
        with pytest.raises(TemporaryFailure, match=r"the port of 127\.0\.0\.1:\d+ is taken"):
            _meet(DistInfo(0, 2), "env://", timedelta(seconds=20))


# One host: its own network, name, and a hosts file as Debian writes it, where its own name is 127.0.1.1.
HOST = """
set -e
mount --make-rprivate /
mount --bind "$HOSTS" /etc/hosts
hostname "$NAME"
exec "$@"
"""


def run(*command):
    subprocess.run(command, check=True, capture_output=True, text=True)


@pytest.fixture
def two_hosts(tmp_path):
    """Two commands that start a process on host one and host two, which a cable joins."""
    ip, number = shutil.which("ip"), os.getpid() % 10_000
    if ip is None or os.geteuid() != 0:
        pytest.skip("needs root and iproute2 for network namespaces")
    names = [f"deb{number}a", f"deb{number}b"]
    try:
        run(ip, "netns", "add", names[0])
    except subprocess.CalledProcessError as error:
        pytest.skip(f"may not make network namespaces: {error.stderr.strip()}")
    run(ip, "netns", "add", names[1])
    try:
        run(ip, "link", "add", names[0], "type", "veth", "peer", "name", names[1])
        commands = []
        for index, name in enumerate(names, start=1):
            run(ip, "link", "set", name, "netns", name)
            run(ip, "-n", name, "addr", "add", f"10.99.0.{index}/24", "dev", name)
            for device in ("lo", name):
                run(ip, "-n", name, "link", "set", device, "up")
            hosts = tmp_path / f"hosts{index}"
            other = f"10.99.0.{3 - index} host{3 - index}"
            hosts.write_text(f"127.0.0.1 localhost\n127.0.1.1 host{index}\n{other}\n")
            inside = [
                "env",
                f"HOSTS={hosts}",
                f"NAME=host{index}",
                "unshare",
                "--mount",
                "--uts",
                "sh",
                "-c",
                HOST,
                "sh",
            ]
            commands.append([ip, "netns", "exec", name, *inside])
        yield commands
    finally:
        for name in names:
            subprocess.run([ip, "netns", "del", name], check=False)


@pytest.mark.slow
def test_two_hosts_that_take_their_names_for_loopback_train_and_evaluate(two_hosts, shared_images, tmp_path):
    folder = tmp_path / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"]
    meet = ["--master_addr=host1", "--master_port=29501"]
    env = {name: value for name, value in os.environ.items() if name != "GLOO_SOCKET_IFNAME"}
    for more in ([], ["--eval", "--resume", str(folder / "best.pth")]):
        arguments = [*SMALL_RUN, "--data_path", str(shared_images), "--dist_eval", "--output_dir", str(folder), *more]
        processes = [
            subprocess.Popen(
                [*host, *torchrun, *meet, f"--node_rank={rank}", "main.py", *arguments],
                cwd=ROOT,
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank, host in enumerate(two_hosts)
        ]
        printed = [process.communicate(timeout=600)[0] for process in processes]
        assert [process.returncode for process in processes] == [0, 0], "\n".join(printed)
        assert "* Acc@1" in printed[0]
