"""Parameters and multiply-accumulates (MACs) of every variant beside the published figures.

    python -m benchmarks.model_table

MACs are half of the floating-point operations that torch counts in convolutions and matrix products of one image
at native size; normalisation, activations, softmax, pooling and grid sampling are left out. fvcore, whose counts
are often quoted, also counts five operations per element of a LayerNorm and two of a BatchNorm, and so finds 0.4 to
0.7 % more (debiformer_tiny: 2.654 G, not 2.636 G); beyond that BiFormer's counts are the same to the last digit
printed, DeBiFormer's to 0.2 %.
"""

from typing import NamedTuple

import timm
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models import MODEL_NAMES


class Published(NamedTuple):
    """Figures of the papers, None where they are not known: millions, thousands of millions, percent."""

    params: float | None = None
    macs: float | None = None
    top1: float | None = None


PUBLISHED = {
    "debiformer_tiny": Published(top1=81.9),
    "debiformer_small": Published(top1=83.9),
    # The paper prints 77 M parameters; the architecture that its released code names, and whose MACs match, has 95.5 M.
    "debiformer_base": Published(params=77, macs=11.8, top1=84.4),
    "biformer_tiny": Published(top1=81.4),
    "biformer_small": Published(top1=83.8),
    "biformer_base": Published(top1=84.3),
}


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def count_macs(model: nn.Module) -> int:
    """Multiply-accumulates of one image at native size. On the meta device this takes no memory."""
    device = next(model.parameters()).device
    image = torch.empty(1, *model.default_cfg["input_size"], device=device)
    # Fused attention is one operation that torch counts on some devices only; unfused, it is two matrix products.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.eval()(image)
    return counter.get_total_flops() // 2


def model_table() -> str:
    """A Markdown table with one row per variant, counted here beside as published."""
    rows = [
        (
            "model",
            "input",
            "params (M)",
            "MACs (G)",
            "published params (M)",
            "published MACs (G)",
            "published top-1 (%)",
        ),
        ("---", *["---:"] * 6),
    ]
    for name in MODEL_NAMES:
        with torch.device("meta"):
            model = timm.create_model(name)
        height, width = model.default_cfg["input_size"][1:]
        params, macs = f"{count_parameters(model) / 1e6:.3f}", f"{count_macs(model) / 1e9:.3f}"
        published = ("-" if figure is None else f"{figure:g}" for figure in PUBLISHED.get(name, Published()))
        rows.append((name, f"{height} x {width}", params, macs, *published))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    print(model_table())
