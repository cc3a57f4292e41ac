"""The pictures that are to be inverted: test pictures of a source, or files of one's own."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from afterimage.config import AfterimageError, DataConfig
from afterimage.data import Pictures, file_notes, load_data, prepare_picture
from afterimage.progress import Progress, silent
from afterimage.runs import sha256
from afterimage.terminal import shown


@dataclass(frozen=True)
class Given:
    """Pictures, what a summary says of them, and those that a decoder's errors may be learnt from (None: no such)."""

    pictures: Pictures
    config: DataConfig
    facts: dict[str, Any]
    notes: tuple[str, ...] = ()
    validation: Pictures | None = None


def from_data(config: DataConfig, *, cache: Path | None = None, progress: Progress = silent) -> Given:
    """The test pictures of a data configuration; raises as `load_data` does."""
    data = load_data(config, cache=cache, progress=progress)
    return Given(data.test, config, data.describe(), data.notes, data.validation)


def from_files(paths: Sequence[Path], *, resize: int = 256, crop: int = 224) -> Given:
    """Picture files, prepared as test pictures are: shorter side to `resize`, centre crop.

    Raises `AfterimageError` that names the file where one is no picture, or is given twice.
    """
    names = [shown(path) for path in paths]
    if twice := {name for name in names if names.count(name) > 1}:
        raise AfterimageError(f"given twice: {', '.join(sorted(twice))}")
    crops = torch.cat([prepare_picture(path, resize, crop) for path in paths])
    digest = hashlib.sha256("".join(sha256(path) for path in paths).encode()).hexdigest()
    config = DataConfig(source="files:" + digest[:16], resize=resize, crop=crop)
    facts = {"source": "files", "test": "", "digest": digest, "test_digest": digest}
    facts |= {"test_pictures": len(paths), "resize": resize, "crop": crop}
    return Given(_Files(names, crops), config, facts, tuple(file_notes(paths, resize)))


class _Files(Pictures):
    """Crops that are held in memory, `(N, 3, crop, crop)` in [0, 1]."""

    def __init__(self, ids: Sequence[str], crops: Tensor) -> None:
        self.ids, self._crops, self.crop = list(ids), crops, crops.shape[-1]

    def __len__(self) -> int:
        return len(self.ids)

    def crops(self, indices: Any, *, device: str | torch.device = "cpu", **_: Any) -> Tensor:
        return self._crops[torch.as_tensor(indices)].to(device)
