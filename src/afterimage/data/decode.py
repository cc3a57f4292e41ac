"""Decode an image file into one 8-bit sRGB image, or raise an error that names the file.

Also note facts about images that affect the meaning of their scores: range of values, and size.
"""

from __future__ import annotations

import contextlib
import io
import math
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int
from PIL import Image, ImageCms, UnidentifiedImageError

from afterimage.config import AfterimageError, printable_path, size_pair

VERSION = 3  # version of the decoded pixels: increase it whenever the same file decodes to other pixels
# Version in data sets' digests. It stays at 2 because version 3 of the pixels differs only for PNGs of 2, 4 or 16 bits
# with a transparent value: all other data sets keep their digests.
DIGEST_VERSION = 2
EXTENSIONS = (
    ".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".mpo", ".pbm", ".pgm", ".png", ".pnm", ".ppm",
    ".tif", ".tiff", ".webp",
)  # fmt: skip
# Formats that Pillow decodes without Ghostscript (EPS) or plugins of other packages.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "TIFF", "GIF", "BMP", "PPM", "JPEG2000", "AVIF")
MAX_PIXELS = 178_956_970  # Pillow's own limit, about 15,000 x 12,000
MAX_BYTES = 2**30
MAX_ASPECT = 16

_ORIENTATION, _BITS, _PHOTOMETRIC = 0x0112, 258, 262
_WHITE_IS_ZERO = 0
# Pillow's raw modes for PNGs whose transparent value it compares with other numbers than the file's samples: bits of a
# sample, and the factor by which Pillow scales samples.
_SCALED = {"L;2": (2, 85), "L;4": (4, 17), "I;16B": (16, 1)}
_DEEP, _LOW_BYTES = "RGB;16B", "RGB;16L"
_EXIF_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_warnings_lock = Lock()  # all threads share one warnings filter


class BadImage(AfterimageError):
    """A file that cannot be read as an image: its `name`, and the `reason`."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.reason = reason


class _Unsupported(Exception):
    """Pixels that have no agreed meaning as an image."""


def load_image(path: str | Path) -> Image.Image:
    """Read any image file as an 8-bit sRGB Pillow image.

    The EXIF orientation is applied, and transparent pixels are blended with white. 16-bit, CMYK, palette and greyscale
    images and other colour profiles are converted. Only the first frame of an animation is read.

    Raises:
        BadImage: the file is missing, unreadable, truncated, no image, or larger than 179 million pixels or 1 GiB
    """
    return decode(read_bytes(path), printable_path(path))


def error_reason(error: OSError | ValueError) -> str:
    """Return the operating system's reason for an error, without the file's name."""
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).lower()


def read_bytes(path: str | Path) -> bytes:
    """Read an image file's bytes.

    Raises:
        BadImage: it is not a regular file of 1 byte to 1 GiB, or cannot be read
    """
    path = Path(path)
    try:
        size = path.stat().st_size  # look first: opening a named pipe would block for ever
        if not path.is_file():
            raise BadImage(
                printable_path(path), f"is {'a folder' if path.is_dir() else 'not a regular file'}"
            )
        if not 0 < size <= MAX_BYTES:
            raise BadImage(printable_path(path), f"is {'larger than 1 GiB' if size else 'empty (0 bytes)'}")
        return path.read_bytes()
    except (OSError, ValueError) as error:
        raise BadImage(printable_path(path), error_reason(error)) from None


def decode(content: bytes, name: str) -> Image.Image:
    """Decode the bytes of an image file as `load_image` does.

    Raises:
        BadImage: the content cannot be decoded; the message begins with `name`
    """
    with _raise_bad_image(name):
        image = _open(content)
        packed = _raw_mode(image)
        image.load()
        turn = _EXIF_TRANSPOSES.get(_orientation(image))
        image = _rgb(image, _transparent(image, packed, content))
        return image if turn is None else image.transpose(turn)


def check_header(content: bytes, name: str) -> tuple[int, int]:
    """Return width and height in pixels as an image's header has them, before the EXIF orientation is applied.

    Damage after the header shows only when the image is decoded.

    Raises:
        BadImage: the content is not an image, or the image is too large; the message begins with `name`
    """
    with _raise_bad_image(name):
        return _open(content).size


def resize_to_cover(image: Image.Image, box: int | tuple[int, int]) -> Image.Image:
    """Resize an image with antialiased bicubic interpolation so that it just covers a box.

    An image more than 16 times as long as wide is first cut to its middle, which bounds the result for a strip one
    pixel wide.

    Args:
        image: the image
        box: `(height, width)` in pixels, or the side of a square, which becomes the image's shorter side

    Returns:
        the resized image, whose other side is rounded down as by torchvision
    """
    width, height = image.size
    short, long = min(width, height), max(width, height)
    if long > MAX_ASPECT * short:
        start, long = (long - MAX_ASPECT * short) // 2, MAX_ASPECT * short
        middle = (start, 0, start + long, height) if width > height else (0, start, width, start + long)
        image = image.crop(middle)
    (height, width), (width_now, height_now) = size_pair(box), image.size
    if height * width_now > width * height_now:
        new = (int(height * width_now / height_now), height)
    else:
        new = (width, int(width * height_now / width_now))
    return image if image.size == new else image.resize(new, Image.Resampling.BICUBIC)


@contextlib.contextmanager
def _raise_bad_image(name: str) -> Iterator[None]:
    """Raise any exception of a decoder as `BadImage` with the image's name."""
    try:
        yield
        return
    except UnidentifiedImageError:
        problem = f"is not an image in a format that is read ({', '.join(FORMATS)})"
    except Image.DecompressionBombError:
        problem = f"is too large: at most {MAX_PIXELS:,} pixels are read"
    except MemoryError:
        problem = "is too large for this machine's memory"
    except _Unsupported as error:
        problem = str(error)
    except Exception as error:  # a decoder may raise anything on a damaged file
        problem = f"is damaged: {str(error) or type(error).__name__}"
    raise BadImage(name, problem)


@contextlib.contextmanager
def _suppress_warnings() -> Iterator[None]:
    """Suppress Pillow's warnings about images above half of its size limit and about damaged metadata."""
    with _warnings_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _open(content: bytes) -> Image.Image:
    Image.init()
    known = [name for name in FORMATS if name in Image.OPEN]
    with _suppress_warnings():
        image = Image.open(io.BytesIO(content), formats=known)
    if image.width * image.height > MAX_PIXELS:
        raise Image.DecompressionBombError
    return image


def _orientation(image: Image.Image) -> int:
    try:
        with _suppress_warnings():
            orientation = image.getexif().get(_ORIENTATION)
    except Exception:  # the pixels may be sound although the metadata are damaged; viewers ignore this too
        return 1
    return orientation if isinstance(orientation, int) else 1


def _raw_mode(image: Image.Image) -> str:
    """Return Pillow's raw mode of a PNG's samples; empty for other files and for a loaded image."""
    tile = image.tile[0] if image.format == "PNG" and image.tile else ("", (), 0, "")
    return tile[3] if isinstance(tile[3], str) else tile[3][0]


def _transparent(image: Image.Image, packed: str, content: bytes) -> np.ndarray | None:
    """Find the pixels of a PNG that have the transparent value of its tRNS chunk.

    All bits of the file's samples are compared. Pillow compares grey values of 2 or 4 bits only after scaling them and
    colours of 16 bits only after cutting them to 8 bits, and it does not compare grey values of 16 bits.

    Returns:
        mask `(height, width)`; None if Pillow handles the file's transparency correctly
    """
    value = image.info.get("transparency")
    if packed in _SCALED and isinstance(value, int):
        bits, factor = _SCALED[packed]
        return np.asarray(image) == (value & (2**bits - 1)) * factor
    if packed != _DEEP or not isinstance(value, tuple):
        return None
    same = (np.asarray(image) == np.array(value) >> 8).all(2)
    if same.any():
        low = _open(content)
        low.tile = [(*tile[:3], _LOW_BYTES) for tile in low.tile]
        same &= (np.asarray(low) == np.array(value) & 255).all(2)
    return same


def _rgb(image: Image.Image, transparent: np.ndarray | None = None) -> Image.Image:
    """Convert an image of any mode to sRGB by its own colour profile, and blend transparent pixels with white."""
    profile, mode = image.info.get("icc_profile"), image.mode
    if mode.startswith("I;16") or mode in ("I", "F"):
        image = _eight_bit(image, getattr(image, "tag_v2", {}))
    if transparent is not None:
        alpha = Image.fromarray(np.where(transparent, np.uint8(0), np.uint8(255)))
        mode = "LA" if image.mode == "L" else "RGBA"
        image = Image.merge(mode, (*image.split(), alpha))
    if not image.has_transparency_data:
        return _srgb(image.convert("RGB") if mode == "P" else image, profile)
    image = image.convert("RGBA")
    alpha = image.getchannel("A")
    grey = mode in ("1", "L", "LA", "La")
    colours = _srgb(image.getchannel("R") if grey else image.convert("RGB"), profile)
    white = Image.new("RGB", image.size, "white")
    white.paste(colours, mask=alpha)
    return white


def _eight_bit(image: Image.Image, tags: Mapping[int, Any]) -> Image.Image:
    """Convert one channel of more than 8 bits to 8 bits.

    The `tags` of a TIFF give its number of bits and whether 0 is white.
    """
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if image.mode == "F":
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


def _srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    source = ImageCms.createProfile("LAB") if image.mode == "LAB" else None
    try:
        if profile and source is None:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            # Other names that contain "sRGB" do not count: profiles of linear light have such names too.
            name = ImageCms.getProfileDescription(source).strip()
            if name == "sRGB" or name.startswith(("sRGB IEC61966", "sRGB built-in")):
                source = None
        if source is not None:
            target = ImageCms.createProfile("sRGB")
            return ImageCms.profileToProfile(image, source, target, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        pass  # the profile is damaged or is for another mode: viewers ignore it too
    return image if image.mode == "RGB" else image.convert("RGB")


MAX_NARROW_RANGE = 64
"""Largest range of an image's values, of 0 to 255, that counts as narrow: a quarter of the full one, at which an error
of the same share of the contrast scores 12 dB higher. Photographs use more: the narrowest of 900 has a range of 139."""
MAX_DRAWING_LEVELS = 16
"""Largest number of different values (4 bits) for which an image counts as a mask or drawing, not a photograph."""


class ImageStatistics(NamedTuple):
    """Facts about a decoded image before it is resized.

    Attributes:
        low, high: least and greatest value of its channels, 0 to 255
        levels: number of different values
        flat: 1 if all its pixels are equal, otherwise 0
        width, height: sides in pixels
    """

    low: int
    high: int
    levels: int
    flat: int
    width: int
    height: int


def examine(image: Image.Image) -> ImageStatistics:
    """Return the facts about an RGB image."""
    used = np.array(image.histogram()).reshape(3, 256) > 0
    values = np.flatnonzero(used.any(0))
    return ImageStatistics(int(values[0]), int(values[-1]), len(values), int(used.sum() == 3), *image.size)


def value_notes(parts: Mapping[str, Int[np.ndarray, "_ 6"]]) -> list[str]:
    """Return notes on images whose range of values changes the meaning of their scores.

    Args:
        parts: `ImageStatistics` of each image, by split
    """
    low, high, levels, flat, width, height = np.concatenate(list(parts.values())).T
    span, flat = high - low, flat == 1
    narrow = ~flat & (span <= MAX_NARROW_RANGE)
    few = (
        ~flat & ~narrow & (levels <= MAX_DRAWING_LEVELS) & (width * height > 256)
    )  # smaller images have few values anyway
    notes = []
    if flat.any():
        notes.append(f"of a single colour, in which there is nothing to reconstruct: {_share(flat, parts)}")
    if narrow.any():
        gain = 20 * math.log10(255 / np.median(span[narrow]))
        notes.append(
            f"narrow range of values: {_share(narrow, parts)} use only values from {low[narrow].min()} to "
            f"{high[narrow].max()} of 0 to 255, {levels[narrow].max()} different ones an image at most. PSNR and SSIM "
            "measure against the whole range: an error that is the same share of an image's contrast scores "
            f"{gain:.0f} dB higher here, so do not compare these scores with those of other images"
        )
    if few.any():
        notes.append(
            f"few values: {_share(few, parts)} use {_range(levels[few])} of the 256 levels, as masks and drawings do"
        )
    return notes


def size_notes(parts: Mapping[str, Int[np.ndarray, " _"]], size: int) -> list[str]:
    """Return a note on images, given by shorter side in pixels and split, that are enlarged to `size`, if any are."""
    sides = np.concatenate(list(parts.values()))
    small = sides < size
    if not small.any():
        return []
    most, usual = size / sides[small].min(), size / np.median(sides[small])
    return [
        f"enlarged: {_share(small, parts)}, the side {most:.3g} times at most (median {usual:.3g}): their shorter side "
        f"has {_range(sides[small])} pixels and is made {size}"
    ]


def _share(chosen: Bool[np.ndarray, " _"], parts: Mapping[str, np.ndarray]) -> str:
    """Return a text such as `12 of 40 images (3 of 8 test images)`; `chosen` is a mask over all parts in order."""
    text = f"{chosen.sum():,} of {len(chosen):,} images"
    ends = np.cumsum([len(part) for part in parts.values()])[:-1]
    test = dict(zip(parts, np.split(chosen, ends), strict=True)).get("test")
    return (
        text if test is None or len(parts) == 1 else f"{text} ({test.sum():,} of {len(test):,} test images)"
    )


def _range(numbers: np.ndarray) -> str:
    low, high = numbers.min(), numbers.max()
    return f"{low}" if low == high else f"{low} to {high}"
