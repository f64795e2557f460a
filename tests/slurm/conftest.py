"""A real Slurm cluster for every test in this folder: ask for `cluster`."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from slurm.local_cluster import INSTALL, LocalCluster, missing_programs

HERE = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("slurm")
            item.add_marker(pytest.mark.xdist_group("slurm"))  # all share one cluster


@pytest.fixture(scope="session")
def slurm_installed() -> None:
    missing = missing_programs()
    if missing:
        pytest.skip(f"no {', '.join(missing)}; install: {INSTALL}")


@pytest.fixture(scope="session")
def cluster(slurm_installed: None) -> Iterator[LocalCluster]:
    """Two nodes with 8 CPUs and 2 GPUs each (pretended). One cluster for all tests; each finds it empty."""
    root = tempfile.mkdtemp(prefix="slurm-", dir="/tmp")  # tmp_path is too long, and closed to munged
    with LocalCluster(root) as running:
        yield running
    assert running.processes() == {}
    shutil.rmtree(root)


@pytest.fixture(autouse=True)
def _leave_no_job_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "cluster" in request.fixturenames:
        request.getfixturevalue("cluster").cancel_all()


@pytest.fixture
def short_root() -> Iterator[Path]:
    """A folder for a cluster that a test starts by itself."""
    root = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    root.chmod(0o755)  # munged refuses a socket below a closed folder
    yield root
    shutil.rmtree(root, ignore_errors=True)
