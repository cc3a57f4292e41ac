"""One picture file becomes one 8-bit sRGB picture, or an error that names the file."""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

from afterimage.config import AfterimageError, shown

VERSION = 3  # of what is kept decoded: raised whenever the same file would give other pixels
# Of a data set's digest. Version 3 of the pixels differs only where a PNG of 2, 4 or 16 bits names a transparent value,
# so that all other data sets keep their names.
DIGEST_VERSION = 2
EXTENSIONS = (".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".mpo", ".pbm", ".pgm")


EXTENSIONS += (".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp")


# Formats that Pillow decodes by itself: no Ghostscript (EPS), no plugins of other packages.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "TIFF", "GIF", "BMP", "PPM", "JPEG2000", "AVIF")
MAX_PIXELS = 178_956_970  # where Pillow refuses too: about 15,000 x 12,000
MAX_BYTES = 2**30
MAX_ASPECT = 16

_ORIENTATION, _BITS, _PHOTOMETRIC = 0x0112, 258, 262
_WHITE_IS_ZERO = 0
# How Pillow unpacks the PNGs whose transparent value it compares with other numbers than the file's samples: the bits
# of a sample, and the factor that 8-bit values are scaled by.
_SCALED = {"L;2": (2, 85), "L;4": (4, 17), "I;16B": (16, 1)}
_DEEP, _LOW_BYTES = "RGB;16B", "RGB;16L"
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_filtering = Lock()  # the warnings filter is one for all threads


class BadPicture(AfterimageError):
    """A file that cannot be read as a picture: its name and the reason."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.reason = reason


class _Unsupported(Exception):
    """Pixels that have no agreed meaning as a picture."""


def load_picture(path: str | Path) -> Image.Image:
    """Read any picture file as 8-bit sRGB (a Pillow picture of mode RGB).

    Turned as its EXIF orientation says; transparency laid on white; 16-bit, CMYK, palette and greyscale
    pictures and other colour profiles converted; of an animation the first frame. Raises an `AfterimageError`
    that names the file where it is missing, unreadable, truncated, not a picture, or larger than 179 million
    pixels or 1 GiB.
    """
    return decode(read_bytes(path), shown(path))


def reason(error: OSError | ValueError) -> str:
    """Why the operating system refused, in its own words."""
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).lower()


@contextlib.contextmanager
def open_file(path: str | Path) -> Iterator[BinaryIO]:
    """Open a picture file to read; raises `BadPicture` unless it is a regular file of 1 byte to 1 GiB."""
    path = Path(path)
    try:
        # Looked at before it is opened: opening a named pipe would wait for ever.
        path.stat()
        if not path.is_file():
            raise BadPicture(shown(path), f"is {'a folder' if path.is_dir() else 'not a regular file'}")
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if not 0 < size <= MAX_BYTES:
                raise BadPicture(shown(path), f"is {'larger than 1 GiB' if size else 'empty (0 bytes)'}")
            yield file
    except (OSError, ValueError) as error:
        raise BadPicture(shown(path), reason(error)) from None


def read_bytes(path: str | Path) -> bytes:
    with open_file(path) as file:
        return file.read(MAX_BYTES)


def decode(content: bytes, name: str) -> Image.Image:
    """Decode a picture file's content as `load_picture` does; raises `BadPicture`."""
    with _named(name):
        picture = _open(content)
        packed = _packed(picture)
        picture.load()
        turn = _TURNS.get(_orientation(picture))
        picture = _rgb(picture, _transparent(picture, packed, content))
        return picture if turn is None else picture.transpose(turn)


def check_header(content: bytes, name: str) -> tuple[int, int]:
    """Width and height as they are stored, before the picture is turned.

    Raises `BadPicture` for what is no picture or too large a one; damage further in shows when it is decoded.
    """
    with _named(name):
        return _open(content).size


def shorter_side(picture: Image.Image, size: int) -> Image.Image:
    """Resize so that the shorter side is `size`, with antialiased bicubic interpolation; aspect kept.

    The longer side is rounded down, as torchvision does. A picture more than 16 times as long as wide is cut
    to its middle first, so that a strip one pixel wide stays bounded.
    """
    width, height = picture.size
    short, long = min(width, height), max(width, height)
    if long > MAX_ASPECT * short:
        start, long = (long - MAX_ASPECT * short) // 2, MAX_ASPECT * short
        box = (start, 0, start + long, height) if width > height else (0, start, width, start + long)
        picture = picture.crop(box)
    other = int(size * long / short)
    new = (other, size) if width > height else (size, other)
    return picture if picture.size == new else picture.resize(new, Image.Resampling.BICUBIC)


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """Whatever a decoder raises as `BadPicture` with the picture's name."""
    try:
        yield
        return
    except UnidentifiedImageError:
        problem = f"is not a picture in a format that is read ({', '.join(FORMATS)})"
    except Image.DecompressionBombError:
        problem = f"is too large: at most {MAX_PIXELS:,} pixels are read"
    except MemoryError:
        problem = "is too large for this machine's memory"
    except _Unsupported as error:
        problem = str(error)
    except Exception as error:  # a decoder may raise anything on a damaged file
        problem = f"is damaged: {str(error) or type(error).__name__}"
    raise BadPicture(name, problem)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without Pillow's warnings, of half of what it refuses and of damaged metadata."""
    with _filtering, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _open(content: bytes) -> Image.Image:
    Image.init()
    known = [name for name in FORMATS if name in Image.OPEN]
    with _quiet():
        picture = Image.open(io.BytesIO(content), formats=known)
    if picture.width * picture.height > MAX_PIXELS:
        raise Image.DecompressionBombError
    return picture


def _orientation(picture: Image.Image) -> int:
    try:
        with _quiet():
            orientation = picture.getexif().get(_ORIENTATION)
    except Exception:  # damaged metadata says nothing about the pixels; viewers ignore it too
        return 1
    return orientation if isinstance(orientation, int) else 1


def _packed(picture: Image.Image) -> str:
    """How a PNG's samples are packed, in Pillow's words; empty for other files, and once it is loaded."""
    tile = picture.tile[0] if picture.format == "PNG" and picture.tile else ("", (), 0, "")
    return tile[3] if isinstance(tile[3], str) else tile[3][0]


def _transparent(picture: Image.Image, packed: str, content: bytes) -> np.ndarray | None:
    """Where a PNG has the value that its tRNS chunk calls transparent, `(height, width)`; None where Pillow sees to it.

    The file's samples are compared, all bits of them: Pillow compares a grey value of 2 or 4 bits after it was scaled,
    a colour of 16 bits after it was cut to 8, and a grey value of 16 bits not at all.
    """
    value = picture.info.get("transparency")
    if packed in _SCALED and isinstance(value, int):
        bits, factor = _SCALED[packed]
        return np.asarray(picture) == (value & (2**bits - 1)) * factor
    if packed != _DEEP or not isinstance(value, tuple):
        return None
    same = (np.asarray(picture) == np.array(value) >> 8).all(2)
    if same.any():
        low = _open(content)
        low.tile = [(*tile[:3], _LOW_BYTES) for tile in low.tile]
        same &= (np.asarray(low) == np.array(value) & 255).all(2)
    return same


def _rgb(picture: Image.Image, transparent: np.ndarray | None = None) -> Image.Image:
    """Any mode to RGB, through the picture's own colour profile, on white where it is transparent."""
    profile, mode = picture.info.get("icc_profile"), picture.mode
    if mode.startswith("I;16") or mode in ("I", "F"):
        picture = _eight_bit(picture, getattr(picture, "tag_v2", {}))
    if transparent is not None:
        alpha = Image.fromarray(np.where(transparent, np.uint8(0), np.uint8(255)))
        mode = "LA" if picture.mode == "L" else "RGBA"
        picture = Image.merge(mode, (*picture.split(), alpha))
    if not picture.has_transparency_data:
        return _srgb(picture.convert("RGB") if mode == "P" else picture, profile)
    picture = picture.convert("RGBA")
    alpha = picture.getchannel("A")
    grey = mode in ("1", "L", "LA", "La")
    colours = _srgb(picture.getchannel("R") if grey else picture.convert("RGB"), profile)
    white = Image.new("RGB", picture.size, "white")
    white.paste(colours, mask=alpha)
    return white


def _eight_bit(picture: Image.Image, tags: Mapping[int, Any]) -> Image.Image:
    """One wide channel in 8 bits. Of a TIFF, `tags` tell how many bits there are and whether 0 is white."""
    values = np.asarray(picture)
    low, high = values.min(), values.max()
    if picture.mode == "F":
        if not (low >= 0 and high <= 1):  # false for NaN too
            raise _Unsupported("has floating-point pixels outside of [0, 1], whose meaning is not known")
        return Image.fromarray((values * 255 + 0.5).astype(np.uint8))
    if low < 0 or high > 65535:
        raise _Unsupported("has 32-bit pixels outside of [0, 65535], whose meaning is not known")
    if tags.get(_BITS) == (12,):
        values = np.minimum(values.astype(np.int64) * 65535 // 4095, 65535)
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        values = 65535 - values.astype(np.int64)
    return Image.fromarray(((np.arange(65536) + 128) // 257).astype(np.uint8)[values])


def _srgb(picture: Image.Image, profile: bytes | None) -> Image.Image:
    source = ImageCms.createProfile("LAB") if picture.mode == "LAB" else None
    try:
        if profile and source is None:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            # Not every name with sRGB in it: linear light in sRGB's primaries has one too.
            name = ImageCms.getProfileDescription(source).strip()
            if name == "sRGB" or name.startswith(("sRGB IEC61966", "sRGB built-in")):
                source = None
        if source is not None:
            target = ImageCms.createProfile("sRGB")
            return ImageCms.profileToProfile(picture, source, target, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        pass  # a damaged profile, or one for other pixels than these: viewers ignore it too
    return picture if picture.mode == "RGB" else picture.convert("RGB")
