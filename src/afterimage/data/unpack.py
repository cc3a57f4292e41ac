"""Zip files unpacked without trusting their members."""

from __future__ import annotations

import os
import re
import shutil
import stat
import struct
import tempfile
import zipfile
import zlib
from pathlib import Path

from afterimage.config import AfterimageError
from afterimage.data.download import Archive, need_room
from afterimage.data.parallel import Progress

_PICTURE = re.compile(r"\d{4}\.png")
_CHUNK = 2**20


def unpack(archive: Archive, path: Path, folder: Path, progress: Progress | None = None) -> None:
    """Unpack the pictures of a zip file into `folder`, which appears whole or not at all.

    All members are checked before the first is written: a path that leads out of the folder, a link, an
    encrypted or doubled member, too many members or bytes are errors that name the member.
    """
    for leftover in folder.parent.glob(f".{folder.name}.*.part"):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        with zipfile.ZipFile(path) as file:
            members = check_members(archive, file)
            need_room(folder.parent, sum(member.file_size for member in members.values()))
            temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".part"))
            try:
                for done, (name, member) in enumerate(sorted(members.items()), 1):
                    _write(file, member, temporary / name)
                    if progress is not None:
                        progress(f"unpacking {archive.name}", done, len(members))
                temporary.chmod(0o755)
                os.replace(temporary, folder)
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise
    except (zipfile.BadZipFile, zlib.error, struct.error, EOFError, RuntimeError, ValueError) as error:
        raise AfterimageError(f"{path} is damaged: {error}") from None


def check_members(archive: Archive, file: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The pictures in a zip file by their bare names; raises unless every member is harmless."""

    def refuse(why: str) -> AfterimageError:
        return AfterimageError(f"{file.filename} is not safe to unpack: {why}")

    infos = file.infolist()
    if len(infos) > 2 * archive.pictures + 16:
        raise refuse(f"it has {len(infos):,} members")
    pictures: dict[str, zipfile.ZipInfo] = {}
    total = 0
    for member in infos:
        name, kind = member.filename, stat.S_IFMT(member.external_attr >> 16)
        steps = name.removesuffix("/").split("/")
        if any(step in ("", ".", "..") or "\\" in step or ":" in step for step in steps):
            raise refuse(f"its member {name!r} leads out of the folder")
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise refuse(f"its member {name!r} is a link or a device")
        if member.header_offset < 0:
            raise refuse(f"its member {name!r} begins before the file does")
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            # LZMA takes as much memory as the member says, up to 4 GiB.
            raise refuse(f"its member {name!r} is compressed by method {member.compress_type}")
        if member.flag_bits & 1:
            raise refuse(f"its member {name!r} is encrypted")
        total += member.file_size
        # PNG does not compress any further: an honest archive is about as large as what is in it.
        if total > 2 * archive.bytes:
            raise refuse(f"its member {name!r} takes it beyond {2 * archive.bytes:,} bytes")
        if _PICTURE.fullmatch(steps[-1]) and not member.is_dir():
            if steps[-1] in pictures:
                raise refuse(f"its member {name!r} is there twice")
            pictures[steps[-1]] = member
    if len(pictures) != archive.pictures:
        raise AfterimageError(f"{file.filename} holds {len(pictures)} pictures, expected {archive.pictures}")
    return pictures


def _write(file: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path) -> None:
    # zipfile gives at most the size that was declared, and checks the CRC-32 at the end.
    with file.open(member) as source, open(path, "wb") as target:
        shutil.copyfileobj(source, target, _CHUNK)
        target.flush()
        os.fsync(target.fileno())
    if path.stat().st_size != member.file_size:
        raise zipfile.BadZipFile(f"{member.filename!r} is shorter than declared")
