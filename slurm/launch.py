"""Starts one rank per GPU of this node: torchrun, made fit for jobs that are interrupted and run again.

srun starts this once per node; see train.sbatch. Arguments are torchrun's, then the script and its arguments:

    srun python slurm/launch.py --nnodes=2 --nproc_per_node=8 --master_addr=... --master_port=... main.py ...

Slurm signals every process of a job step, and a rank that has saved its work says so with its exit code. torchrun by
itself loses both: SIGUSR2 kills it, SIGTERM makes it exit with 1, and so does any exit code of a rank. Here, SIGTERM
and SIGUSR2 are the ranks' business, and the exit code is that of the first rank that failed (128 + n for signal n).
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Run torchrun as this job step's task on node SLURM_NODEID; returns the exit code."""
    for signum in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(signum, lambda *_: None)  # not SIG_IGN, which the ranks would inherit

    os.environ.setdefault("OMP_NUM_THREADS", "1")  # torchrun's own choice, less its warning
    # Imported only now, because it takes seconds, and a signal may come.
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        run.main(["--node_rank", os.environ["SLURM_NODEID"], "--signals_to_handle", "SIGINT", *argv])
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        if failure.exitcode != os.EX_TEMPFAIL:
            print(error, file=sys.stderr)
        return failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
