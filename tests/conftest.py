"""Shared fixtures: small images on disk, and runs that take a second."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from support import CLASSES, SMALL_RUN, write_images

import main
from tasks.options import Options, parse_args

pytest_plugins = ["released"]
collect_ignore = ["clients"]  # they want the models installed; make test-clients runs them


def pytest_configure():
    # Processes of torch that share cores wait actively for each other; one thread each is faster.
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session")
def shared_images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    for number, name in enumerate(CLASSES):
        write_images(root / "train" / name, 12, 45 * number, seed=number)
        write_images(root / "val" / name, 5, 45 * number, seed=100 + number)
    return root


@pytest.fixture
def image_folder(shared_images, tmp_path):
    """train/ with 48 and val/ with 20 images of four classes; the test's own, to be damaged at will."""
    return Path(shutil.copytree(shared_images, tmp_path / "data"))


@pytest.fixture
def small_options(shared_images, tmp_path):
    """small_options("--epochs", "3"): the options of a small run that writes under tmp_path/run."""

    def build(*argv: str) -> Options:
        base = [*SMALL_RUN, "--data_path", str(shared_images), "--output_dir", str(tmp_path / "run")]
        return parse_args([*base, *argv])

    return build


@pytest.fixture
def run_small(small_options):
    """Runs in this process; returns the run's folder."""

    def run(*argv: str) -> Path:
        options = small_options(*argv)
        main.run(options)
        return Path(options.output_dir)

    return run
