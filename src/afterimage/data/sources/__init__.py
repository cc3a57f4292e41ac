"""Sources of images by name, one kind per file."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from pathlib import Path

from afterimage.config import AfterimageError, unknown_choice_error
from afterimage.data.sampling import Source
from afterimage.data.sources.dead_leaves import read_dead_leaves
from afterimage.data.sources.div2k import read_div2k
from afterimage.data.sources.folder import read_folder
from afterimage.data.sources.huggingface import read_hub
from afterimage.data.sources.sample_images import read_photographs
from afterimage.data.sources.shards import read_parquet, read_webdataset
from afterimage.runtime.terminal import Progress, no_progress

SOURCES: dict[str, Callable[[str, Collection[str], Path, Progress], Source]] = {
    "folder": lambda path, *_: read_folder(path),
    "hf": lambda name, parts, *rest: read_hub(name, *rest),
    "webdataset": lambda pattern, parts, *rest: read_webdataset(pattern, *rest),
    "parquet": lambda pattern, parts, *rest: read_parquet(pattern, *rest),
    "div2k": read_div2k,
    "procedural": lambda count, parts, *_: read_dead_leaves(count, parts),
    "photographs": lambda *_: read_photographs(),
}
"""Readers of sources, by the word before the colon. Each takes the text after the colon, the splits that are used, the
cache folder and the progress callback."""
SOURCE_FORMATS = (
    "folder:PATH", "hf:NAME", "hf:NAME@REVISION:SPLIT", "webdataset:SHARDS", "parquet:SHARDS", "div2k", "div2k:PATH",
    "procedural", "procedural:COUNT", "photographs",
)  # fmt: skip


def read_source(name: str, parts: Collection[str], cache: Path, progress: Progress = no_progress) -> Source:
    """List the images of a source, without reading them.

    Args:
        name: the source, in one of `SOURCE_FORMATS`
        parts: the splits that are used, `train`, `test` or both. Only these are downloaded of DIV2K, and procedural
            images for `test` alone differ from those for training
        cache: folder for downloads and copies
        progress: called with the name of the current task, the amount done, and the total

    Raises:
        AfterimageError: the source is unknown, missing, empty or damaged; the message names it
    """
    kind, _, argument = name.partition(":")
    if any(s.startswith(f"{kind}:") for s in SOURCE_FORMATS) if kind and argument else kind in SOURCE_FORMATS:
        return SOURCES[kind](argument, parts, cache, progress)
    if name and os.path.isdir(os.path.expanduser(name)):
        raise AfterimageError(f"unknown source {name!r}; did you mean 'folder:{name}'?")
    raise unknown_choice_error("source", name, SOURCE_FORMATS)
