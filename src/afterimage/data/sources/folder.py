"""Read folders of images, nested to any depth, with or without folders for splits."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from afterimage.config import AfterimageError, join_names, local_path
from afterimage.data.decode import EXTENSIONS, error_reason, printable_path
from afterimage.data.originals import FileOriginal
from afterimage.data.sampling import (
    SELF_EXPLANATORY_NAMES,
    SPLIT_WORDS,
    TEST,
    TRAINING,
    VALIDATION,
    Source,
    file_extension,
    ignored_files_note,
    nested_split,
    pooled_names,
    split_names,
)

WORDS = frozenset(word for words in SPLIT_WORDS.values() for word in words)
Place = tuple[str, ...]
"""Path of a folder below the source's folder, as its parts."""


@dataclass(frozen=True)
class _Survey:
    """Names of images, counts of other files by kind, and errors of unreadable folders, each by the folder."""

    images: dict[Place, list[str]] = field(default_factory=dict)
    others: dict[Place, Counter[str]] = field(default_factory=dict)
    unreadable: dict[Place, str] = field(default_factory=dict)


def read_folder(path: str) -> Source:
    """List all images below a folder, recognised by their extensions; hidden and other files are left out.

    Folders whose names contain words for splits (`SPLIT_WORDS`), one for training and at least one for validation or
    test, become the splits. They may lie at any level (see `nested_split`). All images outside of them are left out.

    Raises:
        AfterimageError: the folder or one below it cannot be read, or there are no images
    """
    root = Path(local_path(path))
    try:
        with os.scandir(root) as entries:
            names = [entry.name for entry in entries if _is_folder(entry)]
    except (OSError, ValueError) as error:
        raise AfterimageError(
            f"cannot read the folder {printable_path(root)}: {error_reason(error)}"
        ) from None
    survey = _walk_folders(root)
    # A folder named `train` counts as a split even if it is empty, which is then reported as an error.
    top = {name for name in names if name.lower() in WORDS} | {place[0] for place in survey.images if place}
    depth, parts = (0, at_top) if (at_top := split_names(top)) else nested_split(survey.images) or (0, {})
    if not parts:
        found = _originals(root, survey, [root], lambda place: True)
        notes = ignored_files_note(_total(survey.others.values()))
        return Source(
            found,
            root=root,
            notes=tuple(notes),
            pooled=tuple(map(printable_path, pooled_names(survey.images))),
        )

    def part_of(place: Place) -> str | None:
        return parts.get(place[depth]) if len(place) > depth else None

    places = {place[: depth + 1] for place in survey.images} | {(name,) for name in top if depth == 0}
    folders = {
        part: [root.joinpath(*place) for place in sorted(places) if part_of(place) == part]
        for part in SPLIT_WORDS
        if part in parts.values()
    }
    notes = ignored_files_note(_total(kinds for place, kinds in survey.others.items() if part_of(place)))
    if depth or not SELF_EXPLANATORY_NAMES.issuperset(map(str.lower, parts)):
        told = {
            part: join_names([printable_path(folder.relative_to(root)) for folder in own])
            for part, own in folders.items()
        }
        what = "; ".join(f"{part} images from {own}" for part, own in told.items())
        notes.append(f"split by the names of folders: {what}")
    beside: Counter[str] = Counter()
    for place, own in survey.images.items():
        if not part_of(place):
            beside[printable_path(os.path.join(*place[: depth + 1])) if place else "the folder itself"] += (
                len(own)
            )
    if beside:
        told_beside = join_names([f"{count:,} in {place}" for place, count in beside.most_common()])
        notes.append(f"left out beside the folders of the split: {beside.total():,} images, {told_beside}")
    found = {
        part: _originals(root, survey, own, lambda place, part=part: part_of(place) == part)
        for part, own in folders.items()
    }
    return Source(*map(found.get, (TRAINING, VALIDATION, TEST)), root, tuple(notes))


def _total(counters: Iterable[Counter[str]]) -> Counter[str]:
    return sum(counters, Counter())


def _originals(
    root: Path, survey: _Survey, folders: list[Path], chosen: Callable[[Place], bool]
) -> list[FileOriginal]:
    """Return the images in the chosen places, sorted by id, the path below `root`; raise if there are none."""
    if closed := sorted(place for place in survey.unreadable if chosen(place)):
        raise AfterimageError(survey.unreadable[closed[0]])
    found: dict[str, FileOriginal] = {}
    for file in sorted("/".join((*p, name)) for p, own in survey.images.items() if chosen(p) for name in own):
        name = printable_path(file)
        name = file if name == file else name  # one string, not two, for each of a million images
        while name in found:  # names may differ only in bytes that are not text
            name += "~"
        found[name] = FileOriginal(name, root, file)
    if not found:
        others = _total(kinds for place, kinds in survey.others.items() if chosen(place))
        kinds = ", ".join(f"{count} {printable_path(kind)}" for kind, count in others.most_common(5))
        raise AfterimageError(
            f"there are no images in {printable_path(folders[0])} or below it; looked for {', '.join(EXTENSIONS)}"
            + (f" and found only {kinds}" if kinds else "")
        )
    return [found[name] for name in sorted(found)]


def _walk_folders(root: Path) -> _Survey:
    """Walk through a folder. Links to folders are followed, but each folder is read only once, so loops end."""
    survey, seen = _Survey(), set()
    waiting: list[Place] = [()]
    while waiting:
        place = waiting.pop()
        try:
            state = os.stat(root.joinpath(*place))
            if (state.st_dev, state.st_ino) in seen:
                continue
            seen.add((state.st_dev, state.st_ino))
            with os.scandir(root.joinpath(*place)) as entries:
                names = sorted((entry.name, _is_folder(entry)) for entry in entries if entry.name[0] != ".")
        except OSError as error:
            survey.unreadable[place] = (
                f"cannot read the folder {printable_path(error.filename)}: {error_reason(error)}"
            )
            continue
        for name, is_folder in names:
            if not is_folder and file_extension(name) in EXTENSIONS:
                survey.images.setdefault(place, []).append(name)
            elif not is_folder:
                survey.others.setdefault(place, Counter())[file_extension(name)] += 1
        waiting += ((*place, name) for name, is_folder in reversed(names) if is_folder and name != "__MACOSX")
    return survey


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, for example
        return False
