"""Ends of a run that need no traceback."""

import os
import subprocess
import sys

from support import ROOT


def test_exit_on_error_prints_names_that_are_not_utf8_escaped():
    script = "import sys, errors; errors.exit_on_error('x', lambda: print(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", script, b"bad\xff"],
        cwd=ROOT,
        env={**os.environ, "PYTHONUTF8": "1", "PYTHONIOENCODING": "utf-8:strict"},
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"bad\\udcff\n", b"")
