"""The counts are those of the published architectures."""

import pytest
import timm
import torch
from support import ROOT

from benchmarks.model_table import PUBLISHED, count_macs, count_parameters, model_table
from models import MODEL_NAMES

# Parameters in millions, and MACs in thousands of millions as fvcore counts them, norms included.
REFERENCE = {
    "debiformer_tiny": (21.496, 2.654),
    "debiformer_small": (44.008, 5.440),
    "debiformer_base": (95.502, 11.741),
    "biformer_tiny": (13.143, 2.228),
    "biformer_small": (25.536, 4.487),
    "biformer_base": (56.805, 9.795),
    "biformer_stl": (28.373, 4.590),
    "biformer_stl_nchw": (28.373, 4.593),
    "maxvit_stl": (28.286, 4.515),
}


@pytest.fixture(scope="module")
def rows():
    """The rows of the Markdown table by model name."""
    header, rule, *body = [[cell.strip() for cell in line.strip("|").split("|")] for line in model_table().splitlines()]
    assert set("".join(rule)) <= {"-", ":", " "}
    return {row[0]: dict(zip(header, row, strict=True)) for row in body}


def test_model_table_has_a_row_for_every_variant(rows):
    assert tuple(rows) == MODEL_NAMES
    assert set(PUBLISHED) <= set(REFERENCE)
    assert set(REFERENCE) == {*MODEL_NAMES} - {"debiformer_nano"}


def test_model_table_counts_the_architectures(rows):
    for name, (params, macs) in REFERENCE.items():
        assert rows[name]["params (M)"] == f"{params:.3f}", name
        assert 0.98 * macs < float(rows[name]["MACs (G)"]) < macs, name


def test_model_table_shows_published_figures_beside_the_counts(rows):
    top1 = {name: row["published top-1 (%)"] for name, row in rows.items()}
    assert [top1[f"debiformer_{size}"] for size in ("tiny", "small", "base", "nano")] == ["81.9", "83.9", "84.4", "-"]
    assert [top1[f"biformer_{size}"] for size in ("tiny", "small", "base")] == ["81.4", "83.8", "84.3"]
    assert [top1[name] for name in ("biformer_stl", "biformer_stl_nchw", "maxvit_stl")] == ["82.7", "-", "-"]
    assert rows["debiformer_base"]["published params (M)"] == "77"
    assert rows["debiformer_base"]["published MACs (G)"] == "11.8"


def test_model_table_is_in_the_readme():
    assert model_table() in (ROOT / "README.md").read_text()


def test_count_macs_of_a_known_convolution():
    layer = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.BatchNorm2d(8))
    layer.default_cfg = {"input_size": (3, 10, 12)}
    assert count_macs(layer) == 10 * 12 * 8 * 3 * 9
    assert count_parameters(layer) == 8 * 3 * 9 + 8 + 8 + 8


def test_count_macs_does_not_depend_on_the_device():
    """Attention counts on the meta device as on a CPU, where it runs fused."""
    with torch.device("meta"):
        outline = timm.create_model("debiformer_nano")
    assert count_macs(outline) == count_macs(timm.create_model("debiformer_nano"))
