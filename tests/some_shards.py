"""Shards for tests: tar files and Parquet files of small images, and a tar header by hand."""

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path

from some_images import some_image


def image_bytes(seed: int, width: int = 40, height: int = 30, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    some_image(seed, width, height).save(file, kind)
    return file.getvalue()


def write_tar(path: Path, files: Mapping[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def write_shards(folder: Path, shards: int, each: int, first: int = 0) -> str:
    """Tar shards of PNG files with their labels, as WebDataset has them; returns the source's name."""
    for shard in range(shards):
        files = {}
        for number in range(first + shard * each, first + (shard + 1) * each):
            files[f"{number:06d}.png"] = image_bytes(number)
            files[f"{number:06d}.cls"] = b"1"
        write_tar(folder / f"shard-{shard:03d}.tar", files)
    return f"webdataset:{folder}/shard-{{000..{shards - 1:03d}}}.tar"


def write_parquet(folder: Path, shards: int, each: int, group: int, plain: bool = False) -> str:
    """Parquet shards as Hugging Face writes them, or with a column of plain bytes; returns the source's name."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        numbers = range(shard * each, (shard + 1) * each)
        rows = [image_bytes(n) for n in numbers]
        image = (
            rows if plain else [{"bytes": r, "path": f"{n}.png"} for n, r in zip(numbers, rows, strict=True)]
        )
        table = pa.table({"label": list(numbers), "image": image})
        pq.write_table(table, folder / f"train-{shard:05d}-of-{shards:05d}.parquet", row_group_size=group)
    return f"parquet:{folder}/train-*.parquet"


def header(name: str, size: bytes, kind: bytes = b"0") -> bytes:
    """A tar header with whatever size field, its checksum right."""
    block = bytearray(512)
    block[: len(name)] = name.encode()
    block[100:108], block[108:116], block[116:124] = b"0000644\0", b"0000000\0", b"0000000\0"
    block[124:136], block[136:148], block[148:156] = size, b"00000000000\0", b" " * 8
    block[156:157], block[257:265] = kind, b"ustar\x0000"
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)
