"""Makes runs slow, for tests of interruptions. On PYTHONPATH, Python runs it before a program's first line.

SLOW_IMPORTS=S: in a Slurm job, S/2 seconds pass before the first line, and as many at the first import of torch.
SLOW_SAVE=S: S seconds pass while a checkpoint is written, after its first bytes.
"""

import os
import sys
import time

IMPORTS = float(os.environ.get("SLOW_IMPORTS", 0)) if "SLURM_JOB_ID" in os.environ else 0.0
SAVE = float(os.environ.get("SLOW_SAVE", 0))


class Slow:
    """Watches imports; finds no module itself."""

    torch_seen = False

    def find_spec(self, name, path=None, target=None):
        if name == "torch" and not self.torch_seen:
            self.torch_seen = True
            time.sleep(IMPORTS / 2)
        if name == "runtime.checkpoint" and SAVE:
            import torch

            torch.save = slowly(torch.save)


def slowly(save):
    def save_slowly(content, file, *args, **kwargs):
        file.write(b"first bytes")
        file.flush()
        end = time.monotonic() + SAVE
        while time.monotonic() < end:
            time.sleep(0.1)
        file.seek(0)
        file.truncate()
        save(content, file, *args, **kwargs)

    return save_slowly


if IMPORTS or SAVE:
    time.sleep(IMPORTS / 2)
    sys.meta_path.insert(0, Slow())
