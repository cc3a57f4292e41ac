"""DIV2K: 800 photographs to train on and 100 to test on (Agustsson and Timofte, CVPRW 2017)."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from afterimage.config import AfterimageError, local_path
from afterimage.data.decode import reason
from afterimage.data.download import Archive, download, need_room, verify
from afterimage.data.files import locked
from afterimage.data.originals import FileOriginal
from afterimage.data.parallel import Progress
from afterimage.data.split import Source
from afterimage.data.unpack import unpack

BASE_URL = "https://data.vision.ee.ethz.ch/cvl/DIV2K/"
# Sizes and SHA-256 as TensorFlow Datasets records them for the official files.
_TRAIN = "9d0b9c463f6e35b6c62cc6a930ee2224f670b34c1df841a57670f9acf0f6c335"
_VALID = "20dd31fd84d777bc1cf5d6b7654a3f569c0aec74458ae094122ad1d0489900fc"
ARCHIVES = {
    "train": Archive("DIV2K_train_HR", 3_530_603_713, _TRAIN, 800),
    "test": Archive("DIV2K_valid_HR", 448_993_893, _VALID, 100),
}


def read_div2k(path: str, parts: Collection[str], cache: Path, progress: Progress | None = None) -> Source:
    """DIV2K from the folder `path`, which holds its archives or their unpacked folders; if empty, downloaded.

    The official validation pictures are the test split, as in the study. `parts` are those to get: `train`,
    `test`. What is downloaded or unpacked stays in the cache.
    """
    given = Path(local_path(path)) if path else None
    if given is not None and not given.is_dir():
        raise AfterimageError(f"there is no folder {given}")
    found: dict[str, list[FileOriginal]] = {}
    for part, archive in ARCHIVES.items():
        if part not in parts:
            continue
        try:
            folder = _unpacked(archive, given, cache / "div2k", progress)
            files = sorted(f for f in folder.iterdir() if re.fullmatch(r"\d{4}\.png", f.name))
        except OSError as error:
            where = error.filename or cache / "div2k"
            raise AfterimageError(f"cannot get {archive.name}: {where}: {reason(error)}") from None
        if len(files) != archive.pictures:
            raise AfterimageError(
                f"{folder} holds {len(files)} pictures, {archive.name} has {archive.pictures}; "
                f"complete or remove it, or use it as it is with folder:{folder}"
            )
        found[part] = [FileOriginal(file.stem, file) for file in files]
    return Source(found.get("train", ()), None, found.get("test"), root=given or cache / "div2k")


def _unpacked(archive: Archive, given: Path | None, kept: Path, progress: Progress | None) -> Path:
    """The folder with the archive's pictures; where there is none, one process at a time makes it."""
    if given is not None and (given / archive.name).is_dir():
        return given / archive.name
    file = (given or kept) / f"{archive.name}.zip"
    if given is not None and not file.is_file():
        raise AfterimageError(f"{given} holds neither the folder {archive.name} nor {archive.name}.zip")
    folder = kept / archive.name
    if folder.is_dir():
        return folder
    with locked(kept / f"{archive.name}.lock", f"getting {archive.name}"):
        if folder.is_dir():
            return folder
        if file.is_file():
            verify(archive, file, progress)
        else:
            need_room(kept, 2 * archive.bytes)
            download(archive, BASE_URL + file.name, file, progress)
        unpack(archive, file, folder, progress)
        if given is None:
            file.unlink()
    return folder
