"""Stop signals in single processes: from the first line to the end."""

import ast
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import ROOT, command

from runtime.preemption import PreemptionHandler

INSTALL = "from runtime.preemption import PreemptionHandler; PreemptionHandler().install()\n"
DEFAULT_SIGNALS = ["env", "--default-signal=INT,HUP"]
STOP = {"TERM": signal.SIGTERM, "INT": signal.SIGINT, "USR2": signal.SIGUSR2, "HUP": signal.SIGHUP}


def start(script, *before, **environment):
    """A Python process that runs a script; its output is read up to the line "ready"."""
    process = subprocess.Popen(
        [*(before or DEFAULT_SIGNALS), sys.executable, "-u", "-c", script],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if line == "ready\n":
            return process
    raise AssertionError(process.stderr.read())


def test_preemption_needs_the_standard_library_only():
    heavy = "{'torch', 'numpy', 'timm', 'hydra', 'omegaconf', 'submitit'}"
    script = f"import sys, runtime.preemption, runtime.submitit_job; sys.exit(bool({heavy} & set(sys.modules)))"
    assert command("-c", script).returncode == 0


@pytest.mark.parametrize("name", ["main.py", "hydra_main.py"])
def test_programs_install_the_handler_before_other_imports(name):
    _, handler, install, *_ = ast.parse((ROOT / name).read_text()).body  # after the docstring
    assert ast.unparse(handler).startswith("from runtime.preemption import PreemptionHandler")
    assert "PreemptionHandler().install()" in ast.unparse(install)


@pytest.mark.parametrize("number", STOP.values(), ids=STOP)
def test_signal_before_training_ends_the_process_with_75(number):
    process = start(INSTALL + "print('ready')\nimport time; time.sleep(600)")
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 75
    assert errors == f"-c: {number.name} before training began; nothing has changed\n"


def test_signal_ends_a_process_that_waits_in_c_code():
    script = """
import ctypes
lock, mutex = ctypes.CDLL(None).pthread_mutex_lock, ctypes.create_string_buffer(64)
lock(mutex)
print("ready")
lock(mutex)  # for ever, and no Python handler runs
"""
    process = start(INSTALL + script)
    process.send_signal(signal.SIGUSR2)
    assert process.wait(timeout=120) == 75


@pytest.mark.parametrize("name", ["INT", "HUP"])
def test_signal_that_the_parent_ignores_stays_ignored(name):
    report = f"import signal; assert signal.getsignal({int(STOP[name])}) == signal.SIG_IGN; print('ready')"
    assert start(INSTALL + report, "env", f"--ignore-signal={name}").wait(timeout=120) == 0


def test_signal_blocked_by_the_parent_is_handled():
    script = (
        "import os, signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})\nprint('ready', flush=True)\n"
    )
    script += "os.kill(os.getpid(), signal.SIGHUP)\n" + INSTALL + "import time; time.sleep(600)"
    assert start(script).wait(timeout=120) == 75


def test_forked_processes_leave_stop_signals_alone():
    script = """
import os, signal, time
child = os.fork()
if child == 0:
    for number in PreemptionHandler.SIGNALS:
        os.kill(os.getpid(), number)
    os._exit(7)
print("ready")
os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert start(INSTALL + script).wait(timeout=120) == 7


def test_signal_after_the_run_changes_nothing_until_the_process_has_ended():
    script = """
import os, signal
class Late:
    def __del__(self, kill=os.kill, pid=os.getpid(), numbers=PreemptionHandler.SIGNALS):
        for number in numbers:
            kill(pid, number)
from runtime.preemption import handle_signals
with handle_signals():
    pass
print("ready")
os.kill(os.getpid(), signal.SIGTERM)
late = Late()  # ends after the handlers at exit have run
"""
    assert start(INSTALL + script).wait(timeout=120) == 0


def test_second_run_of_a_process_begins_early_again():
    script = """
from runtime.preemption import handle_signals
for _ in range(2):
    with handle_signals():
        pass
with handle_signals():
    print("ready")
    import time; time.sleep(600)
"""
    process = start(INSTALL + script)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 75


@pytest.mark.parametrize(("launcher", "presses"), [({}, 2), ({"TORCHELASTIC_RUN_ID": "x"}, 3)])
def test_second_ctrl_c_does_not_wait(monkeypatch, launcher, presses):
    """torchrun passes the terminal's on, so that each arrives twice."""
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    handler = PreemptionHandler()
    for _ in range(presses - 1):
        handler._note(signal.SIGINT, None)
    with pytest.raises(KeyboardInterrupt):
        handler._note(signal.SIGINT, None)


def wait_until_caught(process, number):
    """Until a process has set a handler for a signal."""
    end = time.monotonic() + 120
    while time.monotonic() < end:
        status = Path(f"/proc/{process.pid}/status").read_text()
        caught = int(status.split("SigCgt:")[1].split()[0], 16)
        if caught >> (number - 1) & 1:
            return
        time.sleep(0.01)
    raise TimeoutError(status)


@pytest.mark.parametrize("number", STOP.values(), ids=STOP)
def test_launcher_signalled_before_its_ranks_start_exits_with_75(number):
    run = [*DEFAULT_SIGNALS, sys.executable, "slurm/launch.py", "--nproc_per_node=1", "main.py"]
    process = subprocess.Popen(run, cwd=ROOT, env={**os.environ, "SLURM_NODEID": "0"})
    wait_until_caught(process, signal.SIGALRM)  # the last one that it sets
    process.send_signal(number)
    assert process.wait(timeout=120) == 75
