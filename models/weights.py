"""Weights from files that others wrote: read as data, never as code, and loaded completely or not at all."""

import argparse
import contextlib
import json
import pathlib
import pickletools
import re
import tarfile
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from timm.models import adapt_input_conv, clean_state_dict, get_pretrained_cfg
from torch import Tensor, nn

from errors import UsageError, listed

# Python 3.13 pickles paths under another module's name than the others; a path of another system cannot be made here.
SAFE_CLASSES = [
    argparse.Namespace,
    *(
        (kind, f"{module}.{name}")
        for module in ("pathlib", "pathlib._local")
        for name, kind in {
            "PosixPath": pathlib.PurePosixPath,
            "PurePosixPath": pathlib.PurePosixPath,
            "WindowsPath": pathlib.PureWindowsPath,
            "PureWindowsPath": pathlib.PureWindowsPath,
        }.items()
    ),
]
"""What a checkpoint may hold besides tensors and plain containers, as `torch.serialization.safe_globals` takes it."""

NESTS = ("model", "state_dict")
"""Where in a checkpoint the weights are."""

MODEL_OPTIONS = {
    **{"model": str, "model_kwargs": dict, "input_size": int, "data_set": str},
    **{"crop_pct": float, "interpolation": str, "mean": list, "std": list},
}
"""Options of a training, with their types, that say what its model is and what its images look like."""

LARGEST_EXPANSION = 4
"""torch.save does not compress: an archive that claims to hold more than this many times its own size is a trap."""

FOLDER_MARK = 0x10
"""The bit of an archive entry's attributes that makes it a folder."""

BLOCK = re.compile(r"stages\.(\d)\.(?:blocks\.)?(\d{1,3})\.")
FIRST_NORM = re.compile(r"stages\.(\d)\.(?:blocks\.)?0\.norm1\.(?:\w+\.)?weight")

# -- reading ------------------------------------------------------------------------------------------------------


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; nothing in it is executed. UsageError if it is not one, torn, or holds code.

    Formats: torch.save's zip archive and the plain pickle before it, and .safetensors.
    """
    path = Path(path)
    if path.is_dir():
        raise UsageError(f"checkpoint {path} is a folder; name a file in it")
    if not path.is_file():
        raise UsageError(f"checkpoint {path} does not exist")
    try:
        content = _read(path)
    except UsageError:
        raise
    except PermissionError as error:
        raise UsageError(f"checkpoint {path} may not be read: {error.strerror}") from error
    except Exception as error:
        # A damaged file makes the zip reader and the unpickler raise almost anything.
        code = _code_in(path, error)
        if code:
            raise UsageError(
                f"checkpoint {path} holds {code}, which is code, not weights; it was not loaded"
            ) from error
        raise UsageError(f"{path} is not a checkpoint, or it is damaged ({type(error).__name__})") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} holds a {type(content).__name__}, not a checkpoint")
    return content


def _read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if zipfile.is_zipfile(path):
        _check_archive(path)
    elif tarfile.is_tarfile(path):
        raise UsageError(
            f"checkpoint {path} is a tar archive; torch's tar format of 2016 cannot be read without trusting the file: "
            "if you do, read it with torch.load(weights_only=False) and save it again"
        )
    with torch.serialization.safe_globals(SAFE_CLASSES), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.load(path, map_location="cpu", weights_only=True)


def _read_safetensors(path: Path) -> dict[str, Any]:
    """The weights, with the options and class names that tools/export.py writes into the metadata if they are there."""
    weights = safetensors.torch.load_file(path)
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    described = {}
    for name in (*MODEL_OPTIONS, "classes"):
        with contextlib.suppress(KeyError, ValueError):  # of other programs, not JSON
            described[name] = json.loads(metadata[name])
    return {"model": weights, "classes": described.pop("classes", None), "args": described} if described else weights


def _check_archive(path: Path) -> None:
    """UsageError if an archive would unpack to far more than it is, or holds what torch would not notice is damaged."""
    with zipfile.ZipFile(path) as archive:
        entries, size = archive.infolist(), path.stat().st_size
        claimed = sum(entry.file_size for entry in entries)
        if claimed > LARGEST_EXPANSION * size:
            raise UsageError(f"checkpoint {path} of {size:,} bytes claims to hold {claimed:,}; it was not unpacked")
        # Of an entry marked as a folder, torch reads nothing and leaves memory as it is.
        if any(entry.external_attr & FOLDER_MARK for entry in entries):
            raise UsageError(f"checkpoint {path} is damaged: its directory lists folders")
        damaged = archive.testzip()
    if damaged is not None:
        raise UsageError(f"checkpoint {path} is damaged: the checksum of {damaged} is wrong")


def _code_in(path: Path, error: Exception) -> str | None:
    """The class or function that a file was refused for, if it was refused for one."""
    named = re.search(r"GLOBAL (\S+)", str(error))
    if named:
        return named[1]
    # torch names nothing in pickles of protocols that it does not use itself.
    harmless = ("torch.", "collections.", "argparse.Namespace", "pathlib.")
    with contextlib.suppress(Exception):
        return next((name for name in _globals_of(path) if not name.startswith(harmless)), None)
    return None


def _globals_of(path: Path) -> Iterator[str]:
    """Full names of the classes and functions that a file's first pickle refers to; not executed."""
    pickled = path.read_bytes()
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            pickled = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    strings = []
    for opcode, argument, _ in pickletools.genops(pickled):
        if opcode.name in ("GLOBAL", "INST"):
            yield argument.replace(" ", ".")
        elif opcode.name == "STACK_GLOBAL":
            yield ".".join(strings[-2:])
        elif isinstance(argument, str):
            strings.append(argument)


def weights_of(checkpoint: Mapping[str, Any], path: str | Path, ema: bool = False) -> dict[str, Tensor]:
    """The model's (or the averaged) state dict in a checkpoint of ours, of DeiT's kind, or a bare state dict.

    The prefixes that DistributedDataParallel and torch.compile put in front of names are removed.
    """
    if ema:
        weights = checkpoint.get("model_ema")
        if not isinstance(weights, dict):
            raise UsageError(f"{path} holds no averaged weights; leave out --use_ema")
    else:
        weights = next((checkpoint[key] for key in NESTS if isinstance(checkpoint.get(key), dict)), checkpoint)
    if not weights or not all(isinstance(name, str) and _is_plain(value) for name, value in weights.items()):
        expected = f"expected tensors by name, in {' or '.join(map(repr, NESTS))} or by themselves"
        raise UsageError(f"{path} holds no weights: {expected}; its keys: {_shown(checkpoint) or 'none'}")
    return clean_state_dict(weights)


def options_of(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The MODEL_OPTIONS that a checkpoint was trained with, without any that has another type.

    Authors save them as a Namespace, this project as a dictionary, some not at all.
    """
    saved = checkpoint.get("args")
    saved = vars(saved) if isinstance(saved, argparse.Namespace) else saved
    saved = saved if isinstance(saved, dict) else {}
    return {name: saved[name] for name, kind in MODEL_OPTIONS.items() if isinstance(saved.get(name), kind)}


def count_classes(weights: Mapping[str, Tensor], model: str, path: str | Path) -> int:
    """How many classes the classifier in a state dict has. UsageError if it holds none of the model's name."""
    cfg = get_pretrained_cfg(model, allow_unregistered=True)
    classifier = cfg.classifier if cfg and isinstance(cfg.classifier, str) else "head"
    weight = weights.get(f"{classifier}.weight")
    if weight is None or weight.ndim == 0:
        raise UsageError(f"{path} holds no classifier of {model} ({classifier}.weight); is it of another model?")
    return len(weight)


def _is_plain(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"


def _shown(names: Iterable[object]) -> str:
    return listed(f"{name!s:.80}" for name in names)


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
        if name.endswith("rpe_table") and name in wanted and value.shape != wanted[name].shape and value.ndim == 3:
            size = wanted[name].shape[-2:]
            value = F.interpolate(value[None].float(), size, mode="bilinear", align_corners=True)[0].to(value.dtype)
        result[name] = value
    return result


def load_to_finetune(model: nn.Module, weights: dict[str, Tensor], path: str | Path) -> list[str]:
    """Load into a model of another input size, class count or number of input channels.

    Returns the names of the tensors left as they were: a classifier of another class count stays at its initial
    value. Position tables are resampled; filters of the first layer are summed over, or repeated for, its input
    channels. UsageError if anything else does not fit.
    """
    wanted, weights = model.state_dict(), checkpoint_filter_fn(weights, model)
    cfg = getattr(model, "default_cfg", None) or {}
    classifier, first = f"{cfg.get('classifier') or 'head'}.", f"{cfg.get('first_conv')}.weight"
    if first in wanted and first in weights and weights[first].ndim == wanted[first].ndim == 4:
        weights[first] = adapt_input_conv(wanted[first].shape[1], weights[first])
    fresh = [
        name
        for name in wanted
        if name.startswith(classifier) and (name not in weights or weights[name].shape != wanted[name].shape)
    ]
    kept = {name: value for name, value in weights.items() if not name.startswith(classifier) or name in wanted}
    load_weights(model, kept | {name: wanted[name] for name in fresh}, path)
    return fresh


# -- loading strictly ---------------------------------------------------------------------------------------------


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], path: str | Path) -> None:
    """Load strictly. UsageError saying in one sentence how the weights differ, with the model left as it was."""
    check_fit(model, weights, path)
    model.load_state_dict(weights)


def check_fit(model: nn.Module, weights: Mapping[str, Tensor], path: str | Path) -> None:
    """UsageError if the weights of `path` are another model's, or not finite."""
    wanted = model.state_dict()
    name = (getattr(model, "default_cfg", None) or {}).get("architecture") or type(model).__name__
    for difference in (_names, _widths, _depths, _classes, _image_size, _shapes):
        problem = difference(weights, wanted, name)
        if problem:
            raise UsageError(f"{path}: {problem}")
    # In the model's precision, where a large double may be infinite.
    broken = [key for key, value in weights.items() if not value.to(wanted[key].dtype).isfinite().all()]
    if broken:
        raise UsageError(f"{path} is damaged, or of a run that diverged: NaN or infinity in {_shown(broken)}")


def _names(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], model: str) -> str | None:
    """Names of one side alone, apart from whole blocks by which the depths differ."""
    theirs, ours = _blocks_per_stage(found), _blocks_per_stage(wanted)

    def beyond(name: str) -> bool:
        block = BLOCK.match(name)
        return block and theirs.keys() == ours.keys() and int(block[2]) >= min(d[int(block[1])] for d in (theirs, ours))

    problems = []
    for verb, one_sided in {"lacks": wanted.keys() - found.keys(), "has": found.keys() - wanted.keys()}.items():
        names = [name for name in one_sided if not beyond(name)]
        if names:
            problems.append(f"{verb} {_shown(names)} ({listed({_place(name) for name in names})})")
    return f"checkpoint is of another model than {model}: it {' and '.join(problems)}" if problems else None


def _place(name: str) -> str:
    block = BLOCK.match(name)
    return f"stage {int(block[1]) + 1} block {int(block[2]) + 1}" if block else f"{name.split('.')[0]:.80}"


def _blocks_per_stage(names: Iterable[str]) -> dict[int, int]:
    blocks = {(int(block[1]), int(block[2])) for block in map(BLOCK.match, names) if block}
    return dict(sorted(Counter(stage for stage, _ in blocks).items()))


def _depths(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], model: str) -> str | None:
    theirs, ours = _blocks_per_stage(found), _blocks_per_stage(wanted)
    changed = [stage for stage in ours if theirs[stage] != ours[stage]]
    if not changed:
        return None
    remedy = f"pass --model_kwargs depths={_joined(theirs.values())}"
    if len(changed) == 1:
        stage, count = changed[0], theirs[changed[0]]
        blocks = f"{count} block{'s' if count > 1 else ''} in stage {stage + 1}"
        return f"checkpoint has {blocks}, {model} has {ours[stage]}: {remedy}"
    depths = _joined(theirs.values())
    return f"checkpoint has {depths} blocks in its stages, {model} has {_joined(ours.values())}: {remedy}"


def _joined(numbers: Iterable[int]) -> str:
    return ",".join(map(str, numbers))


def _widths(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], model: str) -> str | None:
    theirs, ours = (
        [len(value) for key, value in sorted(weights.items()) if FIRST_NORM.fullmatch(key) and value.ndim]
        for weights in (found, wanted)
    )
    if theirs == ours or len(theirs) != len(ours):
        return None
    return f"checkpoint has widths {_joined(theirs)}, {model} has {_joined(ours)}: choose the --model of these widths"


def _classes(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], model: str) -> str | None:
    name = "head.bias"
    if name not in wanted or found[name].ndim != 1 or len(found[name]) == len(wanted[name]):
        return None
    theirs, ours = len(found[name]), len(wanted[name])
    remedy = f"pass --num_classes {theirs}, or --finetune, which begins with a new classifier"
    return f"checkpoint has {theirs} classes, {model} has {ours}: {remedy}"


def _image_size(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], model: str) -> str | None:
    for name, value in wanted.items():
        block = BLOCK.match(name)
        if block and name.endswith("rpe_table") and found[name].ndim == 3 and found[name].shape[1:] != value.shape[1:]:
            stride = 4 * 2 ** int(block[1])  # a table of 2Q - 1 entries serves Q tokens a side
            theirs, ours = ([(side + 1) // 2 * stride for side in table.shape[1:]] for table in (found[name], value))
            sizes = (
                f"checkpoint is for images of {theirs[0]} x {theirs[1]}, {model} was built for {ours[0]} x {ours[1]}"
            )
            return f"{sizes}: pass --input_size {theirs[0]}, or --finetune, which resamples its position tables"
    return None


def _shapes(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], model: str) -> str | None:
    for name, value in wanted.items():
        theirs = found[name]
        if theirs.shape != value.shape or theirs.is_floating_point() != value.is_floating_point():
            ours = f"{list(value.shape)} of {value.dtype}"
            return f"checkpoint has {name} {list(theirs.shape)} of {theirs.dtype}, {model} has {ours}"
    return None
