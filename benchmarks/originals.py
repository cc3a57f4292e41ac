"""Write procedural images as PNG, the originals that both sides of a measurement read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from PIL import Image

from afterimage.runtime.terminal import Progress

TURNS = (
    Image.Transpose.FLIP_LEFT_RIGHT,
    Image.Transpose.FLIP_TOP_BOTTOM,
    Image.Transpose.ROTATE_180,
)


def write_originals(folder: Path, counts: Mapping[str, int], width: int, height: int, say: Progress) -> str:
    """Write dead leaves as PNG files.

    Each image is written unchanged, mirrored, upside down and rotated by 180 degrees, because making images takes
    longer than reading them.

    Args:
        folder: parent of one folder for each split
        counts: number of images by split, such as `train`
        width: width in pixels
        height: height in pixels
        say: called with the progress

    Returns:
        name of the data source, `folder:PATH`
    """
    from afterimage.data.sources.dead_leaves import dead_leaves
    from afterimage.runtime.process import parallel_map

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

    list(parallel_map(write, jobs, len(jobs), f"writing originals of {width}x{height}", say))
    return f"folder:{folder}"
