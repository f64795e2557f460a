"""Checkpoint files that are damaged, wrong or malicious, made from a good one."""

import io
import os
import pickle
import random
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import timm
import torch
from PIL import Image
from support import save_as_authors
from torch import Tensor, nn

Mutants = Iterator[tuple[str, Path]]
"""Names, for messages, and files."""


class Runs:
    """Would create the file `path` if it were unpickled without care."""

    def __init__(self, path: Path, call: object = os.system) -> None:
        self.path, self.call = path, call

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (self.call, (f"touch {self.path}",))


def mutants(folder: Path, model: nn.Module) -> Mutants:
    """Over a hundred files in a new folder, none of which is a checkpoint of `model`. Code would create folder/ran."""
    folder.mkdir()
    zipped = save_as_authors(folder / "good.pth", model).read_bytes()
    legacy = save_as_authors(folder / "good_legacy.pth", model, zipped=False).read_bytes()
    yield from damaged(folder, zipped, legacy)
    yield from misfits(folder, model.state_dict())
    yield from not_finite(folder, model.state_dict())
    yield from no_checkpoints(folder)
    yield from traps(folder, zipped, legacy)


def damaged(folder: Path, zipped: bytes, legacy: bytes) -> Mutants:
    """Cut off or changed on the way. torch's format before 1.6 has no checksums, so only cuts show in it."""
    draw = random.Random(0)
    for number in range(12):
        yield written(folder, f"truncated {number}", zipped[: draw.randrange(len(zipped))])
        yield written(folder, f"legacy truncated {number}", legacy[: draw.randrange(len(legacy))])
    places = contents_of(zipped)
    for number in range(16):
        begin, length = draw.choice(places)
        changed = bytearray(zipped)
        changed[begin + draw.randrange(length)] ^= 1 << draw.randrange(8)
        yield written(folder, f"bit flipped {number}", bytes(changed))
    half = len(zipped) // 2
    yield written(folder, "piece missing", zipped[: half - 999] + zipped[half:])
    yield written(folder, "half of it zeros", zipped[:half] + bytes(len(zipped) - half))
    marked = bytearray(zipped)
    marked[zipped.rindex(b"good/data/8") - 46 + 38] |= 0x10  # the attributes, in the directory's entry of that name
    yield written(folder, "record marked as folder", bytes(marked))
    for number, change in enumerate(({"data.pkl": None}, {"data/0": None}, {"data/0": b"\0"}, {"data.pkl": b"."})):
        path = folder / f"other records {number}.pth"
        with zipfile.ZipFile(io.BytesIO(zipped)) as old, zipfile.ZipFile(path, "w") as new:
            for entry in old.namelist():
                content = next((value for end, value in change.items() if entry.endswith(end)), old.read(entry))
                if content is not None:
                    new.writestr(entry, content)
        yield path.stem, path


def misfits(folder: Path, state: Mapping[str, Tensor]) -> Mutants:
    """Readable, but not of this model: other shapes, kinds of number, and names."""
    zero = torch.zeros
    changes = {
        "other classes": {"head.weight": zero(7, state["head.weight"].shape[1]), "head.bias": zero(7)},
        "scalar bias": {"head.bias": zero(())},
        "scalar norm": {"stages.0.0.norm1.weight": zero(())},
        "empty tensor": {"norm.weight": zero(0)},
        "transposed": {"head.weight": state["head.weight"].T},
        "table of another size": {"stages.1.0.attn2.rpe_table": zero(1, 9, 9)},
        "flat table": {"stages.1.0.attn2.rpe_table": zero(81)},
        "a trillion ones": {"norm.weight": torch.ones(1).expand(10**12)},
        "complex": {"norm.weight": state["norm.weight"].to(torch.complex64)},
        "integers": {"norm.weight": state["norm.weight"].to(torch.int64)},
        "sparse": {"norm.weight": state["norm.weight"].to_sparse()},
        "without memory": {"norm.weight": state["norm.weight"].to("meta")},
        "without head": {"head.weight": None, "head.bias": None},
        "one missing": {"stages.2.0.attn1.lepe.weight": None},
        "one besides": {"stages.0.0.gamma": zero(32)},
        "stage 10^30": {f"stages.{10**30}.0.norm1.weight": zero(32)},
        "block 10^30": {f"stages.0.{10**30}.norm1.weight": zero(32)},
        "line breaks": {"a\nTraceback\n" * 99: zero(1)},
    }
    for stage in range(4):
        gone = dict.fromkeys(name for name in state if name.startswith(f"stages.{stage}."))
        changes[f"without stage {stage + 1}"] = gone
    for name, change in changes.items():
        yield saved(folder, name, {"model": {k: v for k, v in {**state, **change}.items() if v is not None}})
    renamed = {name.replace("stages.2.0", "stages.2.7"): value for name, value in state.items()}
    yield saved(folder, "blocks renumbered", {"model": renamed})
    yield saved(folder, "another family", {"model": timm.create_model("test_resnet").state_dict()})


def not_finite(folder: Path, state: Mapping[str, Tensor]) -> Mutants:
    for value in (float("nan"), float("inf"), -float("inf"), 1e300):
        for name in ("norm.running_var", "head.weight", "stages.2.0.attn2.rpe_table"):
            changed = state[name].double()
            changed.view(-1)[-1] = value
            yield saved(folder, f"{value} in {name}", {"model": {**state, name: changed}})


def no_checkpoints(folder: Path) -> Mutants:
    """Other content, other files, and what is no file."""
    contents = {
        "list": [1], "none": None, "tensor": torch.zeros(3), "empty": {}, "no weights": {"epoch": 3},
        "text for weights": {"model": "weights"}, "nothing in model": {"model": {}},
        "numbers for names": {"model": {1: torch.zeros(1)}}, "lists for tensors": {"model": {"norm.weight": [1.0]}},
    }  # fmt: skip
    for name, content in contents.items():
        yield saved(folder, name, content)
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    files = {
        "nothing": b"", "text": b"weights", "page": b"<html>Sign in</html>", "magic of zip": b"PK\x03\x04",
        "magic of pickle": b"\x80\x02", "noise": random.Random(0).randbytes(5000), "picture": picture.getvalue(),
        "pointer of git lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 86000000\n",
    }  # fmt: skip
    for name, content in files.items():
        yield written(folder, name, content)
    (folder / "folder.pth").mkdir()
    yield "a folder", folder / "folder.pth"
    yield "nowhere", folder / "nowhere.pth"
    (folder / "loop.pth").symlink_to(folder / "loop.pth")
    yield "a link to itself", folder / "loop.pth"


def traps(folder: Path, zipped: bytes, legacy: bytes) -> Mutants:
    """Made to fill the memory or the stack of whoever reads them, or to run code there."""
    claims, place = bytearray(zipped), -1
    while (place := claims.find(b"PK\x01\x02", place + 1)) >= 0:
        struct.pack_into("<I", claims, place + 24, 0xFFFFFF00)  # the uncompressed size, in the directory's entry
    yield written(folder, "claims of 4 GB", bytes(claims))
    with zipfile.ZipFile(folder / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(30_000_000))
    yield "deflated zeros", folder / "bomb.pth"
    petabyte = legacy.replace(b"K\x04N", b"\x8a\x07" + (10**15).to_bytes(7, "little") + b"N")
    assert petabyte != legacy
    yield written(folder, "storage of a petabyte", petabyte)
    yield written(folder, "nested", b"\x80\x02" + b"]" * 99_999 + b"a" * 99_998 + b".")
    for call in (os.system, eval, exec, os.popen, getattr):
        yield saved(folder, f"code {call.__name__}", {"model": {"norm.weight": Runs(folder / "ran", call)}})
    yield saved(folder, "code in args", {"model": {}, "args": Runs(folder / "ran")})
    torch.save(Runs(folder / "ran"), folder / "code, legacy.pth", _use_new_zipfile_serialization=False)
    yield "code, legacy", folder / "code, legacy.pth"
    yield written(folder, "code, plain pickle", pickle.dumps(Runs(folder / "ran")))


def written(folder: Path, name: str, content: bytes) -> tuple[str, Path]:
    path = folder / f"{name}.pth"
    path.write_bytes(content)
    return name, path


def saved(folder: Path, name: str, content: object) -> tuple[str, Path]:
    torch.save(content, folder / f"{name}.pth")
    return name, folder / f"{name}.pth"


def contents_of(archive: bytes) -> list[tuple[int, int]]:
    """Where in an archive the contents of its records stand: begin and length."""
    places = []
    with zipfile.ZipFile(io.BytesIO(archive)) as file:
        for entry in file.infolist():
            name, extra = struct.unpack_from("<HH", archive, entry.header_offset + 26)
            places.append((entry.header_offset + 30 + name + extra, entry.compress_size))
    return [(begin, length) for begin, length in places if length]
