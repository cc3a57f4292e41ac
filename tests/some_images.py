"""Small images for tests: files in a folder, a profile, a PNG of 16 bits a channel."""

import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image


def some_image(seed: int, width: int = 40, height: int = 30, mode: str = "RGB") -> Image.Image:
    """A smooth random image, so that JPEG keeps it about as it is."""
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def write_images(folder: Path, count: int, first: int = 0) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number:04d}.png" for number in range(first, first + count)]
    for number, path in enumerate(paths, first):
        some_image(number).save(path)
    return paths


def png(
    width: int, height: int, bits: int, kind: int, rows: bytes, more: dict[bytes, bytes] | None = None
) -> bytes:
    """A PNG from its raw rows (each after a filter byte) and `more` chunks: what Pillow cannot write itself."""

    def chunk(name: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + check

    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    between = b"".join(chunk(name, content) for name, content in (more or {}).items())
    chunks = chunk(b"IHDR", header) + between + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def swapped_profile(called: bytes = b"swapped") -> bytes:
    """An ICC profile (version 2, matrix) like sRGB's, but with red and blue exchanged."""
    primaries = {  # of sRGB, adapted to D50
        b"bXYZ": (0.4361, 0.2225, 0.0139),
        b"gXYZ": (0.3851, 0.7169, 0.0971),
        b"rXYZ": (0.1431, 0.0606, 0.7141),
        b"wtpt": (0.9642, 1.0, 0.8249),
    }
    tags = {name: b"XYZ \0\0\0\0" + b"".join(map(_fixed, xyz)) for name, xyz in primaries.items()}
    gamma = b"curv\0\0\0\0" + struct.pack(">IH", 1, int(2.2 * 256))
    tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), gamma)
    name = called + b"\0"
    tags[b"desc"] = b"desc\0\0\0\0" + struct.pack(">I", len(name)) + name + bytes(78)
    tags[b"cprt"] = b"text\0\0\0\0nobody\0"
    table, content = b"", b""
    start = 128 + 4 + 12 * len(tags)
    for key, value in tags.items():
        value += bytes(-len(value) % 4)
        table += struct.pack(">4sII", key, start + len(content), len(value))
        content += value
    body = struct.pack(">I", len(tags)) + table + content
    header = struct.pack(">I4sI4s4s4s", 128 + len(body), b"test", 0x02100000, b"mntr", b"RGB ", b"XYZ ")
    header += struct.pack(">6H", 2025, 1, 1, 0, 0, 0) + b"acsp" + bytes(28)
    header += b"".join(map(_fixed, primaries[b"wtpt"]))
    return header.ljust(128, b"\0") + body


def _fixed(value: float) -> bytes:
    return struct.pack(">i", round(value * 65536))
