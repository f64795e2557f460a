"""Ends of a run that need no traceback."""

import os
import subprocess
import sys

from support import ROOT


def run(script):
    return subprocess.run(
        [
            sys.executable,
            "-c",
            f"import sys; from runtime import errors; errors.exit_on_error('x', lambda: {script})",
            b"bad\xff",
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONUTF8": "1", "PYTHONIOENCODING": "utf-8:strict"},
        capture_output=True,
        check=False,
    )


def test_exit_on_error_prints_names_that_are_not_utf8_escaped():
    done = run("print(sys.argv[1])")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"bad\\udcff\n", b"")


def test_exit_on_error_says_in_a_line_that_a_name_is_not_utf8():
    done = run("sys.argv[1].encode()")
    remedy = "libraries that the program writes with need names in UTF-8; choose another"
    assert done.returncode == 2
    assert done.stderr.decode() == f"x: error: 'bad\\udcff' is not UTF-8; {remedy}\n"


def test_exit_on_error_hides_no_other_encoding_error():
    assert b"Traceback" in run("'ü'.encode('ascii')").stderr
