"""Pickles and archives written opcode by opcode, as no honest program writes them."""

import io
import pickle
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch

EMPTY = b"\x80\x02}."
MAGIC = 0x1950A86A20F9469CFC6C


def in_zip(path: Path, pickled: bytes, records: dict[str, bytes] | None = None) -> Path:
    """An archive of torch.save with this pickle in it."""
    with zipfile.ZipFile(path, "w") as archive:
        contents = {"data.pkl": pickled, "byteorder": b"little", "version": b"3\n", **(records or {})}
        for name, content in contents.items():
            archive.writestr(f"x/{name}", content)
    return path


def in_legacy(path: Path, pickled: bytes) -> Path:
    """A file as torch.save wrote them before 1.6, with this pickle in it and no storages."""
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    parts = [pickle.dumps(value, protocol=2) for value in (MAGIC, 1001, system)]
    path.write_bytes(b"".join(parts) + pickled + pickle.dumps([], protocol=2))
    return path


def number(value: int) -> bytes:
    """An integer as an opcode."""
    size = value.to_bytes(16, "little", signed=True)
    return b"\x8a\x10" + size


def text(value: str) -> bytes:
    encoded = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def tensor(numel: int, size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> bytes:
    """A tensor of float32 in storage 0, which claims `numel` numbers."""
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + number(numel) + b"tQ"
    shape, steps = (b"(" + b"".join(map(number, values)) + b"t" for values in (size, stride))
    arguments = b"(" + storage + number(offset) + shape + steps + b"\x89ccollections\nOrderedDict\n)Rt"
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"R"


def item(value: bytes, key: bytes = text("model")) -> bytes:
    """A pickle of a dict with one item."""
    return b"\x80\x02}" + key + value + b"s."


def call(name: str, arguments: bytes) -> bytes:
    """A pickle with what a function returns."""
    module, _, attribute = name.rpartition(".")
    return item(f"c{module}\n{attribute}\n".encode() + arguments + b"R")


def shared(levels: int) -> bytes:
    """(x, x) of (x, x) of ...: small in the file, 2 ** levels when it is hashed."""
    return b"K\x01" + b"".join(b"q\x00h\x00\x86" for _ in range(levels))


def lists_from_outside(count: int) -> bytes:
    """Lists in one another, each filled after it was put into the one around it."""
    return b"](" + b"]" + b"]q\x01ah\x01" * count + b"e"


def pickles() -> Iterator[tuple[str, bytes]]:
    """Pickles that must be refused at once, by name."""
    deep = 200_000
    yield "key of tuples, deep", item(b"N", b"N" + b"\x85" * deep)
    yield "key of tuples, 60,000 deep", item(b"N", b"N" + b"\x85" * 60_000)
    yield "value of tuples, deep", item(b"N" + b"\x85" * deep)
    yield "key of shared tuples", item(b"N", shared(45))
    yield "set of shared tuples", call("__builtin__.set", b"]" + shared(45) + b"a\x85")
    yield "counter of shared tuples", call("collections.Counter", b"]" + shared(45) + b"a\x85")
    yield "ordered keys of shared tuples", call("collections.OrderedDict", b"]]" + shared(45) + b"aNaa\x85")
    yield "size of shared tuples", call("torch.Size", shared(45) + b"\x85")
    yield "many large keys", item(b"N", b"(" + b"K\x01" * 900 + b"t")
    yield "lists, deep", item(b"]" * deep + b"a" * (deep - 1))
    yield "lists filled from outside", item(lists_from_outside(50_000))
    yield "a list in itself", item(b"]q\x00h\x00a")
    yield "bytearray", call("builtins.bytearray", number(2**31 - 1) + b"\x85")
    yield "bytearray of Python 2", call("__builtin__.bytearray", number(2**31 - 1) + b"\x85")
    for size in (200_000_000, 10**12, 2**62):
        yield f"bytearray {size}", call("builtins.bytearray", number(size) + b"\x85")
    yield "codec", call("_codecs.encode", text("x" * 1000) + text("idna") + b"\x86")
    yield "device that is long", call("torch.device", text("cpu" * 1000) + b"\x85")
    yield "values without end", item(b"]" + b"Na" * 1_500_000)
    yield "tuples without end", item(b"(" + b"N" * 1_500_000 + b"t")
    yield "attribute of a dict", item(b"ccollections\nOrderedDict\n)R}" + text("get") + b"Nsb")
    yield "attribute of a path", item(b"cpathlib\nPosixPath\n)R}" + text("parts") + b"Nsb")
    yield "slots of options", item(b"cargparse\nNamespace\n)\x81N}" + text("__class__") + b"Ns\x86b")
    for numel, size, stride, offset in (
        (4, (4096,), (1,), 0),
        (4, (10**12,), (0,), 0),
        (4, (1, 10**6, 10**6), (0, 0, 0), 0),
        (4, (2, 2), (1000, 1), 0),
        (4, (4,), (1,), 1),
        (4, (4,), (1,), 2**60),
        (4, (4,), (-1,), 3),
        (4, (-4,), (1,), 0),
        (4, (2**62, 2**62), (1, 1), 0),
        (4, (4,), (1, 1), 0),
        (2**31, (2**31,), (1,), 0),
        (10**12, (4,), (1,), 0),
        (-4, (4,), (1,), 0),
    ):
        yield f"tensor {size} {stride} {offset} in {numel}", item(tensor(numel, size, stride, offset))
    for name in (
        "os.system",
        "builtins.eval",
        "torch.load",
        "torch.hub.load",
        "torch.Tensor",
        "numpy.core.x",
        "a\x1b[2J.b",
    ):
        yield f"global {name!r}", call(name, b")")
    for name in torch._utils.__dict__:
        if name.startswith("_rebuild") and name not in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter"):
            yield f"global {name}", call(f"torch._utils.{name}", b")")
    for size in (0, 1, 5, 50):
        yield f"noise {size}", b"\x80\x02" + bytes((37 * i * i + size) % 256 for i in range(size))


def hostile_files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Names and files, none of which may be loaded."""
    folder.mkdir()
    for count, (name, pickled) in enumerate(pickles()):
        yield f"{name}, zip", in_zip(folder / f"{count}.zip.pth", pickled, {"data/0": bytes(16)})
        yield f"{name}, legacy", in_legacy(folder / f"{count}.legacy.pth", pickled)
        plain = folder / f"{count}.plain.pth"
        plain.write_bytes(pickled)
        yield f"{name}, plain", plain
    others = {
        "zeros": bytes(30_000),
        "tar by its name": bytes(257) + b"ustar\x0000" + bytes(1000),
        "pickle and tar": b"\x80\x02" + bytes(255) + b"ustar\x0000" + bytes(1000),
        "empty archive": b"PK\x05\x06" + bytes(18),
        "gzip": b"\x1f\x8b\x08" + bytes(100),
        "xz": b"\xfd7zXZ\x00" + bytes(100),
        "empty file": b"",
        "magic only": pickle.dumps(MAGIC, protocol=2),
    }
    for name, content in others.items():
        (folder / f"{name}.pth").write_bytes(content)
        yield name, folder / f"{name}.pth"
    with open(folder / "sparse zeros.pth", "wb") as file:
        file.truncate(2 << 40)
    yield "two terabytes of zeros", folder / "sparse zeros.pth"
    twice = io.BytesIO()
    with zipfile.ZipFile(twice, "w") as archive:
        archive.writestr("x/data.pkl", EMPTY)
        archive.writestr("x/datb.pkl", call("os.system", b")"))
    (folder / "twice.pth").write_bytes(twice.getvalue().replace(b"datb.pkl", b"data.pkl"))
    yield "one name twice", folder / "twice.pth"
