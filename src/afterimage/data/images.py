"""Sets of images that give crops: decoded once, or decoded each time they are used."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from afterimage.config import AfterimageError, DataConfig
from afterimage.data.decode import DIGEST_VERSION
from afterimage.data.pixel_cache import Blob
from afterimage.data.records import Original
from afterimage.data.sampling import centre_places, crop_places
from afterimage.runs.results import DataFacts
from afterimage.runtime.threads import cores

Indices = Sequence[int] | np.ndarray | Tensor


class ImageSet:
    """One split: images with stable, unique ids, each whole (after resizing), as uint8.

    `ids[i]` names image `i`, `content[i]` is the SHA-256 of its original, `crop` the side of its crops, `streamed`
    whether its pixels are made each time they are used.
    """

    ids: Sequence[str]
    content: Sequence[str]
    streamed: ClassVar[bool] = False

    def __init__(self, ids: Sequence[str], content: Sequence[str], blob: Blob, crop: int) -> None:
        self.ids = list(ids)
        self.content = list(content)
        self.blob = blob
        self.crop = crop
        slots = np.array([blob.slots[c] for c in self.content], np.int64).reshape(-1, 4)
        self._offsets, self._heights, self._widths, _ = slots.T

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def digests(self) -> UInt8[np.ndarray, "n 32"]:
        """The content digests as numbers."""
        return np.frombuffer(bytes.fromhex("".join(self.content)), np.uint8).reshape(-1, 32)

    @property
    def facts(self) -> Int64[np.ndarray, "n 6"]:
        """The `Facts` of each original, before it was resized."""
        return np.array([self.blob.facts[c] for c in self.content], np.int64).reshape(-1, 6)

    @property
    def sides(self) -> Int64[np.ndarray, " n"]:
        """The shorter side of each original in pixels, before it was resized."""
        return self.facts[:, -2:].min(1)

    def subset(self, indices: np.ndarray) -> ImageSet:
        """The images at `indices`, as a set of their own."""
        ids, content = ([values[i] for i in indices] for values in (self.ids, self.content))
        return ImageSet(ids, content, self.blob, self.crop)

    def joined(self, other: ImageSet) -> ImageSet:
        """These images and then those of another part of the same source."""
        return ImageSet([*self.ids, *other.ids], [*self.content, *other.content], self.blob, self.crop)

    def whole(self, index: int) -> UInt8[Tensor, "3 height width"]:
        """Image `index`, uncropped, uint8 in [0, 255]."""
        return torch.from_numpy(self.blob.image(self.content[index]).copy())

    def crops(
        self, indices: Indices, *, seed: int | None = None, epoch: int = 0, device: str | torch.device = "cpu"
    ) -> Float[Tensor, "batch 3 crop crop"]:
        """Crops of the images at `indices`, float32 in [0, 1].

        Without a seed the centre crop, where torchvision's CenterCrop takes it. With a seed a random crop,
        flipped half of the time: a pure function of (seed, epoch, index), whatever batch or process asks.
        """
        indices = self._checked(indices)
        heights, widths = self._heights[indices], self._widths[indices]
        top, left, flip = self._places(indices, heights, widths, seed, epoch)
        device = torch.device(device)
        if device.type == "cpu":
            return torch.from_numpy(self._copy(indices, top, left, flip, np.float32))
        pixels = self.blob.on(device)
        if pixels is None:
            return placed(self._copy(indices, top, left, flip, np.uint8), device)
        starts = self._offsets[indices] + top * widths + left
        return gather_crops(pixels, starts, heights, widths, flip, self.crop).to(torch.float32).div_(255)

    def batches(
        self,
        chunks: Iterable[Indices],
        *,
        seed: int | None = None,
        epoch: int = 0,
        device: str | torch.device = "cpu",
    ) -> Iterator[Float[Tensor, "batch 3 height width"]]:
        """The crops of one chunk of indices after the other."""
        return (self.crops(chunk, seed=seed, epoch=epoch, device=device) for chunk in chunks)

    def _checked(self, indices: Indices) -> np.ndarray:
        indices = np.asarray(indices.cpu() if isinstance(indices, Tensor) else indices, np.int64).reshape(-1)
        if indices.size and not (indices.min() >= 0 and indices.max() < len(self)):
            raise IndexError(f"indices {indices.min()} .. {indices.max()} of {len(self)} images")
        return indices

    def _places(
        self, indices: np.ndarray, heights: np.ndarray, widths: np.ndarray, seed: int | None, epoch: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Top, left and whether to flip, one of each an image."""
        if seed is None:
            return *centre_places(heights, widths, self.crop), np.zeros(len(indices), bool)
        return crop_places(heights, widths, self.crop, indices, seed, epoch)

    def _copy(
        self, indices: np.ndarray, top: np.ndarray, left: np.ndarray, flip: np.ndarray, dtype: type
    ) -> np.ndarray:
        """The crops as `(batch, 3, crop, crop)`: uint8, or float32 in [0, 1].

        NumPy, image by image: each stays in the processor's cache, and no thread pool has to wake up.
        """
        crops = np.empty((len(indices), 3, self.crop, self.crop), dtype)
        for i, (index, y, x) in enumerate(zip(indices, top, left, strict=True)):
            image = self.blob.image(self.content[index])[:, y : y + self.crop, x : x + self.crop]
            if flip[i]:
                image = np.ascontiguousarray(image[:, :, ::-1])
            if dtype is np.float32:
                np.divide(image, np.float32(255), out=crops[i], dtype=np.float32)
            else:
                crops[i] = image
        return crops


def placed(crops: UInt8[np.ndarray, "batch 3 crop crop"], device: str | torch.device) -> Tensor:
    """Crops as float32 in [0, 1] on a device."""
    device = torch.device(device)
    if device.type == "cpu":
        return torch.from_numpy(np.divide(crops, np.float32(255), dtype=np.float32))
    pixels = torch.from_numpy(crops)
    pixels = (pixels.pin_memory() if device.type == "cuda" else pixels).to(device, non_blocking=True)
    return pixels.to(torch.float32).div_(255)


def gather_crops(
    pixels: UInt8[Tensor, " size"],
    starts: np.ndarray,
    heights: np.ndarray,
    widths: np.ndarray,
    flip: np.ndarray,
    crop: int,
) -> UInt8[Tensor, "batch 3 crop crop"]:
    """All crops in one gather on the device of `pixels`; `starts` are the places of their top left pixels."""
    numbers = torch.from_numpy(np.stack([starts, heights * widths, widths, flip.astype(np.int64)]))
    start, plane, row, flipped = numbers.to(pixels.device, non_blocking=True)[..., None, None, None]
    along = torch.arange(crop, device=pixels.device)
    channel = torch.arange(3, device=pixels.device)[:, None, None]
    across = torch.where(flipped == 1, crop - 1 - along, along)
    return pixels[start + channel * plane + along[:, None] * row + across]


AHEAD = 2
"""Batches that are decoded while one is worked on."""


class StreamedImages(ImageSet):
    """One split whose originals are decoded each time they are used: the same crops as if they were kept.

    `digests` and `sides` are what was found when the originals were first read. An image that cannot be decoded, or
    is not what it was then, raises a `BadImage` that names it: leaving it out would train on other images than the
    run says.
    """

    streamed = True

    def __init__(
        self,
        originals: Sequence[Original],
        digests: UInt8[np.ndarray, "n 32"],
        sides: Int64[np.ndarray, " n"],
        resize: int,
        crop: int,
    ) -> None:
        self.originals, self.resize, self.crop = originals, resize, crop
        self.ids = [original.id for original in originals]
        self._digests, self._sides = digests, sides

    @property
    def content(self) -> list[str]:
        return [digest.tobytes().hex() for digest in self._digests]

    @property
    def digests(self) -> UInt8[np.ndarray, "n 32"]:
        return self._digests

    @property
    def sides(self) -> Int64[np.ndarray, " n"]:
        return self._sides

    def subset(self, indices: np.ndarray) -> StreamedImages:
        originals = [self.originals[i] for i in indices]
        return StreamedImages(originals, self._digests[indices], self._sides[indices], self.resize, self.crop)

    def joined(self, other: StreamedImages) -> StreamedImages:
        both = ([a, b] for a, b in ((self._digests, other.digests), (self._sides, other.sides)))
        return StreamedImages(
            [*self.originals, *other.originals], *map(np.concatenate, both), self.resize, self.crop
        )

    def whole(self, index: int) -> UInt8[Tensor, "3 height width"]:
        return torch.from_numpy(np.ascontiguousarray(self._decoded(index)))

    def crops(
        self, indices: Indices, *, seed: int | None = None, epoch: int = 0, device: str | torch.device = "cpu"
    ) -> Float[Tensor, "batch 3 crop crop"]:
        """Crops of the images at `indices`, as `ImageSet.crops` gives them."""
        return next(self.batches([indices], seed=seed, epoch=epoch, device=device))

    def batches(
        self,
        chunks: Iterable[Indices],
        *,
        seed: int | None = None,
        epoch: int = 0,
        device: str | torch.device = "cpu",
    ) -> Iterator[Float[Tensor, "batch 3 crop crop"]]:
        """The crops of one chunk of indices after the other; the next ones are decoded meanwhile.

        The threads that do so end with the iterator.
        """

        def one(index: int) -> np.ndarray:
            image = self._decoded(index)
            height, width = image.shape[1:]
            places = np.array([index]), np.array([height]), np.array([width])
            (top,), (left,), (flip,) = self._places(*places, seed, epoch)
            cut = image[:, top : top + self.crop, left : left + self.crop]
            return np.ascontiguousarray(cut[:, :, ::-1] if flip else cut)

        def stacked(crops: list[Future[np.ndarray]]) -> Tensor:
            empty = np.empty((0, 3, self.crop, self.crop), np.uint8)
            return placed(np.stack([crop.result() for crop in crops]) if crops else empty, device)

        waiting: deque[list[Future[np.ndarray]]] = deque()
        with ThreadPoolExecutor(cores()) as pool:
            try:
                for chunk in chunks:
                    waiting.append([pool.submit(one, index) for index in self._checked(chunk).tolist()])
                    if len(waiting) > AHEAD:
                        yield stacked(waiting.popleft())
                while waiting:
                    yield stacked(waiting.popleft())
            finally:
                for crop in chain.from_iterable(waiting):
                    crop.cancel()

    def _decoded(self, index: int) -> np.ndarray:
        """Image `index` after resizing, `(3, height, width)` uint8."""
        original, content = self.originals[index], self._digests[index].tobytes().hex()
        try:
            return np.asarray(original.image(self.resize, content)).transpose(2, 0, 1)
        except AfterimageError:
            raise
        except Exception as error:  # of which image no traceback would say
            raise AfterimageError(
                f"{original.name} could not be read: {type(error).__name__}: {error}"
            ) from error


@dataclass(frozen=True, eq=False)
class Data:
    """The images of a run.

    `digest` is a SHA-256 over the images' contents, their split and their size; paths have no part in it.
    `notes` are sentences for whoever reads the results.
    """

    config: DataConfig
    train: ImageSet
    validation: ImageSet
    test: ImageSet
    digest: str
    notes: tuple[str, ...] = ()

    @property
    def test_digest(self) -> str:
        """Of the test images alone, as they are scored: rows that agree in it compare, whatever trained them."""
        return hashlib.sha256(f"{_digest(self.config, [self.test])} {self.config.crop}".encode()).hexdigest()

    def describe(self) -> DataFacts:
        """What a run's result says of its data."""
        return DataFacts(
            source=self.config.source,
            test=self.config.test,
            digest=self.digest,
            test_digest=self.test_digest,
            test_images=len(self.test),
            resize=self.config.resize,
            crop=self.config.crop,
            train=len(self.train),
            validation=len(self.validation),
        )


def _digest(config: DataConfig, images: Sequence[ImageSet]) -> str:
    """SHA-256 of the JSON list of decoder version, size and the contents of each part, written piece by piece."""
    digest = hashlib.sha256(f"[{DIGEST_VERSION}, {config.resize}".encode())
    for part in images:
        digest.update(b", [")
        for number, content in enumerate(part.content):
            digest.update(f'{", " if number else ""}"{content}"'.encode())
        digest.update(b"]")
    digest.update(b"]")
    return digest.hexdigest()
