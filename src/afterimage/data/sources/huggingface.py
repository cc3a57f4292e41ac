"""Read datasets of the Hugging Face hub: `hf:NAME[@REVISION][:SPLIT]`.

The library `datasets` (`pip install 'afterimage[datasets]'`) copies them into memory-mapped Arrow files in the cache,
from which images can be read in any order.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from afterimage.config import AfterimageError, join_names, unknown_choice_error
from afterimage.data.decode import MAX_BYTES, BadImage, printable_path, read_bytes
from afterimage.data.originals import EncodedOriginal
from afterimage.data.sampling import (
    SELF_EXPLANATORY_NAMES,
    TEST,
    TRAINING,
    VALIDATION,
    Source,
    split_names,
)
from afterimage.runtime.hub import check_file_exists, explain_refusal
from afterimage.runtime.terminal import Progress, no_progress

if TYPE_CHECKING:
    import datasets

COLUMNS = ("image", "img", "jpg", "png", "bytes")
"""Names of image columns; the first of them is used if several columns may hold images."""
_HUB = re.compile(r"([^@:]+)(?:@([^:]+))?(?::(.+))?")


@dataclass(frozen=True, eq=False)
class ImageTable:
    """Images of a memory-mapped table.

    Attributes:
        table: the table
        column: name of the column with images
        fingerprint: text that changes when the table does
        root: text before the images' ids in messages
        file_roots: folders that hold the image files which rows may refer to, as tables of image folders on the hub do
    """

    table: datasets.Dataset
    column: str
    fingerprint: str
    root: str
    file_roots: tuple[Path, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class RowOriginal(EncodedOriginal):
    """Image in a row of a table, as bytes or as the path of a file."""

    id: str
    images: ImageTable
    row: int

    @property
    def name(self) -> str:
        return f"{self.images.root}/{self.id}"

    def fingerprint(self) -> str:
        return f"{self.images.fingerprint} {self.row}"

    def read(self) -> bytes:
        images = self.images
        found = images.table[self.row][images.column] or {}
        content, path = found.get("bytes"), Path(os.path.normpath(found.get("path") or ""))
        if not content and any(map(path.is_relative_to, images.file_roots)):
            content = read_bytes(path)
        if not content:
            raise BadImage(self.name, f"has no bytes in the column {images.column}")
        if len(content) > MAX_BYTES:
            raise BadImage(self.name, "is larger than 1 GiB")
        return content


def read_hub(name: str, cache: Path, progress: Progress = no_progress) -> Source:
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
        raise AfterimageError(f"{name!r} is not a dataset name: write hf:OWNER/NAME[@REVISION][:SPLIT]")
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
        raise unknown_choice_error(f"split of {repository}", chosen, splits)
    parts = {chosen: TRAINING} if chosen else split_names(splits) or dict.fromkeys(splits, TRAINING)
    found: dict[str, list[RowOriginal]] = {}
    for split, part in parts.items():
        images = find_images(splits[split], f"{repository}:{split}", f"hf:{repository}", below)
        rows = range(len(splits[split]))
        found.setdefault(part, []).extend(RowOriginal(f"{split}/{row:07d}", images, row) for row in rows)
    notes = []
    if len(found) > 1 and not SELF_EXPLANATORY_NAMES.issuperset(parts):
        told = (f"{part} images from {split}" for split, part in parts.items())
        notes.append(f"split by the names of splits: {'; '.join(told)}")
    elif len(found) == 1 and len(parts) > 1:
        notes.append(f"the images of the splits {join_names(sorted(parts))} are pooled and split at random")
    if not chosen and (beside := sorted(splits.keys() - parts.keys())):
        notes.append(f"left out beside the splits that are read: {join_names(beside)}")
    return Source(*map(found.get, (TRAINING, VALIDATION, TEST)), Path(f"hf:{name}"), tuple(notes))


def _from_hub(
    repository: str, revision: str | None, folder: Path, progress: Progress
) -> Mapping[str, datasets.Dataset]:
    library = import_datasets(f"hf:{repository}")
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError

    if not constants.HF_HUB_OFFLINE:
        try:
            check_file_exists(hf_hub_url(repository, "README.md", repo_type="dataset", revision=revision))
        except EntryNotFoundError:
            pass  # a README is not needed: dataset and revision exist
        except Exception as error:
            why = explain_refusal(repository, revision, error, "datasets/")
            if not hasattr(error, "response"):
                why += "; with HF_HUB_OFFLINE=1 the cached copy is used"
            raise AfterimageError(f"cannot read hf:{repository}: {why}") from None
    elif not folder.is_dir():
        raise AfterimageError(
            f"cannot read hf:{repository}: {printable_path(folder.parent)} has nothing of it at this "
            "revision, and nothing is "
            "downloaded, as HF_HUB_OFFLINE is set"
        )
    with preparing(f"hf:{repository}", progress):
        return library.load_dataset(f"hf://datasets/{repository}", revision=revision, cache_dir=str(folder))


def import_datasets(kind: str) -> ModuleType:
    try:
        import datasets
    except ImportError:
        what = f"the source '{kind}' needs the library datasets: pip install 'afterimage[datasets]'"
        raise AfterimageError(what) from None
    return datasets


@contextlib.contextmanager
def preparing(what: str, progress: Progress = no_progress) -> Iterator[None]:
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


def image_column(features: Mapping[str, Any], what: str) -> str:
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
        f"{what} has "
        f"{f'several columns of files ({join_names(found)})' if found else 'no column of images'}; images are "
        f"looked for in one of images or bytes, called {', '.join(COLUMNS)}; its columns: {', '.join(features)}"
    )


def find_images(
    table: datasets.Dataset, what: str, root: str, file_roots: tuple[Path, ...] = ()
) -> ImageTable:
    import datasets

    column = image_column(table.features, what)
    if not len(table):
        raise AfterimageError(f"{what}: no rows")
    files = [(file["filename"], os.stat(file["filename"]).st_mtime_ns) for file in table.cache_files]
    with preparing(what):
        table = table.select_columns(column).cast_column(column, datasets.Image(decode=False))
    return ImageTable(table, column, hashlib.sha256(repr(files).encode()).hexdigest(), root, file_roots)
