"""Many strings as two arrays."""

import os
from collections.abc import Iterable, Sequence

import numpy as np


class PackedPaths(Sequence[str]):
    """A sequence of paths in one block of bytes.

    A list of a million strings takes hundreds of megabytes, and every forked worker comes to copy it, because reading
    a string counts its references. This is shared, and sent to other processes in one piece.
    """

    def __init__(self, paths: Iterable[str]) -> None:
        text, ends = bytearray(), [0]
        for path in paths:
            text += os.fsencode(path)
            ends.append(len(text))
        self.text, self.ends = np.frombuffer(text, np.uint8), np.array(ends, dtype=np.int64)

    @classmethod
    def of(cls, text: np.ndarray, ends: np.ndarray) -> "PackedPaths":
        """From the `text` and `ends` of another."""
        packed = cls(())
        packed.text, packed.ends = text, ends
        return packed

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> str:
        index = range(len(self))[index]
        return os.fsdecode(bytes(self.text[self.ends[index] : self.ends[index + 1]]))
