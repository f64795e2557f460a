"""Weights brought into a model: adapted where that is meant, compared with it, and loaded completely or not at all."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.models import adapt_input_conv, clean_state_dict
from torch import Tensor, nn

from .errors import WeightsError, WeightsMismatch, listed, printable
from .reading import NESTS, NUMBERS, is_plain

BLOCK = re.compile(r"stages\.(\d)\.(?:blocks\.)?(\d{1,3})\.")
FIRST_NORM = re.compile(r"stages\.(\d)\.(?:blocks\.)?0\.norm1\.(?:\w+\.)?weight")
MAX_TABLE_SIDE = 2047
"""Entries along a position table's side for images of 4096 pixels, at stride 4."""

# -- adapting -----------------------------------------------------------------------------------------------------


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Turn a checkpoint as published into a state dict for `model`.

    Unwraps {'model': ...} and {'state_dict': ...}, strips the prefix of DistributedDataParallel, and resamples
    relative position tables bilinearly when the model was built for another image size.
    """
    state_dict = next((state_dict[key] for key in NESTS if isinstance(state_dict.get(key), dict)), state_dict)
    wanted = model.state_dict()
    result = {}
    for name, value in clean_state_dict(state_dict).items():
        if name.endswith("rpe_table") and name in wanted and _is_table(value, wanted[name]):
            size = wanted[name].shape[-2:]
            value = F.interpolate(value[None].float(), size, mode="bilinear", align_corners=True)[0].to(value.dtype)
        result[name] = value
    return result


def _is_table(value: Any, wanted: Tensor) -> bool:
    """Whether a value is a position table of the same heads as another, for other images."""
    return (
        _is_computable(value)
        and value.is_floating_point()
        and value.ndim == wanted.ndim == 3
        and len(value) == len(wanted)
        and all(1 <= side <= MAX_TABLE_SIDE for side in value.shape[1:])
        and value.shape != wanted.shape
    )


def _is_computable(value: Any) -> bool:
    return is_plain(value) and value.dtype in NUMBERS


def load_to_finetune(model: nn.Module, weights: dict[str, Tensor], path: str | Path) -> list[str]:
    """Load into a model of another input size, class count or number of input channels.

    Returns the names of the tensors left as they were: a classifier of another class count stays at its initial
    value. Position tables are resampled; filters of the first layer are summed over, or repeated for, its input
    channels. WeightsError if anything else does not fit.
    """
    wanted, weights = model.state_dict(), checkpoint_filter_fn(weights, model)
    cfg = getattr(model, "default_cfg", None) or {}
    classifier, first = f"{cfg.get('classifier') or 'head'}.", f"{cfg.get('first_conv')}.weight"
    if first in wanted and first in weights and _takes_rgb(weights[first], wanted[first]):
        weights[first] = adapt_input_conv(wanted[first].shape[1], weights[first])
    fresh = [
        name
        for name in wanted
        if name.startswith(classifier) and (name not in weights or weights[name].shape != wanted[name].shape)
    ]
    kept = {name: value for name, value in weights.items() if not name.startswith(classifier) or name in wanted}
    load_weights(model, kept | {name: wanted[name] for name in fresh}, path)
    return fresh


def _takes_rgb(value: Tensor, wanted: Tensor) -> bool:
    """Whether filters differ from others at most in their input channels, of which they have three."""
    shape = wanted.shape
    return wanted.ndim == 4 and _is_computable(value) and value.shape == (shape[0], 3, *shape[2:])


# -- loading strictly ---------------------------------------------------------------------------------------------


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], path: str | Path) -> None:
    """Load strictly. WeightsError saying in one sentence how the weights differ, with the model left as it was."""
    check_fit(model, weights, path)
    model.load_state_dict(weights)


def check_fit(model: nn.Module, weights: Mapping[str, Tensor], path: str | Path) -> None:
    """Compare weights with the model, which may be on the meta device.

    WeightsMismatch if they are another model's, WeightsError if they are not finite.
    """
    wanted = model.state_dict()
    name = (getattr(model, "default_cfg", None) or {}).get("architecture") or type(model).__name__
    for compare in (_names, _widths, _depths, _classes, _image_size, _shapes):
        difference = compare(weights, wanted, name)
        if difference:
            both = weights.keys() & wanted.keys()
            shapes = {key: (tuple(weights[key].shape), tuple(wanted[key].shape)) for key in both}
            raise WeightsMismatch(
                f"{path}: {difference.problem}",
                missing=wanted.keys() - both,
                unexpected=weights.keys() - both,
                shapes={key: pair for key, pair in shapes.items() if pair[0] != pair[1]},
                arguments=difference.arguments,
                finetuning=difference.finetuning,
            )
    # In the model's precision, where a large double may be infinite.
    broken = [key for key, value in weights.items() if not value.to(wanted[key].dtype).isfinite().all()]
    if broken:
        raise WeightsError(f"{path} is damaged, or of a run that diverged: NaN or infinity in {listed(broken)}")


def check_outline(build: Callable[[], nn.Module], weights: Mapping[str, Tensor], path: str | Path) -> None:
    """`check_fit` before a model takes any memory, so that it will not take more than its weights do."""
    with torch.device("meta"):
        model = build()
    check_fit(model, weights, path)


class _Difference(NamedTuple):
    """See `WeightsMismatch`."""

    problem: str
    arguments: dict[str, Any] | None = None
    finetuning: str = ""


def _names(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], model: str) -> _Difference | None:
    """Names of one side alone, apart from whole blocks by which the depths differ."""
    theirs, ours = _blocks_per_stage(found), _blocks_per_stage(wanted)

    def beyond(name: str) -> bool:
        block = BLOCK.match(name)
        return block and theirs.keys() == ours.keys() and int(block[2]) >= min(d[int(block[1])] for d in (theirs, ours))

    problems = []
    for verb, one_sided in {"lacks": wanted.keys() - found.keys(), "has": found.keys() - wanted.keys()}.items():
        names = [name for name in one_sided if not beyond(name)]
        if names:
            problems.append(f"{verb} {listed(names)} ({listed({_place(name) for name in names})})")
    if not problems:
        return None
    return _Difference(f"checkpoint is of another model than {model}: it {' and '.join(problems)}")


def _place(name: str) -> str:
    block = BLOCK.match(name)
    return f"stage {int(block[1]) + 1} block {int(block[2]) + 1}" if block else printable(name.split(".")[0])


def _blocks_per_stage(names: Iterable[str]) -> dict[int, int]:
    blocks = {(int(block[1]), int(block[2])) for block in map(BLOCK.match, names) if block}
    return dict(sorted(Counter(stage for stage, _ in blocks).items()))


def _depths(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], model: str) -> _Difference | None:
    theirs, ours = _blocks_per_stage(found), _blocks_per_stage(wanted)
    changed = [stage for stage in ours if theirs[stage] != ours[stage]]
    if not changed:
        return None
    problem = f"checkpoint has {_joined(theirs.values())} blocks in its stages, {model} has {_joined(ours.values())}"
    if len(changed) == 1:
        stage, count = changed[0], theirs[changed[0]]
        blocks = f"{count} block{'s' if count > 1 else ''} in stage {stage + 1}"
        problem = f"checkpoint has {blocks}, {model} has {ours[stage]}"
    return _Difference(problem, {"depths": tuple(theirs.values())})


def _joined(numbers: Iterable[int]) -> str:
    return ",".join(map(str, numbers))


def _widths(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], model: str) -> _Difference | None:
    theirs, ours = (
        [len(value) for key, value in sorted(weights.items()) if FIRST_NORM.fullmatch(key) and value.ndim]
        for weights in (found, wanted)
    )
    if theirs == ours or len(theirs) != len(ours):
        return None
    widths = f"checkpoint has widths {_joined(theirs)}, {model} has {_joined(ours)}"
    return _Difference(f"{widths}: choose the model of these widths")


def _classes(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], model: str) -> _Difference | None:
    name = "head.bias"
    if name not in wanted or found[name].ndim != 1 or len(found[name]) == len(wanted[name]):
        return None
    theirs, ours = len(found[name]), len(wanted[name])
    problem = f"checkpoint has {theirs} classes, {model} has {ours}"
    return _Difference(problem, {"num_classes": theirs}, "begins with a new classifier")


def _image_size(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], model: str) -> _Difference | None:
    for name, value in wanted.items():
        block = BLOCK.match(name)
        if block and name.endswith("rpe_table") and found[name].ndim == 3 and found[name].shape[1:] != value.shape[1:]:
            stride = 4 * 2 ** int(block[1])  # a table of 2Q - 1 entries serves Q tokens a side
            theirs, ours = ([(side + 1) // 2 * stride for side in table.shape[1:]] for table in (found[name], value))
            sizes = (
                f"checkpoint is for images of {theirs[0]} x {theirs[1]}, {model} was built for {ours[0]} x {ours[1]}"
            )
            return _Difference(sizes, {"img_size": tuple(theirs)}, "resamples its position tables")
    return None


def _shapes(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], model: str) -> _Difference | None:
    for name, value in wanted.items():
        theirs = found[name]
        same_kind = theirs.is_floating_point() == value.is_floating_point() and theirs.dtype in NUMBERS
        same_kind = same_kind and theirs.layout == torch.strided
        if theirs.shape != value.shape or not same_kind:
            ours = f"{list(value.shape)} of {value.dtype}"
            return _Difference(f"checkpoint has {name} {list(theirs.shape)} of {theirs.dtype}, {model} has {ours}")
    return None
