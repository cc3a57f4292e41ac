"""One's own picture, prepared as test pictures are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from afterimage.data.decode import load_picture, shorter_side
from afterimage.data.examine import examine, size_notes, value_notes
from afterimage.data.sampling import centre_places


def prepare_picture(path: Path, resize: int, crop: int) -> Tensor:
    """A picture file as `(1, 3, crop, crop)` in [0, 1]: shorter side to `resize` pixels, centre crop."""
    picture = shorter_side(load_picture(path), resize)
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]
    top, left = (int(place[0]) for place in centre_places(*np.array(pixels.shape[-2:]).reshape(2, 1), crop))
    return pixels[..., top : top + crop, left : left + crop].float() / 255


def file_notes(paths: Sequence[Path], resize: int) -> list[str]:
    """What has to be known of picture files to read their scores, as `Data.notes` has it of a source."""
    facts = np.array([examine(load_picture(path)) for path in paths], np.int64).reshape(-1, 6)
    return value_notes({"given": facts}) + size_notes({"given": facts[:, -2:].min(1)}, resize)
