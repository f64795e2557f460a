"""Counts of segmenters and detectors."""

import pytest
import torch
from dense_cases import HEADS, SMALL
from support import ROOT, command
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import dense
from tasks import find_task
from tasks.options import parse_args

ROWS = (ROOT / "benchmarks" / "results" / "dense.md").read_text().splitlines()


def test_every_recipe_has_a_row():
    assert [line.split("`")[1] for line in ROWS if line.startswith("| `")] == dense.NAMES
    assert len(dense.NAMES) == 12


@pytest.mark.parametrize("recipe", ["debiformer_tiny_semantic_fpn_ade20k", "debiformer_tiny_retinanet_coco"])
def test_table_is_what_the_command_prints(recipe):
    header, rule, row = dense.dense_table([recipe]).splitlines()
    assert {header, rule, row} <= set(ROWS)


def test_published_figures_are_the_papers():
    assert dense.published("debiformer_base_upernet_ade20k") == "mIoU 51.4, with --test_augment 52.0"
    assert dense.published("debiformer_small_mask_rcnn_coco") == "AP 47.5 of boxes, 42.5 of masks"
    assert dense.published("debiformer_tiny_retinanet_coco") == "-"


@pytest.mark.parametrize("head", ["upernet", "retinanet"])
def test_counts_are_those_of_a_whole_inference(head):
    task = find_task(HEADS[head][1])(parse_args([*SMALL, *HEADS[head], "--head", head, "--data_path", "."]))
    task.num_classes = 5
    model = task.build_model().eval()
    # The counter knows no operations of the fused attention that a CPU takes.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        task.forward(model, {"images": torch.zeros(1, 3, 64, 96), "labels": torch.zeros(1, 64, 96)})
    with torch.device("meta"):
        outline = task.build_model().eval()
    assert dense.count_macs(outline, (64, 96)) == counter.get_total_flops() // 2


@pytest.mark.slow
@pytest.mark.parametrize("model", ["small", "base"])
def test_detector_sees_a_large_image_within_the_memory_that_the_speed_benchmark_names(model):
    measured = dense.memory(f"debiformer_{model}_mask_rcnn_coco", (800, 1344), torch.device("cpu"))
    assert 100 < float(measured) < 3000


@pytest.mark.slow
def test_speed_and_memory_are_measured_on_request():
    recipe = "debiformer_tiny_retinanet_coco"
    printed = command("-m", "benchmarks.dense", "--measure", "--repeats", "1", "--device", "cpu", "--recipes", recipe)
    assert printed.returncode == 0, printed.stderr
    row = next(line for line in printed.stdout.splitlines() if recipe in line)
    speed, memory = (float(cell) for cell in row.strip("| ").split(" | ")[-2:])
    assert speed > 0
    assert memory > 100
    assert "images/s" in printed.stdout
