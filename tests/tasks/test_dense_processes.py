"""Segmentation and detection by several processes."""

import json

import pytest
from dense_cases import HEADS, SMALL
from support import command

from runtime.checkpoint import LAST
from tools import make_shapes

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("head", ["semantic_fpn", "retinanet", "mask_rcnn"])
def test_figures_do_not_depend_on_the_number_of_processes(tmp_path, head):
    make_shapes.write(tmp_path / "data", train=8, val=5, size=64)

    def launch(processes, *argv):
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "main.py"]
        run = [*SMALL, *HEADS[head], "--head", head, "--data_path", tmp_path / "data", *argv]
        done = command(*torchrun, *run, "--dist_eval", timeout=900)
        assert done.returncode == 0, done.stderr
        return [line for line in done.stdout.splitlines() if line.startswith("* ")]

    trained = launch(2, "--output_dir", tmp_path / "run")
    assert len((tmp_path / "run" / "log.txt").read_text().splitlines()) == 2
    assert json.loads((tmp_path / "run" / "log.txt").read_text().splitlines()[-1])["train_loss"] > 0
    alone = launch(1, "--eval", "--resume", tmp_path / "run" / LAST)
    assert alone
    assert all(line.endswith(" on 5 images") for line in alone)
    assert trained[-len(alone) :] == alone
    assert launch(3, "--eval", "--resume", tmp_path / "run" / LAST) == alone
