"""Read Hugging Face datasets: `hf:NAME[@REVISION][:SPLIT]` of the hub, and local Parquet and WebDataset (tar) shards.

The library `datasets` (`pip install 'afterimage[datasets]'`) copies them into memory-mapped Arrow files in the cache,
from which images can be read in any order. Tar files are read here and not by the library's own loader, which requires
the same kinds of file under every key and takes a damaged header for the end of the file.
"""

from __future__ import annotations

import contextlib
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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from afterimage.config import AfterimageError, first_line, listed, local_path, unknown
from afterimage.data.decode import EXTENSIONS, MAX_BYTES, BadImage, read_bytes, shown
from afterimage.data.records import EncodedOriginal, FileOriginal
from afterimage.data.splits import (
    PLAIN,
    TEST,
    TRAINING,
    VALIDATION,
    Source,
    kind_of,
    left_out,
    nested_split,
    pooled_names,
    split_names,
)
from afterimage.runtime.hub import ask_for_file, refusal
from afterimage.runtime.terminal import Progress, silent

if TYPE_CHECKING:
    import datasets

VERSION = 1  # version of the rows of tar files: increase it whenever the same file gives other rows
MAX_SHARDS = 100_000
BATCH = 100  # number of rows that are copied at a time
COLUMNS = ("image", "img", "jpg", "png", "bytes")
"""Names of image columns; the first of them is used if several columns may hold images."""
_HUB = re.compile(r"([^@:]+)(?:@([^:]+))?(?::(.+))?")
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d{1,12})\.\.(\d{1,12})")


@dataclass(frozen=True, eq=False)
class Images:
    """Images of a memory-mapped table.

    Attributes:
        table: the table
        column: name of the column with images
        state: text that changes when the table does
        root: text before the images' ids in messages
        below: folders that hold the image files which rows may refer to, as tables of image folders on the hub do
    """

    table: datasets.Dataset
    column: str
    state: str
    root: str
    below: tuple[Path, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class RowOriginal(EncodedOriginal):
    """Image in a row of a table, as bytes or as the path of a file."""

    id: str
    images: Images
    row: int

    @property
    def name(self) -> str:
        return f"{self.images.root}/{self.id}"

    def state(self) -> str:
        return f"{self.images.state} {self.row}"

    def read(self) -> bytes:
        images = self.images
        found = images.table[self.row][images.column] or {}
        content, path = found.get("bytes"), Path(os.path.normpath(found.get("path") or ""))
        if not content and any(map(path.is_relative_to, images.below)):
            content = read_bytes(path)
        if not content:
            raise BadImage(self.name, f"has no bytes in the column {images.column}")
        if len(content) > MAX_BYTES:
            raise BadImage(self.name, "is larger than 1 GiB")
        return content


# The hub


def read_hub(name: str, cache: Path, progress: Progress = silent) -> Source:
    """List the images of a dataset on the hub; ids are `SPLIT/ROW`.

    Args:
        name: `NAME[@REVISION][:SPLIT]`. Without a split, the dataset's splits are used by their names, or pooled if
            their names do not include training and another split
        cache, progress: see `read_source`

    Raises:
        AfterimageError: the hub does not provide the dataset, or it has no images
    """
    from huggingface_hub import constants

    match = _HUB.fullmatch(name)
    if match is None:
        raise AfterimageError(f"{name!r} is no name of a dataset: write hf:OWNER/NAME[@REVISION][:SPLIT]")
    repository, revision, chosen = match.groups()
    # Use one folder per revision, because the library takes any cached revision when it is offline.
    folder = cache / "datasets" / hashlib.sha256(f"{repository}@{revision or ''}".encode()).hexdigest()[:24]
    try:
        splits = _from_hub(repository, revision, folder, progress)
    except AfterimageError as error:
        if not os.path.exists(repository):
            raise
        raise AfterimageError(
            f"{error}. hf: takes names of the hub; {repository} is on this machine: write parquet:FILES, "
            "webdataset:FILES or folder:PATH"
        ) from None
    below = folder.absolute(), Path(constants.HF_HUB_CACHE)
    if chosen is not None and chosen not in splits:
        raise unknown(f"split of {repository}", chosen, splits)
    parts = {chosen: TRAINING} if chosen else split_names(splits) or dict.fromkeys(splits, TRAINING)
    found: dict[str, list[RowOriginal]] = {}
    for split, part in parts.items():
        images = _images(splits[split], f"{repository}:{split}", f"hf:{repository}", below)
        rows = range(len(splits[split]))
        found.setdefault(part, []).extend(RowOriginal(f"{split}/{row:07d}", images, row) for row in rows)
    notes = []
    if len(found) > 1 and not PLAIN.issuperset(parts):
        told = (f"{part} images from {split}" for split, part in parts.items())
        notes.append(f"split by the names of splits: {'; '.join(told)}")
    elif len(found) == 1 and len(parts) > 1:
        notes.append(f"the images of the splits {listed(sorted(parts))} are pooled and split at random")
    if not chosen and (beside := sorted(splits.keys() - parts.keys())):
        notes.append(f"left out beside the splits that are read: {listed(beside)}")
    return Source(*map(found.get, (TRAINING, VALIDATION, TEST)), Path(f"hf:{name}"), tuple(notes))


def _from_hub(
    repository: str, revision: str | None, folder: Path, progress: Progress
) -> Mapping[str, datasets.Dataset]:
    library = _library(f"hf:{repository}")
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError

    if not constants.HF_HUB_OFFLINE:
        try:
            ask_for_file(hf_hub_url(repository, "README.md", repo_type="dataset", revision=revision))
        except EntryNotFoundError:
            pass  # a README is not needed: dataset and revision exist
        except Exception as error:
            why = refusal(repository, revision, error, "datasets/")
            if not hasattr(error, "response"):
                why += "; with HF_HUB_OFFLINE=1 what the cache has is taken"
            raise AfterimageError(f"cannot read hf:{repository}: {why}") from None
    elif not folder.is_dir():
        raise AfterimageError(
            f"cannot read hf:{repository}: {shown(folder.parent)} has nothing of it at this revision, and nothing is "
            "downloaded, as HF_HUB_OFFLINE is set"
        )
    with _prepared(f"hf:{repository}", progress):
        return library.load_dataset(f"hf://datasets/{repository}", revision=revision, cache_dir=str(folder))


# Local shards


def read_parquet(pattern: str, cache: Path, progress: Progress = silent) -> Source:
    """List the images of Parquet files with a Hugging Face image column or a column of bytes; ids are `FILE/ROW`.

    Args:
        pattern: the files, see `expand`
        cache, progress: see `read_source`

    Raises:
        AfterimageError: a file is missing or damaged, or has no column of images
    """
    return _read_shards(pattern, "parquet", _rows, cache, progress)


def read_webdataset(pattern: str, cache: Path, progress: Progress = silent) -> Source:
    """List the images of tar files, compressed or not, recognised by their extensions; ids are `FILE/MEMBER`.

    Args:
        pattern: the files, see `expand`
        cache, progress: see `read_source`

    Raises:
        AfterimageError: a file is missing, damaged or cut short, or has no images
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
                column = _column(datasets.Features.from_arrow_schema(file.schema_arrow), shown(path))
                batches = file.iter_batches(BATCH, columns=[column])
                images = itertools.chain.from_iterable(batch.column(0).to_pylist() for batch in batches)
                for row, image in enumerate(images):
                    content = (image.get("bytes") if isinstance(image, dict) else image) or b""
                    yield {"shard": shard, "name": f"{row:07d}", "image": {"bytes": content, "path": None}}
                total += file.metadata.num_rows
        except (pa.ArrowException, OSError) as error:
            raise AfterimageError(f"cannot read {shown(path)}: {first_line(error)}") from None
    if not total:
        raise AfterimageError(f"{listed([shown(os.fsdecode(path)) for path in paths], 3)}: no rows")


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
                    row = {"shard": shard, "name": shown(name), "image": None}
                    if kind_of(name) in EXTENSIONS:
                        if not member.isreg() or member.size > MAX_BYTES:
                            what = "larger than 1 GiB" if member.isreg() else "a link or a device"
                            raise AfterimageError(f"{shown(path)}/{shown(name)}: is {what}")
                        row["image"] = {"bytes": archive.extractfile(member).read(), "path": None}
                    yield row
                _check_end(archive)
        except (tarfile.TarError, EOFError, OSError, ValueError, zlib.error, lzma.LZMAError) as error:
            raise AfterimageError(f"{shown(path)} is damaged or no tar file: {first_line(error)}") from None


def _check_end(archive: tarfile.TarFile) -> None:
    """Check that a tar file ends where its members end: tarfile takes a damaged header for the end of the file."""
    archive.fileobj.seek(archive.offset)
    rest = iter(lambda: archive.fileobj.read(2**20), b"")
    if (first := next(rest, None)) is None:
        raise tarfile.ReadError("it was cut short: it has no mark at its end")
    if first.strip(b"\0") or any(chunk.strip(b"\0") for chunk in rest):
        raise tarfile.ReadError(f"what stands at byte {archive.offset:,} is neither a member nor the end")


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
    library = _library(kind)
    paths = expand(pattern)
    root = Path(os.path.commonpath([path.parent for path in paths]))
    names = {path: shown(path.relative_to(root)).replace(os.sep, "/") for path in paths}
    places = {path: path.relative_to(root).with_suffix("").parts for path in paths}
    depth, parts = nested_split(places.values()) or (0, {})
    part_of = {path: parts.get(places[path][depth], "") if parts else TRAINING for path in paths}
    every = {part: [p for p in paths if part_of[p] == part] for part in (TRAINING, VALIDATION, TEST)}
    chosen = {part: own for part, own in every.items() if own}
    notes = []
    if parts:
        told = (f"{part} images from {listed([names[p] for p in own], 3)}" for part, own in chosen.items())
        notes.append(f"split by the names of shards: {'; '.join(told)}")
    if beside := [names[path] for path in paths if not part_of[path]]:
        notes.append(f"left out beside the shards of the split: {listed(beside)}")
    pooled = [] if parts else pooled_names({place[:-1] for place in places.values()})
    kinds = library.Value("int32"), library.Value("string"), library.Image(decode=False)
    found: dict[str, list[RowOriginal]] = {}
    others: Counter[str] = Counter()
    for part, own in chosen.items():
        what = listed([shown(path) for path in own], 3)
        states = [FileOriginal("", path.parent, path.name).state() for path in own]
        with _prepared(what, progress):
            table = library.Dataset.from_generator(
                rows,
                features=library.Features(zip(("shard", "name", "image"), kinds, strict=True)),
                gen_kwargs={"paths": tuple(map(os.fsencode, own))},  # a list would be split into parts
                cache_dir=str(cache / "datasets"),
                fingerprint=hashlib.sha256(repr((VERSION, states)).encode()).hexdigest()[:16],
            )
        images = _images(table, what, shown(root))
        shards, members, are_images = (table.data.column(name) for name in ("shard", "name", "image"))
        each = zip(shards.to_pylist(), members.to_pylist(), are_images.is_valid().to_pylist(), strict=True)
        found[part] = []
        for row, (shard, name, is_image) in enumerate(each):
            if is_image:
                found[part].append(RowOriginal(f"{names[own[shard]]}/{name}", images, row))
            else:
                others[kind_of(name)] += 1
        if not found[part]:
            raise AfterimageError(
                f"{what}: no images among {len(table):,} files; looked for {', '.join(EXTENSIONS)}"
            )
    notes += left_out(others)
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
                raise AfterimageError(f"there is no file {shown(name)}")
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


def _library(kind: str) -> ModuleType:
    try:
        import datasets
    except ImportError:
        what = f"the source '{kind}' needs the library datasets: pip install 'afterimage[datasets]'"
        raise AfterimageError(what) from None
    return datasets


@contextlib.contextmanager
def _prepared(what: str, progress: Progress = silent) -> Iterator[None]:
    """Hide the library's progress bars, and raise any of its errors as one `AfterimageError` that names `what`."""
    import datasets

    shows = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    progress(f"preparing {what}", 0, 1)
    try:
        yield
    except Exception as error:
        while error.__cause__ is not None and not isinstance(error, AfterimageError):
            error = error.__cause__  # the library may wrap the original error several times
        if isinstance(error, AfterimageError):
            raise error from None
        text = " ".join(str(error).split()) or type(error).__name__
        raise AfterimageError(f"cannot read {what}: {text:.500}") from None
    finally:
        if shows:
            datasets.enable_progress_bars()
    progress(f"preparing {what}", 1, 1)


def _column(features: Mapping[str, Any], what: str) -> str:
    """Return the name of the column with images: an image feature, `{bytes, path}` or bytes."""
    import datasets

    found = [
        name
        for name, feature in features.items()
        if isinstance(feature, datasets.Image)
        or (isinstance(feature, dict) and "bytes" in feature)
        or getattr(feature, "dtype", "") in ("binary", "large_binary")
    ]
    named = [name for name in COLUMNS if name in found]
    if named or len(found) == 1:
        return (named or found)[0]
    raise AfterimageError(
        f"{what} has {f'several columns of files ({listed(found)})' if found else 'no column of images'}; images are "
        f"looked for in one of images or bytes, called {', '.join(COLUMNS)}; its columns: {', '.join(features)}"
    )


def _images(table: datasets.Dataset, what: str, root: str, below: tuple[Path, ...] = ()) -> Images:
    import datasets

    column = _column(table.features, what)
    if not len(table):
        raise AfterimageError(f"{what}: no rows")
    files = [(file["filename"], os.stat(file["filename"]).st_mtime_ns) for file in table.cache_files]
    with _prepared(what):
        table = table.select_columns(column).cast_column(column, datasets.Image(decode=False))
    return Images(table, column, hashlib.sha256(repr(files).encode()).hexdigest(), root, below)
