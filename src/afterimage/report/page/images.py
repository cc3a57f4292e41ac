"""Saved test images of many runs, gathered once each and re-encoded to fit into one file."""

from __future__ import annotations

import base64
import hashlib
import io
import itertools
import os
from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2.utils import htmlsafe_json_dumps
from PIL import Image

from afterimage.config import AfterimageError, printable_path
from afterimage.report.rows import Row
from afterimage.runs.files import read_image
from afterimage.runtime.terminal import Progress, no_progress

QUALITY = 85
LOSSLESS_BYTES = 12_000_000
THUMBNAIL = 96
OVERHEAD = 5_000  # bytes of an image's thumbnail and other facts on the page


@dataclass(frozen=True)
class PageImage:
    """One test image: its original, and its reconstructions by the position of their run.

    `maps` holds weight maps of fusions by the position of their run, one for each source.
    """

    id: str
    original: Path
    reconstructions: dict[int, Path] = field(default_factory=dict)
    maps: dict[int, list[Path]] = field(default_factory=dict)

    @property
    def files(self) -> list[Path]:
        return [self.original, *self.reconstructions.values(), *itertools.chain(*self.maps.values())]


@dataclass(frozen=True)
class EmbeddedImages:
    """Images that a page embeds.

    `blocks[i]` holds the data URIs of `images[i]`: `original`, and `runs` and `maps` by position. `quality` is
    WebP's, or None where the files are embedded unchanged. `total` counts the images before any was left out.
    """

    total: int
    images: list[dict[str, Any]] = field(default_factory=list)
    blocks: list[dict[str, Any]] = field(default_factory=list)
    quality: int | None = None


def collect_images(rows: Sequence[Row]) -> list[PageImage]:
    """Return the images that the rows' runs saved, in the order of their first appearance.

    Rows share an image if both its id and the content of its original agree: the same id from another crop
    or data set is another image.
    """
    images: dict[tuple[str, str], PageImage] = {}
    hashes: dict[tuple[str, str], str] = {}
    for position, row in enumerate(rows):
        origin = repr([row.data.digest, row.data.resize, row.data.crop])
        maps = row.run.fusion_maps if row.fusion_weights else {}
        for id, original, reconstruction in row.run.images:
            # Hashing every run's copy would read gigabytes; one copy for each data set is enough.
            if (id, origin) not in hashes:
                hashes[id, origin] = hashlib.sha256(read_bytes(original)).hexdigest()
            page_image = images.setdefault((id, hashes[id, origin]), PageImage(id, original))
            page_image.reconstructions[position] = reconstruction
            if (own := maps.get(id)) and len(own) == len(row.sources):
                page_image.maps[position] = own
    return list(images.values())


def embed(images: Sequence[PageImage], limit: int, progress: Progress = no_progress) -> EmbeddedImages:
    """Encode images into at most `limit` bytes of JSON.

    Small sets are embedded unchanged, larger ones as WebP. Images that do not fit are left out from the end, each with
    all its reconstructions.
    """
    files = [file for page_image in images for file in page_image.files]
    size = sum(file.stat().st_size + 100 for file in files if file.exists())
    quality = None if size * 4 / 3 + OVERHEAD * len(images) <= min(limit, LOSSLESS_BYTES) else QUALITY
    kept, blocks, spent = [], [], 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for done, page_image in enumerate(images, start=1):
            block, entry = _encode_image(page_image, quality, pool), _describe(page_image)
            spent += _length(block) + _length(entry)
            if spent > limit:
                break
            kept.append(entry)
            blocks.append(block)
            progress("embedding images", done, len(images))
    return EmbeddedImages(len(images), kept, blocks, quality)


def data_uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _encode_image(page_image: PageImage, quality: int | None, pool: Executor) -> dict[str, Any]:
    encoded = pool.map(lambda file: _encode(file, quality), page_image.files)
    block: dict[str, Any] = {"original": next(encoded)}
    block["runs"] = {str(position): next(encoded) for position in page_image.reconstructions}
    block["maps"] = {str(position): [next(encoded) for _ in own] for position, own in page_image.maps.items()}
    return block


def _length(value: dict[str, Any]) -> int:
    """Return the bytes that a value adds to a page: its JSON and the element around it."""
    return len(htmlsafe_json_dumps(value)) + 100


def _encode(path: Path, quality: int | None) -> str:
    content = read_bytes(path)
    image = read_image(path, content)
    if quality is not None:
        smaller = _webp(image, quality)
        if len(smaller) < len(content):
            return data_uri(smaller, "image/webp")
    return data_uri(content, "image/png")


def _describe(page_image: PageImage) -> dict[str, Any]:
    image = read_image(page_image.original)
    width, height = image.size
    small = image.convert("RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    thumbnail = data_uri(_webp(small, 80), "image/webp")
    runs = sorted(page_image.reconstructions)
    return {"id": page_image.id, "width": width, "height": height, "runs": runs, "thumbnail": thumbnail}


def _webp(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "WEBP", quality=quality, method=2)
    return buffer.getvalue()


def read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise AfterimageError(f"cannot read the image {printable_path(path)}: {error.strerror}") from None
