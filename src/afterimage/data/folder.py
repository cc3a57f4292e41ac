"""A folder of pictures, nested to any depth, with splits of its own or without."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from afterimage.config import AfterimageError
from afterimage.data.decode import EXTENSIONS, reason, shown
from afterimage.data.originals import FileOriginal
from afterimage.data.split import Source

_VALIDATION = ("validation", "val", "valid")


def read_folder(path: str) -> Source:
    """All pictures below a folder, known by their file extension; hidden and other files are left out.

    A folder with a `train` folder and a `test` or `validation` (or `val`, `valid`) folder is split by these,
    and what lies beside them is left out.
    """
    root = Path(os.path.expanduser(path))
    try:
        names = {entry.name.lower(): entry for entry in sorted(root.iterdir()) if entry.is_dir()}
    except (OSError, ValueError) as error:
        raise AfterimageError(f"cannot read the folder {shown(root)}: {reason(error)}") from None
    train, test = names.get("train"), names.get("test")
    validation = next((names[name] for name in _VALIDATION if name in names), None)
    if train is None or (test is None and validation is None):
        return Source(list_pictures(root, root), root=root)
    return Source(
        list_pictures(train, root),
        list_pictures(validation, root) if validation else None,
        list_pictures(test, root) if test else None,
        root=root,
    )


def list_pictures(folder: Path, root: Path) -> list[FileOriginal]:
    """The pictures below `folder`, sorted by id: the path below `root`. Raises where there are none."""
    found: dict[str, FileOriginal] = {}
    others: Counter[str] = Counter()
    for file in _walk(folder):
        if file.suffix.lower() not in EXTENSIONS:
            others[file.suffix.lower() or file.name] += 1
            continue
        name = shown(file.relative_to(root)).replace(os.sep, "/")
        while name in found:  # two names that differ only in bytes that are no text
            name += "~"
        found[name] = FileOriginal(name, file)
    if not found:
        kinds = ", ".join(f"{count} {shown(kind)}" for kind, count in others.most_common(5))
        raise AfterimageError(
            f"there are no pictures in {shown(folder)} or below it; looked for {', '.join(EXTENSIONS)}"
            + (f" and found only {kinds}" if kinds else "")
        )
    return [found[name] for name in sorted(found)]


def _walk(folder: Path) -> Iterator[Path]:
    """Files below a folder. Links to folders are followed, each folder once, so that a loop of links ends."""
    seen: set[tuple[int, int]] = set()

    def fail(error: OSError) -> None:
        raise AfterimageError(f"cannot read the folder {shown(error.filename)}: {reason(error)}")

    for current, folders, names in os.walk(folder, followlinks=True, onerror=fail):
        state = os.stat(current)
        if (state.st_dev, state.st_ino) in seen:
            folders.clear()
            continue
        seen.add((state.st_dev, state.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__MACOSX")
        yield from (Path(current, name) for name in sorted(names) if not name.startswith("."))
