"""WebDataset shards: images in uncompressed tar files, read where they lie and never unpacked."""

from __future__ import annotations

import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from afterimage.config import AfterimageError
from afterimage.data.decode import EXTENSIONS, MAX_BYTES, BadImage, reason, shown
from afterimage.data.file_digests import file_state
from afterimage.data.names import count_kind
from afterimage.data.shard_index import Member, Shard

MAX_MEMBERS = 10_000_000
MAX_HEADER = 2**20
_BLOCK = 512
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"(\xb5": "zstandard"}


class TarShard(Shard):
    """One tar file. An image's place is where its first byte lies."""

    def __init__(self, path: Path, prefix: str) -> None:
        self.path, self.prefix, self.others = path, prefix, Counter()

    def state(self) -> list[int]:
        return file_state(self.path)

    def members(self) -> Iterator[Member]:
        """The images, known by their extension, without hidden ones; all members and the file's end are checked."""
        try:
            with open(self.path, "rb") as file:
                yield from self._members(file)
        except (tarfile.TarError, OSError, ValueError, RecursionError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise AfterimageError(f"cannot read {shown(self.path)}: {reason(error)}") from None
            raise self._refused(f"is damaged or no tar file: {str(error) or type(error).__name__}") from None

    def _members(self, file: BinaryIO) -> Iterator[Member]:
        length = os.fstat(file.fileno()).st_size
        kind = _COMPRESSED.get(file.read(2))
        if kind is not None:
            raise self._refused(
                f"is compressed with {kind}; images in it cannot be found one by one: unpack it"
            )
        file.seek(0)
        seen, found, end = 0, 0, 0
        self.others.clear()
        with tarfile.open(fileobj=_Headers(file), mode="r:") as archive:
            while (member := archive.next()) is not None:
                archive.members.clear()  # tarfile would keep all of them
                seen += 1
                if seen > MAX_MEMBERS:
                    raise self._refused(f"has more than {MAX_MEMBERS:,} members")
                name = self._checked(member, end, length)
                end = member.offset_data + max(member.size, 0)
                suffix = os.path.splitext(name)[1].lower()
                if member.isfile() and suffix in EXTENSIONS and not _hidden(name):
                    found += 1
                    yield name.encode("utf-8", "surrogateescape"), member.offset_data, member.size
                elif member.isfile() and not _hidden(name):
                    count_kind(self.others, name)
            self._check_end(file, archive.offset, length)
        if not found:
            raise self._refused(f"holds no images among {seen:,} members; looked for {', '.join(EXTENSIONS)}")

    def _checked(self, member: tarfile.TarInfo, end: int, length: int) -> str:
        """The name of a harmless member."""
        shown_name = repr(shown(member.name))
        steps = member.name.removeprefix("./").split("/")
        if not (member.isfile() or member.isdir()) or member.issparse():
            raise self._refused(f"is not safe to read: its member {shown_name} is a link, a device or sparse")
        if member.name not in (".", "./") and any(step in ("", ".", "..") for step in steps):
            raise self._refused(f"is not safe to read: its member {shown_name} leads out of the folder")
        if member.size < 0 or member.offset_data < end:
            raise self._refused(f"is not safe to read: its member {shown_name} overlaps another")
        if member.offset_data + member.size > length:
            raise self._refused(f"was cut short: its member {shown_name} goes on after its end")
        image = member.isfile() and os.path.splitext(member.name)[1].lower() in EXTENSIONS
        if image and not 0 < member.size <= MAX_BYTES:
            size = "larger than 1 GiB" if member.size else "empty (0 bytes)"
            raise self._refused(f"has an image that cannot be read: {shown_name} is {size}")
        return "/".join(steps)

    def _check_end(self, file: BinaryIO, offset: int, length: int) -> None:
        """tarfile takes a damaged header for the end of the archive, and would lose all that comes after it."""
        file.seek(offset)
        if offset >= length:
            raise self._refused("was cut short: it has no mark at its end")
        while chunk := file.read(MAX_HEADER):
            if chunk.strip(b"\0"):
                raise self._refused(
                    f"is damaged: what stands at byte {offset:,} is neither a member nor the end"
                )

    def _refused(self, why: str) -> AfterimageError:
        return AfterimageError(f"{shown(self.path)} {why}")

    def read(self, name: bytes, place: int, size: int) -> bytes:
        try:
            with open(self.path, "rb", buffering=0) as file:
                file.seek(place)
                content = file.read(size)
        except OSError as error:
            raise BadImage(self.called(name), reason(error)) from None
        if len(content) != size:
            raise BadImage(self.called(name), "is cut short: the shard has changed")
        return content


class _Headers:
    """A file as tarfile may see it: headers of at most 1 MiB, whatever size a hostile one declares."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek, self.tell, self.name = file.seek, file.tell, file.name

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MAX_HEADER:
            raise tarfile.ReadError(f"a header declares {size:,} bytes")
        return self._file.read(size)


def _hidden(name: str) -> bool:
    return any(step.startswith(".") or step == "__MACOSX" for step in name.split("/"))
