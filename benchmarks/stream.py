"""Measure memory and time of streaming 1,000 to 100,000 small images, beside keeping them decoded."""

from __future__ import annotations

import contextlib
import io
import tarfile
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from unittest import mock

import numpy as np
from PIL import Image

from afterimage.config import DataConfig
from afterimage.config.errors import MAX_IMAGES
from afterimage.data import dataset
from afterimage.data.sampling import epoch_order
from afterimage.runtime.process import parallel_map
from afterimage.runtime.terminal import Progress
from benchmarks.child import in_child
from benchmarks.rows import Goal, Row
from benchmarks.settings import Settings

KINDS = ("webdataset", "folder")
SHARD = 5_000
SIDE = 32
BATCH = 32
MOST = 20_000
"""Largest number of training images in a measured epoch: enough to measure memory; decoding more would take long."""


def stream(settings: Settings) -> Iterator[Row]:
    """Measure the memory of one pass over 1,000 to 100,000 streamed images, beside the same images kept decoded."""
    counts = [200, 2_000] if settings.quick else [1_000, 10_000, 100_000]
    for kind in KINDS:
        yield _row(settings, kind, counts)


def _row(settings: Settings, kind: str, counts: Sequence[int]) -> Row:
    points: list[dict[str, float]] = []
    for count in counts:
        source = write_small(Path(settings.fresh("stream")), kind, count, settings.say)
        found = {}
        for name in ("streamed", "kept"):
            with settings.doing(f"{kind}: {count:,} images, {name}"):
                options = {"cache": settings.fresh("cache"), "streamed": name == "streamed", "most": MOST}
                found[name] = in_child("stream:passes", sources=[source], **options)
        (ours,), (kept,) = found["streamed"].value, found["kept"].value
        points.append(
            {
                "images": count,
                "MiB": found["streamed"].peak_bytes / 2**20,
                "MiB without mapped files": ours["anonymous"] / 2**20,
                "MiB kept": found["kept"].peak_bytes / 2**20,
                "s to read": ours["loading"],
                "images/s": ours["images"] / ours["seconds"],
                "images/s kept": kept["images"] / kept["seconds"],
            }
        )
    keys = ("MiB", "MiB without mapped files", "MiB kept")
    grown = {key: points[-1][key] - points[0][key] for key in keys}
    return Row(
        f"stream-{kind}",
        f"{kind}: memory without mapped files from {counts[0]:,} to {counts[-1]:,} images of {SIDE} px, streamed or "
        "decoded once",
        "MiB more",
        [grown["MiB without mapped files"]],
        [grown["MiB kept"]],
        goal=Goal("at most", 64.0),
        notes=[
            *("; ".join(f"{key} {value:,.4g}" for key, value in point.items()) for point in points),
            f"with mapped files, the pages of shards that were read: {grown['MiB']:,.4g} MiB more",
            "reference: our own decode-once cache with its mapped pixels, which the system may drop too",
            "memory, libraries included, of a process that reads, splits, checks and passes over up to "
            f"{MOST:,} training images (RssAnon, or its peak VmHWM, where there is /proc)",
        ],
        points=points,
    )


def passes(
    sources: Sequence[str], cache: str, streamed: bool, most: int | None = None
) -> list[dict[str, float]]:
    """Load each source and take one epoch's crops of its training images, or of `most` of them.

    Returns:
        seconds of loading and of the epoch, number of images, and peak anonymous memory in bytes, for each source
    """
    with contextlib.suppress(OSError):  # Linux: reset the peak memory, so that imports do not count
        Path("/proc/self/clear_refs").write_text("5")
    return [_pass(source, Path(cache), streamed, most) for source in sources]


def _pass(source: str, cache: Path, streamed: bool, most: int | None) -> dict[str, float]:
    started = time.perf_counter()
    with mock.patch.object(dataset, "STREAM_ABOVE", 0 if streamed else MAX_IMAGES):
        train = dataset.load_data(DataConfig(source, resize=SIDE, crop=SIDE), cache=cache).train
    loaded, images, own = time.perf_counter(), 0, anonymous_bytes()
    visit = epoch_order(len(train), 0, 0)[:most]
    for crops in train.batches((visit[i : i + BATCH] for i in range(0, len(visit), BATCH)), seed=0):
        images += len(crops)
        own = max(own, anonymous_bytes())
    seconds = time.perf_counter() - loaded
    return {"loading": loaded - started, "seconds": seconds, "images": images, "anonymous": own}


def anonymous_bytes() -> int:
    """Return this process's memory in bytes without mapped files, which the system may drop; 0 without /proc."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def write_small(folder: Path, kind: str, count: int, say: Progress) -> str:
    """Write JPEG images of random colours, as files or in tar files of `SHARD` images; return the source's name."""
    images = parallel_map(_small, range(count), count, f"writing {count:,} images: {kind}", say)
    for shard in range(0, count, SHARD):
        own = enumerate(islice(images, min(SHARD, count - shard)), shard)
        if kind == "folder":
            below = folder / f"{shard // SHARD:03}"
            below.mkdir()
            for number, image in own:
                (below / f"{number:07}.jpg").write_bytes(image)
            continue
        with tarfile.open(folder / f"{shard // SHARD:03}.tar", "w") as archive:
            for number, image in own:
                member = tarfile.TarInfo(f"{number:07}.jpg")
                member.size = len(image)
                archive.addfile(member, io.BytesIO(image))
                archive.members.clear()
    return f"folder:{folder}" if kind == "folder" else f"webdataset:{folder}/*.tar"


def _small(number: int) -> bytes:
    file = io.BytesIO()
    colours = np.random.default_rng(number).integers(0, 256, (4, 5, 3), np.uint8)
    Image.fromarray(colours).resize((SIDE * 5 // 4, SIDE)).save(file, "JPEG")
    return file.getvalue()
