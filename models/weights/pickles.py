"""Untrusted pickles, looked through before they are read.

`torch.load(weights_only=True)` runs no code of a file, but a small file can still keep it busy for ever, overflow its
stack or fill the memory. Here the opcodes of a pickle are followed without making any of its objects.
"""

import pickletools
from argparse import Namespace
from dataclasses import dataclass
from math import prod
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any, BinaryIO

import torch

from .errors import WeightsError, printable

MAX_BYTES = 64 << 20
"""Of the pickles of a checkpoint, which hold everything but the numbers in its tensors."""
MAX_OPCODES = 1_000_000
MAX_DEPTH = 100
MAX_TUPLE = 1000
"""Items in a tuple, those in tuples within it included: hashing it takes so many steps."""
MAX_KEY = 16
"""The same for a tuple that is a key."""

PATHS = {
    "PosixPath": PurePosixPath,
    "PurePosixPath": PurePosixPath,
    "WindowsPath": PureWindowsPath,
    "PureWindowsPath": PureWindowsPath,
}
# Python 3.13 pickles paths under another module's name than the others; a path of another system cannot be made here.
SAFE_CLASSES = [
    Namespace,
    *((kind, f"{module}.{name}") for module in ("pathlib", "pathlib._local") for name, kind in PATHS.items()),
]
"""What a checkpoint may hold besides tensors and plain containers, as `torch.serialization.safe_globals` takes it."""

TENSORS = ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2")
FLAT = {f"{module}.{name}" for module in ("builtins", "__builtin__") for name in ("set", "complex")}
"""Made of plain values only, like these: sets and counters hash what they are given."""
FLAT |= {"collections.Counter", "collections.OrderedDict", "torch.device"}
OTHERS = {"argparse.Namespace", "torch.Size", "torch._utils._rebuild_parameter"}
OTHERS |= {f"{module}.{name}" for module in ("pathlib", "pathlib._local") for name in PATHS}


@dataclass(slots=True, eq=False)
class Item:
    """What is known of a value on the unpickler's stack, without making it.

    value: of a string or integer; a storage's length; the name of a global, and of the one that made an object; a
    dict's key if it has but one. parts: of a tuple. size: items in a tuple and the tuples within. depth: of containers
    in one another. held: in a container.
    """

    kind: str
    value: Any = None
    parts: tuple["Item", ...] = ()
    size: int = 1
    depth: int = 0
    held: bool = False


def check_pickle(stream: BinaryIO, file_size: int) -> Any:
    """Follow one pickle to its end; returns its value if that is a string or an integer.

    WeightsError, the message to be read after the file's name, if it holds code, anything that no checkpoint needs,
    or would take too much time or memory to load.
    """
    return _Walk(file_size).run(stream)


PLAIN = Item("plain")
"""One for all values that nothing depends on."""


class _Walk:
    """The unpickler's stack, with an `Item` in place of each value."""

    def __init__(self, file_size: int) -> None:
        self.file_size = file_size
        self.stack: list[Item] = []
        self.marks: list[int] = []
        self.memo: dict[int, Item] = {}
        self.storages: dict[Any, int] = {}
        self.claimed = 0

    def run(self, stream: BinaryIO) -> Any:
        strings, unknown = ["", ""], ""
        for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
            if count == MAX_OPCODES:
                raise WeightsError(f"holds over {MAX_OPCODES:,} values besides tensors; it was not loaded")
            name = opcode.name
            if name in ("GLOBAL", "INST"):
                check_global(argument.replace(" ", "."))
            elif name == "STACK_GLOBAL":
                check_global(".".join(strings))
            elif isinstance(argument, str):
                strings = [strings[1], argument]
            # Pickles that torch does not write are only searched for code to name.
            if not unknown and not self.follow(name, argument):
                unknown = name
        if unknown:
            raise WeightsError(f"is not a checkpoint as torch.save writes it (its pickle uses {unknown})")
        return self.stack[-1].value

    def follow(self, opcode: str, argument: Any) -> bool:
        """Apply an opcode to the stack. Returns whether torch's pickles use it; torch.load knows no others."""
        match opcode:
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = self.stack[-1]
            case "BINGET" | "LONG_BINGET":
                self.stack.append(self.memo[argument])
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINUNICODE" | "SHORT_BINSTRING":
                self.stack.append(Item("plain", argument))
            case "NONE" | "NEWTRUE" | "NEWFALSE" | "BINFLOAT":
                self.stack.append(PLAIN)
            case "GLOBAL":
                self.stack.append(Item("global", argument.replace(" ", ".")))
            case "EMPTY_LIST" | "EMPTY_DICT" | "EMPTY_SET":
                self.stack.append(Item(opcode.removeprefix("EMPTY_").lower()))
            case "MARK":
                self.marks.append(len(self.stack))
            case "TUPLE":
                self.push_tuple(self.pop_to_mark())
            case "EMPTY_TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                self.push_tuple(self.pop(int(opcode[-1]) if opcode[-1].isdigit() else 0))
            case "APPEND" | "APPENDS":
                items = self.pop(1) if opcode == "APPEND" else self.pop_to_mark()
                self.hold(self.stack[-1], items)
            case "SETITEM" | "SETITEMS":
                self.set_items(self.pop(2) if opcode == "SETITEM" else self.pop_to_mark())
            case "BINPERSID":
                self.push_storage(self.stack.pop().parts)
            case "REDUCE" | "NEWOBJ":
                self.call(*self.pop(2))
            case "BUILD":
                self.set_state(*self.pop(2))
            case _:
                return opcode in ("PROTO", "STOP")
        return True

    def pop(self, count: int) -> list[Item]:
        return [self.stack.pop() for _ in range(count)][::-1]

    def pop_to_mark(self) -> list[Item]:
        return self.pop(len(self.stack) - self.marks.pop())

    def push_tuple(self, items: list[Item]) -> None:
        whole = Item("tuple", parts=tuple(items), size=1 + sum(item.size for item in items))
        if whole.size > MAX_TUPLE:
            raise WeightsError(f"holds a tuple of over {MAX_TUPLE:,} items; it was not loaded")
        self.hold(whole, items)
        self.stack.append(whole)

    def hold(self, whole: Item, items: list[Item]) -> None:
        """Put items into a container. WeightsError if that is in another one already: its depth would be wrong."""
        for item in items:
            item.held = True
            whole.depth = max(whole.depth, item.depth + 1)
        if whole.held:
            raise WeightsError("holds values within themselves; it was not loaded")
        if whole.depth > MAX_DEPTH:
            raise WeightsError(f"holds values nested over {MAX_DEPTH} deep; it was not loaded")

    def set_items(self, items: list[Item]) -> None:
        whole = self.stack[-1]
        for key in items[::2]:
            if key.size > MAX_KEY:
                raise WeightsError("holds a tuple as a key that is too large; it was not loaded")
            if whole.kind == "dict":
                whole.value = key.value if whole.value in (None, key.value) else "several"
        self.hold(whole, items)

    def push_storage(self, parts: tuple[Item, ...]) -> None:
        key, length = parts[2].value, parts[4].value
        if key not in self.storages:
            self.storages[key] = length
            self.claimed += length
        if length < 0 or self.claimed > self.file_size:
            raise WeightsError(f"of {self.file_size:,} bytes claims to hold more; it was not loaded")
        self.stack.append(Item("storage", self.storages[key]))

    def call(self, function: Item, arguments: Item) -> None:
        if function.kind != "global" or arguments.kind != "tuple":
            raise WeightsError("is not a checkpoint as torch.save writes it")
        if function.value in TENSORS:
            check_tensor(*arguments.parts[:4])
        elif function.value in FLAT and arguments.depth > 2:
            raise WeightsError(f"holds a {function.value} of containers; it was not loaded")
        self.stack.append(Item("object", function.value, size=arguments.size, depth=arguments.depth + 1))

    def set_state(self, target: Item, state: Item) -> None:
        namespace = target.kind == "object" and target.value == "argparse.Namespace"
        # nn.Module.state_dict leaves an attribute on its result.
        metadata = target.value == "collections.OrderedDict" and state.value in (None, "_metadata")
        if state.kind != "dict" or not (namespace or metadata):
            raise WeightsError(f"sets attributes of a {printable(target.value)}; it was not loaded")
        self.stack.append(target)
        self.hold(target, [state])


def check_global(name: str) -> None:
    """WeightsError unless a class or function of this name belongs into a checkpoint."""
    module, _, attribute = name.rpartition(".")
    numbers = module == "torch" and (
        attribute.endswith("Storage") or isinstance(getattr(torch, attribute, None), torch.dtype)
    )
    if numbers or name in TENSORS or name in FLAT or name in OTHERS:
        return
    if module == "torch" or module.startswith(("torch._utils", "torch._tensor", "torch.serialization")):
        raise WeightsError(f"holds {printable(name)}; only plain dense tensors on the CPU are read")
    raise WeightsError(f"holds {printable(name)}, which is code, not weights; it was not loaded")


def check_tensor(storage: Item, offset: Item, size: Item, stride: Item) -> None:
    """WeightsError unless a tensor lies within its storage and has no more elements than that."""
    sizes, strides = ([part.value for part in item.parts] for item in (size, stride))
    numbers = [offset.value, *sizes, *strides]
    if storage.kind != "storage" or len(sizes) != len(strides) or not all(isinstance(n, int) for n in numbers):
        raise WeightsError("is not a checkpoint as torch.save writes it")
    last = offset.value + sum((n - 1) * step for n, step in zip(sizes, strides, strict=True))
    elements = prod(sizes)
    if min(numbers) < 0 or elements > storage.value or (elements and last >= storage.value):
        raise WeightsError(f"claims a tensor of shape {printable(sizes)} in {storage.value:,} numbers")
