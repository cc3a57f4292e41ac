"""Images in Parquet files as Hugging Face writes them: a column of `{bytes, path}`, or of bytes."""

from __future__ import annotations

import contextlib
from collections import Counter, OrderedDict
from collections.abc import Iterator
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

from afterimage.config import AfterimageError
from afterimage.data.decode import MAX_BYTES, BadImage, shown
from afterimage.data.file_digests import file_state
from afterimage.data.shard_index import Member, Shard

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq


MAX_GROUP = 2**30
_NAMES = ("image", "img", "image", "jpg", "png", "bytes")


class RowGroups:
    """Row groups of any shard that were read last: as many as `limit` bytes hold, and never fewer than two."""

    def __init__(self, limit: int) -> None:
        self._limit, self._lock = limit, Lock()
        self._held: OrderedDict[tuple[Path, int], pa.ChunkedArray] = OrderedDict()
        self._reading: dict[tuple[Path, int], Lock] = {}

    def get(self, shard: ParquetShard, group: int) -> pa.ChunkedArray:
        key = (shard.path, group)
        with self._lock:
            reading = self._reading.setdefault(key, Lock())
        with reading:  # others wait for the first that asks
            with self._lock:
                if key in self._held:
                    self._held.move_to_end(key)
                    return self._held[key]
            column = shard.group(group)
            with self._lock:
                self._held[key] = column
                while len(self._held) > 2 and sum(c.nbytes for c in self._held.values()) > self._limit:
                    self._held.popitem(last=False)
                self._reading.pop(key, None)
            return column


class ParquetShard(Shard):
    """One Parquet file. An image's place is its row group times 2^32 and its row in that."""

    def __init__(self, path: Path, prefix: str, groups: RowGroups) -> None:
        self.path, self.prefix, self._groups, self.others = path, prefix, groups, Counter()
        self._blocks: list[int] = []
        with self._file() as file:
            self.column, self._nested = self._find(file.schema_arrow)
            meta = file.metadata
            for number in range(meta.num_row_groups):
                own = meta.row_group(number)
                columns = (own.column(i) for i in range(own.num_columns))
                wanted = [c.total_uncompressed_size for c in columns if c.path_in_schema == self.column]
                self._blocks.append(max(1, sum(wanted)))
            self._rows = [meta.row_group(i).num_rows for i in range(meta.num_row_groups)]
        if self._blocks and max(self._blocks) > MAX_GROUP:
            raise AfterimageError(
                f"{shown(path)} has a row group of {max(self._blocks) / 2**30:.1f} GiB, which is read as a whole; "
                "write the file again with row groups of at most 1 GiB, best of 100 images (row_group_size=100)"
            )

    @property
    def blocks(self) -> list[int]:
        return self._blocks

    def state(self) -> list[int]:
        return file_state(self.path)

    def members(self) -> Iterator[Member]:
        """Every row is an image; its name is its number in the file."""
        number = 0
        for group, rows in enumerate(self._rows):
            for row in range(rows):
                yield b"%07d" % number, (group << 32) | row, 0
                number += 1
        if not number:
            raise AfterimageError(f"{shown(self.path)} has no rows")

    def read(self, name: bytes, place: int, size: int) -> bytes:
        group, row = place >> 32, place & (2**32 - 1)
        try:
            content = self._groups.get(self, group)[row].as_py()
        except IndexError:
            raise BadImage(self.called(name), "is gone: the shard has changed") from None
        except AfterimageError as error:
            raise BadImage(self.called(name), str(error)) from None
        if not content or len(content) > MAX_BYTES:
            why = "is larger than 1 GiB" if content else f"has no bytes in the column {self.column}"
            raise BadImage(self.called(name), why)
        return content

    def group(self, number: int) -> pa.ChunkedArray:
        """The images' bytes in one row group."""
        import pyarrow.compute as pc

        with self._file() as file:
            column = file.read_row_group(number, columns=[self.column], use_threads=False).column(0)
            return pc.struct_field(column, "bytes") if self._nested else column

    @contextlib.contextmanager
    def _file(self) -> Iterator[pq.ParquetFile]:
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ImportError:
            raise AfterimageError(
                "the source 'parquet' needs pyarrow: pip install 'afterimage[parquet]'"
            ) from None
        try:
            with pq.ParquetFile(self.path, memory_map=False) as file:
                yield file
        except (pa.ArrowException, OSError) as error:
            line = (str(error).splitlines() or [type(error).__name__])[0]
            raise AfterimageError(f"{shown(self.path)} is damaged or no Parquet file: {line:.300}") from None

    def _find(self, schema: pa.Schema) -> tuple[str, bool]:
        """The column with the images' bytes as Parquet calls it, and whether it lies in a struct."""
        import pyarrow as pa

        found: dict[str, tuple[str, bool]] = {}
        for field in schema:
            if pa.types.is_struct(field.type):
                inner = {
                    field.type.field(i).name: field.type.field(i).type for i in range(field.type.num_fields)
                }
                if "bytes" in inner and _binary(inner["bytes"]):
                    found[field.name] = f"{field.name}.bytes", True
            elif _binary(field.type):
                found[field.name] = field.name, False
        named = [name for name in _NAMES if name in found]
        if named or len(found) == 1:
            return found[named[0] if named else next(iter(found))]
        what = f"several columns of bytes ({', '.join(found)})" if found else "no column of bytes"
        raise AfterimageError(
            f"{shown(self.path)} has {what}; images are looked for in a column of {{bytes, path}} or of bytes, "
            f"called {', '.join(_NAMES)}; its columns: {', '.join(schema.names)}"
        )


def _binary(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
