"""Images to invert: those of a data configuration, of a source, or of image files."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from afterimage.config import AfterimageError, DataConfig, printable_path
from afterimage.data.dataset import file_notes, load_data, load_test_images, prepare_image
from afterimage.data.images import ImageSet, crops_digest
from afterimage.runs.files import sha256
from afterimage.runs.results import DataFacts
from afterimage.runtime.terminal import Progress, no_progress


@dataclass(frozen=True)
class InversionInputs:
    """Images to invert, with what a run records about them.

    From the `validation` images a decoder's errors may be learned; None if there are none.
    """

    images: ImageSet
    config: DataConfig
    facts: DataFacts
    notes: tuple[str, ...] = ()
    validation: ImageSet | None = None


def from_data(
    config: DataConfig, *, cache: Path | None = None, progress: Progress = no_progress
) -> InversionInputs:
    """Return the test and validation images of a data configuration; raise the errors of `load_data`."""
    data = load_data(config, cache=cache, progress=progress)
    return InversionInputs(data.test, config, data.describe(), data.notes, data.validation)


def from_source(
    config: DataConfig, *, cache: Path | None = None, progress: Progress = no_progress
) -> InversionInputs:
    """Return the images of the source `config.test`, for inversions from grey, which are trained on no images.

    These are its test split or, if it has none, all its images; errors are those of `load_test_images`.
    """
    images, notes = load_test_images(config, training=False, cache=cache, progress=progress)
    digest = crops_digest(config, images.content_digests)
    facts = DataFacts(
        config.source, config.test, digest, digest, len(images), config.resize, config.crop
    )  # fmt: skip
    return InversionInputs(images, config, facts, tuple(notes))


def from_files(paths: Sequence[Path], *, resize: int = 256, crop: int | str = 224) -> InversionInputs:
    """Read image files and prepare them like test images: resize, then take the centre crop (see `DataConfig`).

    Raises:
        AfterimageError: a file is not an image, or is given twice; the message names it
    """
    names = [printable_path(path) for path in paths]
    if twice := {name for name in names if names.count(name) > 1}:
        raise AfterimageError(f"given twice: {', '.join(sorted(twice))}")
    config = DataConfig(resize=resize, crop=crop)
    crops = torch.cat([prepare_image(path, config) for path in paths])
    digest = hashlib.sha256("".join(sha256(path) for path in paths).encode()).hexdigest()
    facts = DataFacts("files", "", digest, digest, len(paths), config.resize, config.crop)
    notes = tuple(file_notes(paths, config))
    return InversionInputs(_Files(names, crops), replace(config, source="files:" + digest[:16]), facts, notes)


class _Files(ImageSet):
    """Set of crops held in memory, `(N, 3, height, width)` in [0, 1]."""

    def __init__(self, ids: Sequence[str], crops: Tensor) -> None:
        self.ids, self._crops, self.size = list(ids), crops, tuple(crops.shape[-2:])

    def __len__(self) -> int:
        return len(self.ids)

    def crops(self, indices: Any, *, device: str | torch.device = "cpu", **_: Any) -> Tensor:
        return self._crops[torch.as_tensor(indices)].to(device)
