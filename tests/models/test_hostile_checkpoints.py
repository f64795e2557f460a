"""Hundreds of files made to hang, crash or fill whoever reads them: each is refused in one line, at once."""

import argparse
import contextlib
import os
import resource
import subprocess
import sys

import pytest
import torch
from hostile import hostile_files, in_legacy, in_zip, item, pickles, tensor
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import ROOT, complaint

from models.weights import WeightsError, load_checkpoint, options_of, weights_of

READ_ALL = """
import resource, sys, time
from models.weights import WeightsError, load_checkpoint, weights_of
taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + {memory},) * 2)
for path in sys.stdin.read().splitlines():
    started = time.process_time()
    try:
        weights_of(load_checkpoint(path), path)
        print("LOADED", path)
    except WeightsError as error:
        assert "\\n" not in str(error) and str(error).isprintable() and "MemoryError" not in str(error), error
        print("refused", error)
    assert time.process_time() - started < 20, path
print("peak kB", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)
"""


def test_load_checkpoint_refuses_hostile_files_in_one_line_and_little_memory(tmp_path):
    files = dict(hostile_files(tmp_path / "files"))
    assert len(files) > 150
    script = READ_ALL.format(memory=600 << 20)
    done = subprocess.run(
        [sys.executable, "-c", script],
        input="\n".join(map(str, files.values())),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0, (done.returncode, done.stderr, lines[-1:])
    assert [line for line in lines if not line.startswith("refused ")] == []
    assert len(lines) == len(files)


def test_load_checkpoint_never_advises_to_trust_a_file(tmp_path):
    for name, path in hostile_files(tmp_path / "files"):
        if "zeros" in name or "tar" in name:
            message = complaint(load_checkpoint, path)
            assert "weights_only" not in message
            assert "trust" not in message


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_load_checkpoint_reads_or_refuses_pickles_changed_at_random(tmp_path, data):
    known = [pickled for _, pickled in pickles() if len(pickled) < 2000] + [item(tensor(4, (2, 2), (2, 1)))]
    pickled = bytearray(data.draw(st.sampled_from(known)))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(2, max(2, len(pickled) - 1)))
        pickled[place : place + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
    write = data.draw(st.sampled_from([in_zip, in_legacy]))
    with contextlib.suppress(WeightsError):
        checkpoint = load_checkpoint(write(tmp_path / "x.pth", bytes(pickled)))
        options_of(checkpoint)
        weights_of(checkpoint, "x.pth")


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats() | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.dictionaries(
            st.text(max_size=9) | st.integers(0, 9) | st.tuples(st.integers(0, 9), st.text(max_size=3)), inner
        )
        | st.sets(st.integers(0, 99), max_size=1)
        | st.builds(lambda value: argparse.Namespace(value=value), inner)
    ),
    max_leaves=12,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.dictionaries(st.text(max_size=9), plain), zipped=st.booleans())
def test_load_checkpoint_reads_what_honest_programs_save(tmp_path, content, zipped):
    content["state"] = torch.nn.Linear(3, 2).state_dict()  # with an attribute, as state dicts have it
    torch.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    assert repr(load_checkpoint(tmp_path / "x.pth")) == repr(content)


def test_load_checkpoint_refuses_pipes_and_devices_unread(tmp_path):
    os.mkfifo(tmp_path / "pipe.pth")
    for path in (tmp_path / "pipe.pth", "/dev/zero"):
        assert "is no regular file but a pipe or device" in complaint(load_checkpoint, path)
    assert "is empty" in complaint(load_checkpoint, "/proc/self/pagemap")
    assert "does not exist" in complaint(load_checkpoint, "a\0b")


def test_weights_of_shows_names_escaped_and_cut(tmp_path):
    torch.save({"model": {"\x1b[2J\u202e": 1}, "\x1b[2J" * 99: 1}, tmp_path / "\x1b[2J.pth")
    message = complaint(weights_of, load_checkpoint(tmp_path / "\x1b[2J.pth"), tmp_path / "\x1b[2J.pth")
    assert message.isprintable()
    assert "\\x1b[2J" in message
    assert len(message) < 500


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("crop_pct", value) for value in (float("nan"), float("inf"), -0.5, 0.0, 50.0)),
        *(("input_size", value) for value in (0, -5, 2**62)),
        ("model", "x" * 1000),
        ("data_set", "x" * 5000),
    ],
)
def test_options_of_refuses_options_that_no_training_had(name, value):
    assert f"trained with {name}=" in complaint(options_of, {"args": argparse.Namespace(**{name: value})})


def test_load_checkpoint_takes_no_more_memory_than_the_weights(tmp_path):
    torch.save({"model": {f"w{i}": torch.zeros(100) for i in range(3000)}}, tmp_path / "x.pth")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert len(weights_of(load_checkpoint(tmp_path / "x.pth"), "x.pth")) == 3000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB
