"""The processes of a job that hydra_main.py submits.

submitit starts each by this file, which handles stop signals before anything else is imported:

    python -S runtime/submitit_job.py -u -m submitit.core._submit FOLDER

With -S, Python leaves its site packages, which may take seconds, until then. What submitit unpickles there is `Job`;
nothing here imports torch until it runs.
"""

from __future__ import annotations

import os
import signal
import sys

if __name__ == "__main__":
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from runtime.errors import Stopped, TemporaryFailure
from runtime.preemption import PreemptionHandler

TYPE_CHECKING = False  # typing's constant, without the import
if TYPE_CHECKING:
    from typing import Any

    from submitit.core.utils import DelayedSubmission

    from runtime.options import SlurmOptions


class Job:
    """What runs in every process of a submitted job; submitit pickles it."""

    def __init__(self, options: dict[str, Any], slurm: SlurmOptions) -> None:
        self.options, self.slurm = options, slurm

    def __call__(self) -> None:
        requeue = signal.getsignal(signal.SIGUSR2)  # submitit's handler
        if PreemptionHandler.current is not None:
            PreemptionHandler.current.take_over()
        import main
        from tasks.options import options_of_task

        self._join()
        try:
            main.run(options_of_task(self.options["task"])(**self.options))
        except (Stopped, TemporaryFailure) as error:
            print(error, flush=True)
            self._hand_back(error, requeue)

    def checkpoint(self) -> DelayedSubmission:
        """submitit asks for this before it requeues the job: the same again, which goes on from its checkpoint."""
        from submitit.core.utils import DelayedSubmission

        return DelayedSubmission(self)

    def _join(self) -> None:
        """Set the environment that torchrun would: who this process is and where the others are."""
        import submitit

        from runtime.distributed import port_of_job

        job = submitit.JobEnvironment()
        port = self.slurm.master_port or port_of_job(job.job_id)
        os.environ.update(
            RANK=str(job.global_rank),
            WORLD_SIZE=str(job.num_tasks),
            LOCAL_RANK=str(job.local_rank),
            MASTER_ADDR=job.hostnames[0],
            MASTER_PORT=str(port),
        )
        if self.slurm.ddp_comm_mode == "file":
            attempt = os.environ.get("SLURM_RESTART_COUNT", "0")
            self.options["dist_url"] = f"file://{self.slurm.share_root}/{job.job_id}.{attempt}"

    def _hand_back(self, error: Stopped | TemporaryFailure, requeue: object) -> None:
        """All processes have stopped and the checkpoint is written: the job goes back to the queue.

        After its own signal, USR2, submitit does that, and counts the times; after another one, the batch script does
        it (slurm/requeue.sh), which sees exit code 75.
        """
        import submitit
        from submitit.core.utils import UncompletedJobError

        job = submitit.JobEnvironment()
        stopped_by = getattr(error, "signals", frozenset())
        if job.global_rank != 0 and stopped_by:
            sys.exit(0)  # any other code would end the main process, which still has to requeue
        if signal.SIGUSR2 in stopped_by:
            try:
                requeue(signal.SIGUSR2, None)
            except UncompletedJobError as last:
                raise UncompletedJobError(f"{last} {error}") from last
        if job.name() != "slurm":
            raise error
        sys.exit(os.EX_TEMPFAIL)


def start(argv: list[str]) -> None:
    """Run a module as `python -m` does, with stop signals handled before it is imported."""

    def early_exit(number: signal.Signals) -> int:
        local = os.environ.get("SUBMITIT_EXECUTOR") == "local"
        return 144 if local and number == signal.SIGUSR2 else os.EX_TEMPFAIL  # submitit's number for "run it again"

    PreemptionHandler(early_exit).install()
    if sys.flags.no_site:
        import site

        site.main()
    import runpy

    module, *sys.argv[1:] = argv[argv.index("-m") + 1 :]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    start(sys.argv[1:])
