"""How every curve of this project looks: `with plot_style.applied(): ...` draws and saves a figure."""

from contextlib import AbstractContextManager

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#999999")
"""Told apart by the colour-blind, too (Okabe and Ito, jfly.uni-koeln.de/color); the strongest on white first."""
SOFT = "#595959"
"""Of what is written small."""

_PARAMETERS = {
    "axes.prop_cycle": f"cycler(color={list(COLOURS)})",
    "axes.axisbelow": True,
    "axes.edgecolor": "#8C8C8C",
    "axes.grid": True,
    "axes.grid.which": "both",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "figure.constrained_layout.use": True,
    "figure.titlesize": 11,
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "grid.color": "#E0E0E0",
    "legend.fontsize": 9,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 5.5,
    "savefig.dpi": 120,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
}


def applied() -> AbstractContextManager[None]:
    """Within the block, matplotlib makes and saves figures in this style."""
    import matplotlib  # takes a second, which runs without a folder save

    return matplotlib.rc_context(_PARAMETERS)
