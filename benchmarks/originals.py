"""Originals for the measurements: procedural images, written as PNG where both ways read them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from PIL import Image

from afterimage.runtime.progress import Progress

TURNS = (
    Image.Transpose.FLIP_LEFT_RIGHT,
    Image.Transpose.FLIP_TOP_BOTTOM,
    Image.Transpose.ROTATE_180,
)


def write_originals(folder: Path, counts: Mapping[str, int], width: int, height: int, say: Progress) -> str:
    """Write `counts` of dead leaves as PNG into `folder/train` and so on; returns the data source's name.

    Each is written as it is, mirrored, upside down and turned around: making them takes longer than reading them.
    """
    from afterimage.data.sources.dead_leaves import dead_leaves
    from afterimage.runtime.threads import in_parallel

    jobs = []
    for series, (part, count) in enumerate(counts.items()):
        (folder / part).mkdir(parents=True, exist_ok=True)
        files = [folder / part / f"{i:04}.png" for i in range(count)]
        jobs += [(series, i, files[i : i + 4]) for i in range(0, count, 4)]

    def write(job: tuple[int, int, list[Path]]) -> None:
        series, index, files = job
        image = dead_leaves(series, index, width, height)
        for path, turn in zip(files, (None, *TURNS), strict=False):
            (image if turn is None else image.transpose(turn)).save(path, compress_level=1)

    list(in_parallel(write, jobs, len(jobs), f"writing originals of {width}x{height}", say))
    return f"folder:{folder}"
