"""Sources of many files with many images each: `webdataset:shard-{000..099}.tar`, `parquet:data/*.parquet`."""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from afterimage.config import AfterimageError, local_path
from afterimage.data.decode import BadImage, shown
from afterimage.data.names import TEST, TRAINING, VALIDATION, left_out, listed, nested_split, pooled_names
from afterimage.data.records import broken_images
from afterimage.data.shard_index import WINDOW_BYTES, Index, Rows, Shard, read_block
from afterimage.data.sources.parquet import ParquetShard, RowGroups
from afterimage.data.sources.tar import TarShard
from afterimage.data.splits import Source
from afterimage.runtime.threads import Progress

MAX_SHARDS = 100_000
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d{1,12})\.\.(\d{1,12})")


def read_shards(kind: str, pattern: str, cache: Path, progress: Progress | None = None) -> Source:
    """The images of all shards that a pattern with brace ranges and globs names; `kind` is webdataset or parquet.

    An id is the shard's path below the folder that holds all of them, and the image's name in it.
    """
    shards, root, notes, pooled = _opened(kind, pattern)
    found = {part: Rows(read_index(own, cache, progress)) for part, own in shards.items()}
    notes += left_out(sum((rows.index.others for rows in found.values()), Counter()))
    return Source(*map(found.get, (TRAINING, VALIDATION, TEST)), root, tuple(notes), tuple(pooled))


def count_images(kind: str, pattern: str) -> dict[str, int]:
    """How many images the shards of each part hold, by their lists of contents alone."""
    shards = _opened(kind, pattern)[0]
    return {part: sum(1 for shard in own for _ in shard.members()) for part, own in shards.items()}


def _opened(kind: str, pattern: str) -> tuple[dict[str, list[Shard]], Path, list[str], list[str]]:
    """The shards of each part (all under `TRAINING` where their names tell no split), the folder of all, notes, and the
    folders that are pooled.
    """
    paths = expand(pattern)
    root = Path(os.path.commonpath([path.parent for path in paths]))
    places = {path: path.relative_to(root).with_suffix("").parts for path in paths}
    depth, parts = nested_split(places.values()) or (0, {})
    part_of = {path: parts.get(places[path][depth], "") if parts else TRAINING for path in paths}
    chosen = {
        part: [path for path in paths if part_of[path] == part] for part in (TRAINING, VALIDATION, TEST)
    }
    chosen = {part: own for part, own in chosen.items() if own}
    notes = []
    if parts:
        told = (f"{part} images from {listed(_names(own, root), 3)}" for part, own in chosen.items())
        notes.append(f"split by the names of shards: {'; '.join(told)}")
    if beside := [path for path in paths if not part_of[path]]:
        notes.append(f"left out beside the shards of the split: {listed(_names(beside, root))}")
    pooled = [] if parts else pooled_names({place[:-1] for place in places.values()})
    groups = RowGroups(2 * WINDOW_BYTES)  # decoding ahead reaches into the next window
    opened: Callable[[Path, str], Shard] = (
        TarShard if kind == "webdataset" else lambda path, prefix: ParquetShard(path, prefix, groups)
    )
    shards = {
        part: [opened(path, f"{name}/") for path, name in zip(own, _names(own, root), strict=True)]
        for part, own in chosen.items()
    }
    return shards, root, notes, pooled


def _names(paths: list[Path], root: Path) -> list[str]:
    return [shown(path.relative_to(root)).replace(os.sep, "/") for path in paths]


def read_index(shards: list[Shard], cache: Path, progress: Progress | None = None) -> Index:
    """All shards listed and read through once, unless the cache knows them. Raises for images that are broken."""
    broken: list[BadImage] = []
    blocks = []
    for number, shard in enumerate(shards, 1):
        where = f" ({number} of {len(shards)})" if len(shards) > 1 else ""
        blocks.append(read_block(shard, cache, f"indexing {shown(shard.path.name)}{where}", broken, progress))
    if broken:
        raise broken_images(broken)
    return Index(blocks)


def expand(pattern: str) -> list[Path]:
    """The files that a pattern names: `{000..012}` and `{a,b}` first, then `*`, `?` and `[...]`, sorted, each once."""
    found: dict[Path, None] = {}
    for name in _expand_braces(local_path(pattern)):
        path = Path(name)
        if path.exists() or not glob.has_magic(name):
            if not path.is_file():
                raise AfterimageError(f"there is no file {shown(path)}")
            found[path.absolute()] = None
        else:
            found |= dict.fromkeys(
                Path(match).absolute() for match in sorted(glob.glob(name, recursive=True))
            )
        if len(found) > MAX_SHARDS:
            raise AfterimageError(f"{pattern!r} names more than {MAX_SHARDS:,} files")
    if not found:
        raise AfterimageError(f"no file matches {pattern!r}")
    return list(found)


def _expand_braces(pattern: str) -> list[str]:
    parts = _BRACES.split(pattern)  # text and what stands in braces, in turns
    choices = [_choices(part) if number % 2 else [part] for number, part in enumerate(parts)]
    total = 1
    for choice in choices:
        total *= len(choice)
    if total > MAX_SHARDS:
        raise AfterimageError(f"{pattern!r} names {total:,} files; at most {MAX_SHARDS:,} are read")
    return ["".join(combination) for combination in itertools.product(*choices)]


def _choices(text: str) -> list[str]:
    match = _RANGE.fullmatch(text)
    if match is None:
        return text.split(",") if "," in text else ["{" + text + "}"]
    first, last = int(match[1]), int(match[2])
    if last < first or last - first >= MAX_SHARDS:
        raise AfterimageError(f"{{{text}}} must go up, by at most {MAX_SHARDS:,} numbers")
    width = len(match[1])
    return [f"{number:0{width}}" for number in range(first, last + 1)]
