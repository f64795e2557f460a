"""Parameters and multiply-accumulates (MACs) of every variant beside the published figures.

    python -m benchmarks.model_table
    python -m benchmarks.model_table --write README.md

MACs are half of the floating-point operations that torch counts in convolutions and matrix products of one image
at native size; normalisation, activations, softmax, pooling and grid sampling are left out. fvcore, whose counts
are often quoted, also counts five operations per element of a LayerNorm and two of a BatchNorm, and so finds 0.4 to
0.7 % more; beyond that BiFormer's counts are the same to the last digit printed, DeBiFormer's to 0.3 %.
"""

from collections.abc import Callable
from typing import NamedTuple

import timm
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models import MODEL_NAMES
from models.weights.releases import RELEASES
from runtime.errors import exit_on_error
from utils import count_parameters

from .markdown import print_or_write, table

BEGIN = "<!-- model table: python -m benchmarks.model_table -->"
END = "<!-- end of model table -->"


class Published(NamedTuple):
    """Figures of the papers: millions and thousands of millions; None where there is no paper."""

    params: float | None = None
    macs: float | None = None


PUBLISHED = {
    "debiformer_tiny": Published(21.4, 2.6),
    "debiformer_small": Published(44, 5.4),
    # The architecture that the released code names, and whose MACs match the paper's, has 95.5 M parameters.
    "debiformer_base": Published(77, 11.8),
    "biformer_tiny": Published(13, 2.2),
    "biformer_small": Published(26, 4.5),
    "biformer_base": Published(57, 9.8),
}


def count_macs(model: nn.Module, input_size: int | None = None) -> int:
    """Multiply-accumulates of one image at native size, or of a square one. On the meta device this takes no memory."""
    device = next(model.parameters()).device
    shape = model.default_cfg["input_size"] if input_size is None else (3, input_size, input_size)
    image = torch.empty(1, *shape, device=device)
    return macs_of(lambda: model.eval()(image))


@torch.no_grad()
def macs_of(action: Callable[[], object]) -> int:
    """Multiply-accumulates of the convolutions and matrix products that an action makes."""
    # Fused attention is one operation that torch counts on some devices only; unfused, it is two matrix products.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        action()
    return counter.get_total_flops() // 2


def model_table() -> str:
    """A Markdown table with one row per variant, counted here beside as published."""
    header = (
        *("model", "input", "params (M)", "MACs (G)"),
        *("published params (M)", "published MACs (G)", "published top-1 (%)"),
    )
    rows = []
    for name in MODEL_NAMES:
        with torch.device("meta"):
            model = timm.create_model(name)
        height, width = model.default_cfg["input_size"][1:]
        params, macs = f"{count_parameters(model) / 1e6:.3f}", f"{count_macs(model) / 1e9:.3f}"
        figures = (*PUBLISHED.get(name, Published()), RELEASES[name].top1 if name in RELEASES else None)
        published = ("-" if figure is None else f"{figure:g}" for figure in figures)
        rows.append((name, f"{height} x {width}", params, macs, *published))
    return table(header, rows)


def main() -> None:
    print_or_write("benchmarks.model_table", __doc__, BEGIN, END, model_table)


if __name__ == "__main__":
    exit_on_error("benchmarks.model_table", main)
