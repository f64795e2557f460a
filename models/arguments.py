"""Which arguments a model's constructor may be given by a command line or by a file that others wrote."""

import difflib
import inspect
import math
from collections.abc import Mapping
from functools import cache
from typing import Any

import timm
import torch

from .weights.errors import printable

RESERVED = {
    *("img_size", "num_classes", "drop_rate", "drop_path_rate"),  # with an option of their own
    *("cache_dir", "checkpoint_path", "features_only", "feature_cfg", "out_indices", "model_cfg", "kwargs_filter"),
    *("scriptable", "exportable", "no_jit", "device", "dtype"),  # of timm's builders, not of its models
}
COUNTS_OF_BLOCKS = ("depth", "depths", "layers")
MAX_BLOCKS = 256
MAX_NUMBER = 8192
MAX_TEXT = 100
MAX_ITEMS = 64


@cache
def argument_names(model: str) -> frozenset[str]:
    """Names of the arguments that a model's class, or one that it derives from, declares. ValueError if unknown."""
    with torch.device("meta"):  # timm names a model's class only on the model
        kinds = type(timm.create_model(model)).__mro__
    names: set[str] = set()
    for kind in kinds:
        parameters = inspect.signature(kind.__init__).parameters.values()
        # Without a default it is between a class and the one that it derives from.
        names |= {each.name for each in parameters if each.default is not each.empty}
        if not any(each.kind == each.VAR_KEYWORD for each in parameters):
            break
    return frozenset(name for name in names - RESERVED if not name.startswith("pretrained"))


def check_arguments(model: str, arguments: Mapping[str, Any]) -> None:
    """ValueError, naming the argument, unless all are a model's own and plain values of a sensible size."""
    for name, value in arguments.items():
        known = argument_names(model)
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
            remedy = f"did you mean {close[0]}?" if close else f"it takes {', '.join(sorted(known))}"
            raise ValueError(f"it takes no argument {printable(name)}; {remedy}")
        if not _is_plain(value):
            raise ValueError(
                f"argument {name} takes a number of at most {MAX_NUMBER}, true, false, a word, or a list of up to "
                f"{MAX_ITEMS} of them, not {_shown(value)}"
            )
        counts = value if isinstance(value, list | tuple) else [value]
        if name in COUNTS_OF_BLOCKS and not 0 <= sum(n for n in counts if isinstance(n, int)) <= MAX_BLOCKS:
            raise ValueError(f"argument {name} is for at most {MAX_BLOCKS} blocks in all, not {_shown(value)}")


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return (
            len(value) <= MAX_ITEMS
            and not any(isinstance(item, list | tuple) for item in value)
            and all(map(_is_plain, value))
        )
    if isinstance(value, str):
        return len(value) <= MAX_TEXT
    if isinstance(value, int | float):
        return abs(value) <= MAX_NUMBER and math.isfinite(value)
    return value is None


def _shown(value: Any) -> str:
    simple = isinstance(value, int | float | str) or (isinstance(value, list | tuple) and len(value) <= MAX_ITEMS)
    return printable(value) if simple else f"a {type(value).__name__}"
