"""A hundred damaged, wrong or malicious checkpoints: each gives one line and exit code 2, never a traceback."""

import resource

import pytest
import timm
from mutants import mutants
from support import command, complaint, scrambled

from models import releases
from models.weights import load_checkpoint, load_to_finetune, load_weights, weights_of
from runtime.errors import exit_on_error

SMALL = {"num_classes": 4, "embed_dims": (32, 32, 32, 32), "num_heads": (1, 1, 1, 1), "offset_groups": (1, 1, 1, 1)}


@pytest.fixture(scope="module")
def model():
    return scrambled(timm.create_model("debiformer_nano", **SMALL), 1)


@pytest.fixture(scope="module")
def files(model, tmp_path_factory):
    return dict(mutants(tmp_path_factory.mktemp("mutants") / "files", model))


@pytest.fixture
def refused(capsys):
    """refused(function): the one line with which a program that calls it ends, with exit code 2."""

    def run(function):
        with pytest.raises(SystemExit) as stop:
            exit_on_error("main.py", function)
        printed, errors = capsys.readouterr()
        (line,) = errors.splitlines()
        assert stop.value.code == 2
        assert printed == ""
        return line

    return run


def test_load_weights_refuses_a_hundred_files_in_one_line_each(files, model, refused):
    assert len(files) >= 100
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for name, path in files.items():
        line = refused(lambda path=path: load_weights(model, weights_of(load_checkpoint(path), path), path))
        assert line.startswith("main.py: error: "), name
        assert str(path) in line, name
        assert len(line) < 700, name
    assert not (path.parent / "ran").exists()
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


def test_load_to_finetune_refuses_all_but_other_heads_and_tables(files, model, refused):
    adapted = {"other classes", "scalar bias", "transposed", "table of another size", "without head"}
    for name in files.keys() - adapted:
        path = files[name]
        refused(lambda path=path: load_to_finetune(model, weights_of(load_checkpoint(path), path), path))


def test_describe_fit_takes_no_memory_for_traps(files):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name in ("claims of 4 GB", "deflated zeros", "storage of a petabyte", "nested", "a trillion ones"):
        complaint(releases.describe_fit, files[name], "debiformer_nano")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


@pytest.mark.usefixtures("offline")
def test_add_takes_none_into_the_cache(files, refused, tmp_path):
    for name, path in files.items():
        refused(lambda path=path: releases.main(["add", str(path), "--model", "debiformer_tiny"]))
        assert not (tmp_path / "cache").exists(), name


@pytest.mark.parametrize("name", ["truncated 3", "code system", "claims of 4 GB", "nan in head.weight", "a folder"])
def test_main_ends_with_one_line_and_exit_code_2(files, shared_images, name):
    """As --resume of an evaluation; the model is the file's but for the name."""
    kwargs = [f"{key}={','.join(map(str, value))}" for key, value in SMALL.items() if key != "num_classes"]
    argv = ["--eval", "--model", "debiformer_nano", "--model_kwargs", *kwargs, "--input_size", "64", "--device", "cpu"]
    done = command("main.py", *argv, "--data_path", shared_images, "--num_workers", "0", "--resume", files[name])
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("main.py: error: ")
    assert str(files[name]) in line
