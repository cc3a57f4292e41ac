"""Finished batches of a search on disk, from which an interrupted search resumes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from afterimage.analysis.inversion.invert import Inversion
from afterimage.config import AfterimageError
from afterimage.runs.files import write_atomic
from afterimage.training.checkpoint import load_tensors, plain

Curve = list[dict[str, Any]]


class Batches:
    """Files of finished batches in one folder, one file per batch.

    A damaged file counts as missing, and so does one that was written for other images or another `made_for`.

    Args:
        folder: folder of the files
        made_for: everything but the images that the results depend on, as JSON values
    """

    def __init__(self, folder: Path, made_for: Any) -> None:
        self.folder, self.made_for = folder, json.dumps([made_for, torch.__version__], sort_keys=True)

    def load(self, images: Tensor) -> tuple[Inversion, Curve] | None:
        """Return the stored result of the search for `images` and its curve, or None if there is none."""
        key = self._key(images)
        try:
            tensors, metadata = load_tensors(self._path(key))
            if metadata["key"] != key:
                return None
            facts = json.loads(metadata["facts"])
            return Inversion(
                tensors["images"].to(images.device), tensors["loss"].to(images.device), facts["seconds"]
            ), facts["curve"]
        except (AfterimageError, KeyError, ValueError):
            return None

    def save(self, images: Tensor, result: Inversion, curve: Curve) -> None:
        tensors = plain({"images": result.images, "loss": result.loss})
        facts = json.dumps({"seconds": result.seconds, "curve": curve})
        key = self._key(images)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self._path(key), save(tensors, {"key": key, "facts": facts}))

    def clear(self) -> None:
        for path in self.folder.glob("batch-*.safetensors"):
            path.unlink()

    def _path(self, key: str) -> Path:
        return self.folder / f"batch-{key[:16]}.safetensors"

    def _key(self, images: Tensor) -> str:
        pixels = images.detach().cpu().contiguous().numpy().tobytes()
        return hashlib.sha256(self.made_for.encode() + pixels).hexdigest()
