"""Starts one rank per GPU of this node: torchrun, made fit for jobs that are interrupted and run again.

srun starts this once per node; see train.sbatch. Arguments are torchrun's, then the script and its arguments:

    srun python slurm/launch.py --nnodes=2 --nproc_per_node=8 --master_addr=... --master_port=... main.py ...

Slurm signals every process of a job step, and a rank that has saved its work says so with its exit code. torchrun by
itself loses both: SIGUSR2 kills it, other signals make it end the ranks within 30 seconds, and it exits with 1 whatever
the exit code of a rank. Here, stop signals are the ranks' business, and the exit code is that of the first rank that
failed: 75 if it was stopped, 128 + n if signal n killed it.

Start it with -S, which leaves Python's site packages until signals are handled.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Sequence

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGHUP)
SECONDS_BETWEEN_SIGNALS = 5


class Forwarder:
    """Passes stop signals on to the ranks, again and again until they end; without ranks yet, ends this process.

    Slurm signals the ranks, too. But between fork and exec of a rank, a signal is lost.
    """

    def __init__(self) -> None:
        self.started = False
        self.number = signal.SIGUSR2

    def install(self) -> None:
        for number in (*STOP_SIGNALS, signal.SIGALRM):
            signal.signal(number, self.handle)
        sys.addaudithook(self.look_for_ranks)
        # In Python's own start, SIGINT would end a rank with code 1. Ranks are born with it blocked, as it is in this
        # thread; another one receives it.
        threading.Thread(target=threading.Event().wait, daemon=True).start()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})

    def look_for_ranks(self, event: str, args: tuple) -> None:
        if event == "subprocess.Popen" and "LOCAL_RANK" in (args[3] or ()):
            self.started = True

    def handle(self, number: int, *_: object) -> None:
        if not self.started:
            os._exit(os.EX_TEMPFAIL)
        if number in STOP_SIGNALS and number != signal.SIGINT:  # a second Ctrl-C would end a rank at once
            self.number = number
        with open(f"/proc/self/task/{os.getpid()}/children") as file:
            ranks = file.read().split()
        for rank in ranks:
            os.kill(int(rank), self.number)
        signal.alarm(SECONDS_BETWEEN_SIGNALS)


def main(argv: Sequence[str]) -> int:
    """Run torchrun as this job step's task on node SLURM_NODEID; returns the exit code."""
    Forwarder().install()
    if sys.flags.no_site:
        import site

        site.main()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # torchrun's own choice, less its warning
    # Imported only now, because it takes seconds, and a signal may come.
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        # torchrun shall handle none of these signals; it wants to be given one.
        run.main(["--node_rank", os.environ["SLURM_NODEID"], "--signals_to_handle", "SIGQUIT", *argv])
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        if -failure.exitcode in STOP_SIGNALS:  # it had not begun
            return os.EX_TEMPFAIL
        if failure.exitcode != os.EX_TEMPFAIL:
            print(error, file=sys.stderr)
        return failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode
    finally:
        signal.alarm(0)
    return 0


if __name__ == "__main__":
    code = main(sys.argv[1:])
    for signum in (*STOP_SIGNALS, signal.SIGALRM):  # the outcome is known
        signal.signal(signum, signal.SIG_IGN)
    sys.exit(code)
