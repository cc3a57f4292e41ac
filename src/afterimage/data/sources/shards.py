"""Read local shards: Parquet and WebDataset (tar) files.

The library `datasets` copies them into memory-mapped Arrow files. Tar files are read here and not by the library's own
loader, which requires the same kinds of file under every key and takes a damaged header for the end of the file.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import lzma
import math
import os
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from afterimage.config import AfterimageError, first_line, join_names, local_path
from afterimage.data.decode import EXTENSIONS, MAX_BYTES, printable_path
from afterimage.data.originals import FileOriginal
from afterimage.data.sampling import (
    TEST,
    TRAINING,
    VALIDATION,
    Source,
    file_extension,
    ignored_files_note,
    nested_split,
    pooled_names,
)
from afterimage.data.sources.huggingface import (
    RowOriginal,
    find_images,
    image_column,
    import_datasets,
    preparing,
)
from afterimage.runtime.terminal import Progress, no_progress

if TYPE_CHECKING:
    pass

VERSION = 1  # version of the rows of tar files: increase it whenever the same file gives other rows
MAX_SHARDS = 100_000
BATCH = 100  # number of rows that are copied at a time
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d{1,12})\.\.(\d{1,12})")


def read_parquet(pattern: str, cache: Path, progress: Progress = no_progress) -> Source:
    """List the images of Parquet files with a Hugging Face image column or a column of bytes; ids are `FILE/ROW`.

    Args:
        pattern: the files, see `expand`
        cache, progress: see `read_source`

    Raises:
        AfterimageError: a file is missing or damaged, or has no column of images
    """
    return _read_shards(pattern, "parquet", _rows, cache, progress)


def read_webdataset(pattern: str, cache: Path, progress: Progress = no_progress) -> Source:
    """List the images of tar files, compressed or not, recognised by their extensions; ids are `FILE/MEMBER`.

    Args:
        pattern: the files, see `expand`
        cache, progress: see `read_source`

    Raises:
        AfterimageError: a file is missing, damaged or truncated, or has no images
    """
    return _read_shards(pattern, "webdataset", _members, cache, progress)


def _rows(paths: tuple[bytes, ...]) -> Iterator[dict[str, Any]]:
    """Yield every row of Parquet files: number of the file, name, and image."""
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as parquet

    total = 0
    for shard, path in enumerate(map(os.fsdecode, paths)):
        try:
            with parquet.ParquetFile(path) as file:
                column = image_column(
                    datasets.Features.from_arrow_schema(file.schema_arrow), printable_path(path)
                )
                batches = file.iter_batches(BATCH, columns=[column])
                images = itertools.chain.from_iterable(batch.column(0).to_pylist() for batch in batches)
                for row, image in enumerate(images):
                    content = (image.get("bytes") if isinstance(image, dict) else image) or b""
                    yield {"shard": shard, "name": f"{row:07d}", "image": {"bytes": content, "path": None}}
                total += file.metadata.num_rows
        except (pa.ArrowException, OSError) as error:
            raise AfterimageError(f"cannot read {printable_path(path)}: {first_line(error)}") from None
    if not total:
        raise AfterimageError(
            f"{join_names([printable_path(os.fsdecode(path)) for path in paths], 3)}: no rows"
        )


def _members(paths: tuple[bytes, ...]) -> Iterator[dict[str, Any]]:
    """Yield a row for each file in tar files: its name, and its content if it is an image. Skip hidden files."""
    for shard, path in enumerate(map(os.fsdecode, paths)):
        try:
            with tarfile.open(path) as archive:
                while (member := archive.next()) is not None:
                    archive.members.clear()  # otherwise tarfile keeps all members in memory
                    name = member.name.removeprefix("./")
                    hidden = any(step[:1] == "." or step == "__MACOSX" for step in name.split("/"))
                    if member.isdir() or hidden:
                        continue
                    row = {"shard": shard, "name": printable_path(name), "image": None}
                    if file_extension(name) in EXTENSIONS:
                        if not member.isreg() or member.size > MAX_BYTES:
                            what = "larger than 1 GiB" if member.isreg() else "a link or a device"
                            raise AfterimageError(f"{printable_path(path)}/{printable_path(name)}: is {what}")
                        row["image"] = {"bytes": archive.extractfile(member).read(), "path": None}
                    yield row
                _check_end(archive)
        except (tarfile.TarError, EOFError, OSError, ValueError, zlib.error, lzma.LZMAError) as error:
            raise AfterimageError(
                f"{printable_path(path)} is damaged or no tar file: {first_line(error)}"
            ) from None


def _check_end(archive: tarfile.TarFile) -> None:
    """Check that a tar file ends where its members end: tarfile takes a damaged header for the end of the file."""
    archive.fileobj.seek(archive.offset)
    rest = iter(lambda: archive.fileobj.read(2**20), b"")
    if (first := next(rest, None)) is None:
        raise tarfile.ReadError("it is truncated: the end-of-archive marker is missing")
    if first.strip(b"\0") or any(chunk.strip(b"\0") for chunk in rest):
        raise tarfile.ReadError(f"the data at byte {archive.offset:,} is neither a member nor the end")


def _read_shards(
    pattern: str,
    kind: str,
    rows: Callable[[tuple[bytes, ...]], Iterator[dict]],
    cache: Path,
    progress: Progress,
) -> Source:
    """Return the source of the files that a pattern names, split by the files' names where these give a split.

    `rows` yields the rows of files: number of the file, name, and image, which is None for a file of another kind.
    """
    library = import_datasets(kind)
    paths = expand(pattern)
    root = Path(os.path.commonpath([path.parent for path in paths]))
    names = {path: printable_path(path.relative_to(root)).replace(os.sep, "/") for path in paths}
    places = {path: path.relative_to(root).with_suffix("").parts for path in paths}
    depth, parts = nested_split(places.values()) or (0, {})
    part_of = {path: parts.get(places[path][depth], "") if parts else TRAINING for path in paths}
    every = {part: [p for p in paths if part_of[p] == part] for part in (TRAINING, VALIDATION, TEST)}
    chosen = {part: own for part, own in every.items() if own}
    notes = []
    if parts:
        told = (
            f"{part} images from {join_names([names[p] for p in own], 3)}" for part, own in chosen.items()
        )
        notes.append(f"split by the names of shards: {'; '.join(told)}")
    if beside := [names[path] for path in paths if not part_of[path]]:
        notes.append(f"left out beside the shards of the split: {join_names(beside)}")
    pooled = [] if parts else pooled_names({place[:-1] for place in places.values()})
    kinds = library.Value("int32"), library.Value("string"), library.Image(decode=False)
    found: dict[str, list[RowOriginal]] = {}
    others: Counter[str] = Counter()
    for part, own in chosen.items():
        what = join_names([printable_path(path) for path in own], 3)
        states = [FileOriginal("", path.parent, path.name).fingerprint() for path in own]
        with preparing(what, progress):
            table = library.Dataset.from_generator(
                rows,
                features=library.Features(zip(("shard", "name", "image"), kinds, strict=True)),
                gen_kwargs={"paths": tuple(map(os.fsencode, own))},  # a list would be split into parts
                cache_dir=str(cache / "datasets"),
                fingerprint=hashlib.sha256(repr((VERSION, states)).encode()).hexdigest()[:16],
            )
        images = find_images(table, what, printable_path(root))
        shards, members, are_images = (table.data.column(name) for name in ("shard", "name", "image"))
        each = zip(shards.to_pylist(), members.to_pylist(), are_images.is_valid().to_pylist(), strict=True)
        found[part] = []
        for row, (shard, name, is_image) in enumerate(each):
            if is_image:
                found[part].append(RowOriginal(f"{names[own[shard]]}/{name}", images, row))
            else:
                others[file_extension(name)] += 1
        if not found[part]:
            raise AfterimageError(
                f"{what}: no images among {len(table):,} files; looked for {', '.join(EXTENSIONS)}"
            )
    notes += ignored_files_note(others)
    return Source(*map(found.get, (TRAINING, VALIDATION, TEST)), root, tuple(notes), tuple(pooled))


def expand(pattern: str) -> list[Path]:
    """List the files that a pattern names, each once: expand `{000..012}` and `{a,b}`, then `*`, `?` and `[...]`.

    Raises:
        AfterimageError: a named file is missing, nothing matches, or the pattern names too many files
    """
    parts = _BRACES.split(local_path(pattern))  # alternately text and the content of braces
    choices = [_choices(part) if number % 2 else [part] for number, part in enumerate(parts)]
    if (total := math.prod(map(len, choices))) > MAX_SHARDS:
        raise AfterimageError(f"{pattern!r} names {total:,} files; at most {MAX_SHARDS:,} are read")
    found: dict[Path, None] = {}
    for name in map("".join, itertools.product(*choices)):
        if os.path.exists(name) or not glob.has_magic(name):
            if not os.path.isfile(name):
                raise AfterimageError(f"there is no file {printable_path(name)}")
            found[Path(name).absolute()] = None
        else:
            found |= {Path(match).absolute(): None for match in sorted(glob.glob(name, recursive=True))}
    if not found:
        raise AfterimageError(f"no file matches {pattern!r}")
    return list(found)


def _choices(text: str) -> list[str]:
    match = _RANGE.fullmatch(text)
    if match is None:
        return text.split(",") if "," in text else ["{" + text + "}"]
    first, last = map(int, match.groups())
    if last < first or last - first >= MAX_SHARDS:
        raise AfterimageError(f"{{{text}}} must go up, by at most {MAX_SHARDS:,} numbers")
    return [f"{number:0{len(match[1])}}" for number in range(first, last + 1)]
