"""Image sets, which return crops of images that are kept decoded or are decoded each time they are used."""

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

from afterimage.config import AfterimageError, DataConfig, size_pair, size_text
from afterimage.data.decode import DIGEST_VERSION, resize_to_cover
from afterimage.data.originals import Original
from afterimage.data.pixel_cache import PixelStore
from afterimage.data.sampling import centre_crop_positions, fitting_sides, random_crop_positions
from afterimage.runs.results import DataFacts
from afterimage.runtime.process import available_cpus

Indices = Sequence[int] | np.ndarray | Tensor


class ImageSet:
    """Images of one split, resized and kept as uint8.

    Args:
        ids: stable and unique names of the images
        content_digests: SHA-256 of each image's original, in hexadecimal
        blob: pixels of the images
        size: height and width of the crops in pixels, or the side of square crops

    Attributes:
        size: height and width of the crops in pixels
        streamed: whether images are decoded each time they are used
    """

    ids: Sequence[str]
    content_digests: Sequence[str]
    streamed: ClassVar[bool] = False

    def __init__(
        self,
        ids: Sequence[str],
        content_digests: Sequence[str],
        blob: PixelStore,
        size: int | tuple[int, int],
    ) -> None:
        self.ids, self.content_digests = list(ids), list(content_digests)
        self.blob, self.size = blob, size_pair(size)
        slots = np.array([blob.slots[c][:3] for c in self.content_digests], np.int64).reshape(-1, 3)
        self._offsets, self._heights, self._widths = slots.T

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def digests(self) -> UInt8[np.ndarray, "n 32"]:
        """Digests of the images' contents, as bytes."""
        return np.frombuffer(bytes.fromhex("".join(self.content_digests)), np.uint8).reshape(-1, 32)

    @property
    def facts(self) -> Int64[np.ndarray, "n 6"]:
        """`ImageStatistics` of each image before it was resized."""
        return np.array([self.blob.slots[c].facts for c in self.content_digests], np.int64).reshape(-1, 6)

    @property
    def sides(self) -> Int64[np.ndarray, " n"]:
        """Shorter side of each image before it was resized, in pixels; see `fitting_sides`."""
        return fitting_sides(self.facts[:, -1], self.facts[:, -2], self.size)

    def subset(self, indices: np.ndarray) -> ImageSet:
        """Return a set of the images at `indices`."""
        ids, digests = ([values[i] for i in indices] for values in (self.ids, self.content_digests))
        return ImageSet(ids, digests, self.blob, self.size)

    def concat(self, other: ImageSet) -> ImageSet:
        """Return a set of these images followed by the ones of another split of the same source."""
        return ImageSet(
            [*self.ids, *other.ids], [*self.content_digests, *other.content_digests], self.blob, self.size
        )

    def full_image(self, index: int) -> UInt8[Tensor, "3 height width"]:
        """Return the whole image at `index`, values 0 to 255."""
        return torch.from_numpy(self._pixels(index).copy())

    def _pixels(self, index: int) -> np.ndarray:
        """Return image `index` after resizing, `(3, height, width)` uint8."""
        return self.blob.image(self.content_digests[index])

    def crops(
        self, indices: Indices, *, seed: int | None = None, epoch: int = 0, device: str | torch.device = "cpu"
    ) -> Float[Tensor, "batch 3 height width"]:
        """Return crops of the images at `indices`.

        Random crops are flipped with probability 1/2. The position and the flip of a crop are a pure function of seed,
        epoch and index, independent of batches and processes.

        Args:
            indices: indices of the images
            seed: seed of random crops; None for centre crops, placed as by torchvision's CenterCrop
            epoch: number of the epoch, for random crops
            device: device of the returned crops

        Returns:
            `(B, 3, height, width)` in [0, 1]

        Raises:
            IndexError: an index is out of range
        """
        indices = self._checked(indices)
        heights, widths = self._heights[indices], self._widths[indices]
        top, left, flip = self._places(indices, heights, widths, seed, epoch)
        device = torch.device(device)
        if device.type != "cpu" and (pixels := self.blob.to_device(device)) is not None:
            starts = self._offsets[indices] + top * widths + left
            return gather_crops(pixels, starts, heights, widths, flip, self.size).to(torch.float32).div_(255)
        places = zip(indices.tolist(), top, left, flip, strict=True)
        return self._to_device([self._cut(self._pixels(i), *place) for i, *place in places], device)

    def batches(
        self,
        chunks: Iterable[Indices],
        *,
        seed: int | None = None,
        epoch: int = 0,
        device: str | torch.device = "cpu",
    ) -> Iterator[Float[Tensor, "batch 3 height width"]]:
        """Yield the crops of each chunk of indices in turn; arguments as for `crops`."""
        return (self.crops(chunk, seed=seed, epoch=epoch, device=device) for chunk in chunks)

    def _checked(self, indices: Indices) -> np.ndarray:
        indices = np.asarray(indices.cpu() if isinstance(indices, Tensor) else indices, np.int64).reshape(-1)
        if indices.size and not (indices.min() >= 0 and indices.max() < len(self)):
            raise IndexError(f"indices {indices.min()} .. {indices.max()} of {len(self)} images")
        return indices

    def _places(
        self, indices: np.ndarray, heights: np.ndarray, widths: np.ndarray, seed: int | None, epoch: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return top, left and whether to flip, for each image."""
        if seed is None:
            return *centre_crop_positions(heights, widths, self.size), np.zeros(len(indices), bool)
        return random_crop_positions(heights, widths, self.size, indices, seed, epoch)

    def _cut(self, image: np.ndarray, top: np.integer, left: np.integer, flip: np.bool_) -> np.ndarray:
        height, width = self.size
        crop = image[:, top : top + height, left : left + width]
        return np.ascontiguousarray(crop[:, :, ::-1]) if flip else crop

    def _to_device(self, crops: Sequence[np.ndarray], device: str | torch.device) -> Tensor:
        """Return uint8 crops as float32 in [0, 1] on a device."""
        device = torch.device(device)
        if device.type == "cpu":
            images = np.empty((len(crops), 3, *self.size), np.float32)
            # One by one: each stays in the processor's cache.
            for image, crop in zip(images, crops, strict=True):
                np.divide(crop, np.float32(255), out=image, dtype=np.float32)
            return torch.from_numpy(images)
        pixels = torch.from_numpy(np.stack(crops) if crops else np.empty((0, 3, *self.size), np.uint8))
        pixels = (pixels.pin_memory() if device.type == "cuda" else pixels).to(device, non_blocking=True)
        return pixels.to(torch.float32).div_(255)


def gather_crops(
    pixels: UInt8[Tensor, " size"],
    starts: np.ndarray,
    heights: np.ndarray,
    widths: np.ndarray,
    flip: np.ndarray,
    size: tuple[int, int],
) -> UInt8[Tensor, "batch 3 height width"]:
    """Cut all crops out of the pixels of many images in one operation, on the pixels' device.

    Args:
        pixels: pixels of all images, one after the other
        starts: index of each crop's top left pixel in the first channel
        heights: height of each crop's image in pixels
        widths: width of each crop's image in pixels
        flip: whether to flip each crop
        size: height and width of the crops in pixels
    """
    numbers = torch.from_numpy(np.stack([starts, heights * widths, widths, flip.astype(np.int64)]))
    start, plane, row, flipped = numbers.to(pixels.device, non_blocking=True)[..., None, None, None]
    down, along = (torch.arange(side, device=pixels.device) for side in size)
    channel = torch.arange(3, device=pixels.device)[:, None, None]
    across = torch.where(flipped == 1, len(along) - 1 - along, along)
    return pixels[start + channel * plane + down[:, None] * row + across]


PREFETCH_BATCHES = 2
"""Number of batches that are decoded ahead."""


class StreamedImages(ImageSet):
    """Images of one split, decoded each time they are used; the crops equal those of an `ImageSet`.

    An image that cannot be decoded or has changed since it was first read is an error: without it the run would train
    on other images than it records.

    Args:
        originals: the images
        digests: SHA-256 of each image's content when it was first read
        sides: each image's shorter side in pixels, before resizing; see `fitting_sides`
        box: height and width of the box that resized images cover
        size: height and width of the crops in pixels

    Raises:
        BadImage: an image cannot be decoded or has changed; raised when its pixels are used
    """

    streamed = True

    def __init__(
        self,
        originals: Sequence[Original],
        digests: UInt8[np.ndarray, "n 32"],
        sides: Int64[np.ndarray, " n"],
        box: tuple[int, int],
        size: tuple[int, int],
    ) -> None:
        self.originals, self.box, self.size = originals, box, size
        self.ids = [original.id for original in originals]
        self._digests, self._sides = digests, sides

    @property
    def content_digests(self) -> list[str]:
        return [digest.tobytes().hex() for digest in self._digests]

    @property
    def digests(self) -> UInt8[np.ndarray, "n 32"]:
        return self._digests

    @property
    def sides(self) -> Int64[np.ndarray, " n"]:
        return self._sides

    def subset(self, indices: np.ndarray) -> StreamedImages:
        originals = [self.originals[i] for i in indices]
        return StreamedImages(originals, self._digests[indices], self._sides[indices], self.box, self.size)

    def concat(self, other: StreamedImages) -> StreamedImages:
        both = ([a, b] for a, b in ((self._digests, other.digests), (self._sides, other.sides)))
        return StreamedImages(
            [*self.originals, *other.originals], *map(np.concatenate, both), self.box, self.size
        )

    def crops(
        self, indices: Indices, *, seed: int | None = None, epoch: int = 0, device: str | torch.device = "cpu"
    ) -> Float[Tensor, "batch 3 height width"]:
        """Return crops of the images at `indices`, as `ImageSet.crops` does."""
        return next(self.batches([indices], seed=seed, epoch=epoch, device=device))

    def batches(
        self,
        chunks: Iterable[Indices],
        *,
        seed: int | None = None,
        epoch: int = 0,
        device: str | torch.device = "cpu",
    ) -> Iterator[Float[Tensor, "batch 3 height width"]]:
        """Yield the crops of each chunk of indices in turn, while threads decode the next chunks.

        The threads end with the iterator.
        """

        def one(index: int) -> np.ndarray:
            image = self._pixels(index)
            sides = np.array(image.shape[1:]).reshape(2, 1)
            top, left, flip = self._places(np.array([index]), *sides, seed, epoch)
            return np.ascontiguousarray(self._cut(image, top[0], left[0], flip[0]))

        def stacked(crops: list[Future[np.ndarray]]) -> Tensor:
            return self._to_device([crop.result() for crop in crops], device)

        waiting: deque[list[Future[np.ndarray]]] = deque()
        with ThreadPoolExecutor(available_cpus()) as pool:
            try:
                for chunk in chunks:
                    waiting.append([pool.submit(one, index) for index in self._checked(chunk).tolist()])
                    if len(waiting) > PREFETCH_BATCHES:
                        yield stacked(waiting.popleft())
                while waiting:
                    yield stacked(waiting.popleft())
            finally:
                for crop in chain.from_iterable(waiting):
                    crop.cancel()

    def _pixels(self, index: int) -> np.ndarray:
        original, content = self.originals[index], self._digests[index].tobytes().hex()
        try:
            image = resize_to_cover(original.decode_image(max(self.box), content), self.box)
            return np.asarray(image).transpose(2, 0, 1)
        except AfterimageError:
            raise
        except Exception as error:  # a traceback would not name the image
            raise AfterimageError(
                f"{original.name} could not be read: {type(error).__name__}: {error}"
            ) from error


@dataclass(frozen=True, eq=False)
class Data:
    """Images of a run.

    Attributes:
        config: sources of the images, and how they are split
        train: training images
        validation: validation images
        test: test images
        digest: SHA-256 over the images' contents, split and size, but not their paths
        notes: remarks for readers of the results
    """

    config: DataConfig
    train: ImageSet
    validation: ImageSet
    test: ImageSet
    digest: str
    notes: tuple[str, ...] = ()

    @property
    def test_digest(self) -> str:
        """Digest of the test images and their crops; runs with equal test digests can be compared."""
        return crops_digest(self.config, self.test.content_digests)

    def describe(self) -> DataFacts:
        """Return the facts about the images that a run's result records."""
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


def content_digest(config: DataConfig, parts: Sequence[Sequence[str]]) -> str:
    """Compute the SHA-256 of the JSON list of decoder version, size and the contents of each part, piece by piece."""
    digest = hashlib.sha256(f"[{DIGEST_VERSION}, {size_text(config.box)}".encode())
    for contents in parts:
        digest.update(b", [")
        for number, content in enumerate(contents):
            digest.update(f'{", " if number else ""}"{content}"'.encode())
        digest.update(b"]")
    digest.update(b"]")
    return digest.hexdigest()


def crops_digest(config: DataConfig, contents: Sequence[str]) -> str:
    """Compute the SHA-256 of test images, given by their contents, and of their crops."""
    return hashlib.sha256(f"{content_digest(config, [contents])} {config.crop}".encode()).hexdigest()
