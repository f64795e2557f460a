"""Weights brought into a model: adapted where that is meant, compared with it, and loaded completely or not at all."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

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
    """Whether a value is a position table of as many heads as `wanted`, for another image size."""
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


def load_for_inference(
    model: nn.Module, weights: dict[str, Tensor], path: str | Path, resample: bool = False
) -> nn.Module:
    """Load strictly, and set the model to evaluation mode. resample: fit position tables to its image size first."""
    load_weights(model, checkpoint_filter_fn(weights, model) if resample else weights, path)
    return model.eval()


def check_fit(model: nn.Module, weights: Mapping[str, Tensor], path: str | Path) -> None:
    """Compare weights with the model, which may be on the meta device.

    WeightsMismatch if they are another model's, WeightsError if they are not finite.
    """
    wanted = model.state_dict()
    name = (getattr(model, "default_cfg", None) or {}).get("architecture") or type(model).__name__
    difference = next(_differences(weights, wanted, name), None)
    if difference is not None:
        problem, arguments, finetuning = difference
        both = weights.keys() & wanted.keys()
        shapes = {key: (tuple(weights[key].shape), tuple(wanted[key].shape)) for key in both}
        raise WeightsMismatch(
            f"{path}: {problem}",
            missing=wanted.keys() - both,
            unexpected=weights.keys() - both,
            shapes={key: pair for key, pair in shapes.items() if pair[0] != pair[1]},
            arguments=arguments,
            finetuning=finetuning,
        )
    # In the model's precision, where a large double may be infinite.
    broken = [key for key, value in weights.items() if not value.to(wanted[key].dtype).isfinite().all()]
    if broken:
        raise WeightsError(f"{path} is damaged, or of a run that diverged: NaN or infinity in {listed(broken)}")


def check_outline(build: Callable[[], nn.Module], weights: Mapping[str, Tensor], path: str | Path) -> None:
    """Run `check_fit` on a model on the meta device, so that no model is built that is larger than its weights."""
    with torch.device("meta"):
        model = build()
    check_fit(model, weights, path)


def _differences(
    found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], model: str
) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Yield what differs as `WeightsMismatch` takes it: problem, arguments, finetuning.

    Each difference is sought in weights without those before it: only the first may be asked for.
    """
    theirs, ours = _blocks_per_stage(found), _blocks_per_stage(wanted)
    problems = []
    for verb, one_sided in {"lacks": wanted.keys() - found.keys(), "has": found.keys() - wanted.keys()}.items():
        names = [name for name in one_sided if not _of_extra_block(name, theirs, ours)]
        if names:
            problems.append(f"{verb} {listed(names)} ({listed({_place(name) for name in names})})")
    if problems:
        yield f"checkpoint is of another model than {model}: it {' and '.join(problems)}", {}, ""

    widths = [
        [len(value) for key, value in sorted(weights.items()) if FIRST_NORM.fullmatch(key) and value.ndim]
        for weights in (found, wanted)
    ]
    if widths[0] != widths[1] and len(widths[0]) == len(widths[1]):
        problem = f"checkpoint has widths {_joined(widths[0])}, {model} has {_joined(widths[1])}"
        yield f"{problem}: choose the model of these widths", {}, ""

    changed = [stage for stage in ours if theirs[stage] != ours[stage]]
    if changed:
        depths = [_joined(counts.values()) for counts in (theirs, ours)]
        problem = f"checkpoint has {depths[0]} blocks in its stages, {model} has {depths[1]}"
        if len(changed) == 1:
            stage, count = changed[0], theirs[changed[0]]
            blocks = f"{count} block{'s' if count > 1 else ''} in stage {stage + 1}"
            problem = f"checkpoint has {blocks}, {model} has {ours[stage]}"
        yield problem, {"depths": tuple(theirs.values())}, ""

    bias = "head.bias"
    if bias in wanted and found[bias].ndim == 1 and len(found[bias]) != len(wanted[bias]):
        problem = f"checkpoint has {len(found[bias])} classes, {model} has {len(wanted[bias])}"
        yield problem, {"num_classes": len(found[bias])}, "begins with a new classifier"

    for name, value in wanted.items():
        block = BLOCK.match(name)
        if block and name.endswith("rpe_table") and found[name].ndim == 3 and found[name].shape[1:] != value.shape[1:]:
            stride = 4 * 2 ** int(block[1])  # a table of 2Q - 1 entries serves Q tokens a side
            (h, w), size = ([(side + 1) // 2 * stride for side in table.shape[1:]] for table in (found[name], value))
            problem = f"checkpoint is for images of {h} x {w}, {model} was built for {size[0]} x {size[1]}"
            yield problem, {"img_size": (h, w)}, "resamples its position tables"

    for name, value in wanted.items():
        other, dense = found[name], found[name].layout == torch.strided and found[name].dtype in NUMBERS
        if other.shape != value.shape or other.is_floating_point() != value.is_floating_point() or not dense:
            problem = f"checkpoint has {name} {list(other.shape)} of {other.dtype}, {model} has {list(value.shape)}"
            yield f"{problem} of {value.dtype}", {}, ""


def _blocks_per_stage(names: Iterable[str]) -> dict[int, int]:
    blocks = {(int(block[1]), int(block[2])) for block in map(BLOCK.match, names) if block}
    return dict(sorted(Counter(stage for stage, _ in blocks).items()))


def _of_extra_block(name: str, theirs: dict[int, int], ours: dict[int, int]) -> bool:
    """Whether a name belongs to a block that only one of the two models has."""
    block = BLOCK.match(name)
    if not block or theirs.keys() != ours.keys():
        return False
    return int(block[2]) >= min(theirs[int(block[1])], ours[int(block[1])])


def _place(name: str) -> str:
    block = BLOCK.match(name)
    return f"stage {int(block[1]) + 1} block {int(block[2]) + 1}" if block else printable(name.split(".")[0])


def _joined(numbers: Iterable[int]) -> str:
    return ",".join(map(str, numbers))
