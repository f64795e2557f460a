"""What two real processes decide together."""

import subprocess
import sys

from support import ROOT

SCRIPT = """
import sys
from datetime import timedelta
import torch
from runtime.errors import UsageError
from runtime.agreement import check_same, decide, together
from runtime.distributed import DistInfo, process_group

rank = int(sys.argv[1])
processes = DistInfo(rank, 2)

def told(action):
    try:
        return action()
    except UsageError as error:
        return f"error: {error}"

def fail_on(failing):
    if rank == failing:
        raise UsageError(f"checkpoint {failing} is unreadable")
    return rank

with process_group(processes, torch.device("cpu"), sys.argv[2], timedelta(minutes=5)):
    print(told(lambda: decide(lambda: fail_on(1), processes)))
    print(told(lambda: decide(lambda: fail_on(0), processes)))
    print(told(lambda: together(lambda: fail_on(2), processes)))
    print(told(lambda: together(lambda: fail_on(1), processes)))
    print(told(lambda: check_same({"epoch": 3, "image": 8}, processes)))
    print(told(lambda: check_same({"epoch": 3, "image": 8 * rank}, processes)))
"""


def test_processes_decide_and_fail_together(tmp_path):
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(rank), f"file://{tmp_path}/meet"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    first, second = ([line.partition("; all")[0] for line in rank.communicate()[0].splitlines()] for rank in ranks)
    assert first == [
        "0",  # what the main process chooses, though the other could not
        "error: checkpoint 0 is unreadable",
        "0",
        "error: process 1: checkpoint 1 is unreadable",
        "None",
        "error: process 1 sees image 8, process 0 sees 0",
    ]
    assert second == [*first[:2], "1", *first[3:]]
