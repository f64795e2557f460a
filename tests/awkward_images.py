"""Awkward image files."""

import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image


def gradient(height=32, width=40):
    """(height, width, 3) uint8, brighter to the right."""
    row = np.linspace(0, 255, width).astype(np.uint8)
    return np.broadcast_to(row[None, :, None], (height, width, 3)).copy()


def write_16_bit(path: Path) -> Path:
    Image.fromarray(gradient()[..., 0].astype(np.uint16) * 257).save(path)
    return path


def write_float(path: Path) -> Path:
    Image.fromarray(gradient()[..., 0].astype(np.float32) / 255).save(path)
    return path


def write_cmyk(path: Path) -> Path:
    Image.fromarray(gradient()).convert("CMYK").save(path, quality=100)
    return path


def write_transparent(path: Path) -> Path:
    """The gradient, but the top half is fully transparent red."""
    pixels = np.dstack([gradient(), np.full((32, 40), 255, np.uint8)])
    pixels[:16] = (255, 0, 0, 0)
    Image.fromarray(pixels).save(path)
    return path


def write_palette(path: Path) -> Path:
    Image.fromarray(gradient()).quantize(256).save(path)
    return path


def write_huge(path: Path, width=20_000, height=20_000) -> Path:
    """A valid PNG of a few kB, one bit per pixel."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(9)
    row = b"\0" * (1 + -(-width // 8))
    data = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b""))
    return path


def write_tiny(path: Path) -> Path:
    Image.new("RGB", (1, 1)).save(path)
    return path


def write_text(path: Path) -> Path:
    path.write_text("no image at all")
    return path


def write_torn(path: Path) -> Path:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:3000])
    return path


REFUSED = {
    "notes.png": (write_text, "is no image"),
    "huge.png": (write_huge, "pixels"),
    "wide.png": (lambda path: write_huge(path, 20_000, 8), "20000x8"),
    "tiny.png": (write_tiny, "1x1"),
    "torn.png": (write_torn, "is no image"),
}
"""File name: how to write it, and a word of the sentence it gets."""

ACCEPTED = {
    "deep.png": write_16_bit,
    "float.tiff": write_float,
    "print.jpg": write_cmyk,
    "palette.gif": write_palette,
}
"""All of them show `gradient`."""
