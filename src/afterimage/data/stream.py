"""Pictures that are decoded as they are asked for, a few batches ahead, and kept nowhere."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import chain, islice

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from afterimage.config import AfterimageError
from afterimage.data.parallel import in_parallel
from afterimage.data.pictures import Indices, Pictures, placed
from afterimage.data.rows import Rows

AHEAD = 2
"""Batches that are decoded while one is worked on."""


class StreamedPictures(Pictures):
    """One split whose originals are decoded each time they are used: the same crops as if they were kept.

    A picture that cannot be decoded, or is not what it was when it was indexed, raises a `BadPicture` that names it:
    leaving it out would train on other pictures than the run says.
    """

    def __init__(self, rows: Rows, resize: int, crop: int) -> None:
        self.rows, self.resize, self.crop = rows, resize, crop
        self.ids, self.content, self.windows = rows.ids, rows.content, rows.windows()

    @property
    def digests(self) -> UInt8[np.ndarray, "n 32"]:
        return self.rows.digests

    def whole(self, index: int) -> UInt8[Tensor, "3 height width"]:
        return torch.from_numpy(np.ascontiguousarray(self._decoded(index)))

    def crops(
        self, indices: Indices, *, seed: int | None = None, epoch: int = 0, device: str | torch.device = "cpu"
    ) -> Float[Tensor, "batch 3 crop crop"]:
        """Crops of the pictures at `indices`, as `Pictures.crops` has them."""
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
            picture = self._decoded(index)
            height, width = picture.shape[1:]
            places = np.array([index]), np.array([height]), np.array([width])
            (top,), (left,), (flip,) = self._places(*places, seed, epoch)
            cut = picture[:, top : top + self.crop, left : left + self.crop]
            return np.ascontiguousarray(cut[:, :, ::-1] if flip else cut)

        sizes: deque[int] = deque()

        def flat() -> Iterator[int]:
            for chunk in chain(first, chunks):
                indices = self._checked(chunk)
                sizes.append(len(indices))
                yield from indices.tolist()

        chunks = iter(chunks)
        first = list(islice(chunks, 1))
        batch: list[np.ndarray] = []
        work = in_parallel(one, flat(), 0, "", None, ahead=AHEAD * sum(map(len, first)))
        with contextlib.closing(work):
            for crop in work:
                while not sizes[0]:
                    sizes.popleft()
                    yield self._stacked([], device)
                batch.append(crop)
                if len(batch) == sizes[0]:
                    sizes.popleft()
                    yield self._stacked(batch, device)
                    batch.clear()
        for _ in sizes:
            yield self._stacked([], device)

    def _stacked(self, crops: list[np.ndarray], device: str | torch.device) -> Tensor:
        shape = (len(crops), 3, self.crop, self.crop)
        return placed(np.stack(crops) if crops else np.empty(shape, np.uint8), device)

    def _decoded(self, index: int) -> np.ndarray:
        """Picture `index` after resizing, `(3, height, width)` uint8."""
        original = self.rows[index]
        try:
            return np.asarray(original.picture(self.resize, "")).transpose(2, 0, 1)
        except AfterimageError:
            raise
        except Exception as error:  # of which picture no traceback would say
            raise AfterimageError(
                f"{original.name} could not be read: {type(error).__name__}: {error}"
            ) from error
