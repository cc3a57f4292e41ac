"""Sources by name: `folder:PATH`, `webdataset:SHARDS`, `parquet:SHARDS`, `div2k`, `procedural`, `photographs`."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

from afterimage.config import AfterimageError, unknown
from afterimage.data.sources.dead_leaves import DeadLeaves
from afterimage.data.sources.div2k import read_div2k
from afterimage.data.sources.folder import open_folder, read_folder
from afterimage.data.sources.sample_images import read_photographs
from afterimage.data.sources.shards import read_shards
from afterimage.data.splits import Source
from afterimage.runtime.threads import Progress

SHARDS = ("webdataset", "parquet")
INDEXED = ("folder", *SHARDS)
SOURCES = ("folder:PATH", "webdataset:SHARDS", "parquet:SHARDS", "div2k", "div2k:PATH", "procedural")


SOURCES += ("procedural:COUNT", "photographs")


DEFAULT_COUNT = 1000
MAX_COUNT = 1_000_000


def read_source(
    name: str,
    parts: Collection[str],
    cache: Path,
    progress: Progress | None = None,
    *,
    index_above: int | None = None,
) -> Source:
    """The images of a source, not yet read; those of shards, and of a folder with more than `index_above` images,
    through an index (None: of no folder).

    `parts` are those that are used, `train`, `test` or both: of DIV2K only these are downloaded, and
    procedural images that only test are another series than those that train.
    """
    kind, _, argument = name.partition(":")
    if kind == "folder" and argument:
        if index_above is None:
            return read_folder(argument)
        return open_folder(argument, cache, progress, above=index_above)
    if kind in SHARDS and argument:
        return read_shards(kind, argument, cache, progress)
    if kind == "div2k":
        return read_div2k(argument, parts, cache, progress)
    if kind == "procedural":
        count = _count(name, argument) if argument else DEFAULT_COUNT
        series = 0 if "train" in parts else 1
        return Source([DeadLeaves(series, index) for index in range(count)])
    if name == "photographs":
        return read_photographs()
    if name and os.path.isdir(os.path.expanduser(name)):
        raise AfterimageError(f"unknown source {name!r}; did you mean 'folder:{name}'?")
    raise unknown("source", name, SOURCES)


def _count(name: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 7 and 1 <= int(text) <= MAX_COUNT):
        raise AfterimageError(f"{name!r}: the count must be a whole number between 1 and {MAX_COUNT:,}")
    return int(text)
