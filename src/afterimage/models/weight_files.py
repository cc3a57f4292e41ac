"""Read files of weights by their content rather than their name, and write and read trained decoders."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from afterimage.config import AfterimageError, first_line, join_names, printable_path, utf8_path
from afterimage.models.unpickling import (
    CorruptFileError,
    DeferredTensor,
    PlaceholderObject,
    UnsafePickleError,
    read_archive,
    read_stream,
)
from afterimage.runs.files import write_atomic
from afterimage.runtime.hub import list_shards

VALID = "valid are safetensors, and state dicts that torch.save wrote"
"""The valid formats, for error messages."""
HEAD = 1024
"""Bytes at the beginning of a file that identify its format."""
MAX_HEADER = 100_000_000
"""Longest header that safetensors allows, in bytes."""
DEPTH = 12
"""Levels of nested containers that are searched for tensors."""


@dataclass(frozen=True)
class NamedTensors:
    """All tensors of a file, flat and in the order of the file.

    Attributes:
        file: the file's path
        tensors: tensors by full name, such as `state_dict.module.conv1.weight`
        containers: for each tensor the dictionary that it was in, as a prefix of its name such as
            `state_dict.`; empty for the outermost dictionary
        unread: types of the other objects in the file
    """

    file: str
    tensors: Mapping[str, Tensor]
    containers: Mapping[str, str]
    unread: tuple[str, ...] = ()

    def describe(self) -> str:
        """Describe the content for messages: the number of tensors, and the first names."""
        count = len(self.tensors)
        return f"it holds {count} tensor{'s' * (count != 1)}: {join_names(list(self.tensors))}"


def read_named_tensors(file: str | Path) -> NamedTensors:
    """Read a file of safetensors, a file of torch.save, a pickled dictionary of arrays, or an index of shards.

    Tensors of safetensors and of torch.save since torch 1.6 are mapped from the file when they are used.

    Raises:
        AfterimageError: the file has another format, is damaged, or holds no named tensors; the message
            describes its content
    """
    path = Path(file)
    try:
        with open(path, "rb") as stream:
            head = stream.read(HEAD)
        size = path.stat().st_size
    except OSError as error:
        raise AfterimageError(f"cannot read weights from {printable_path(path)}: {error.strerror}") from None
    try:
        content = _read(path, head, size)
    except AfterimageError:
        raise
    except UnsafePickleError as found:
        raise AfterimageError(
            f"{printable_path(path)} is no checkpoint of plain tensors: it names {found}, which runs commands; "
            "nothing in it was run"
        ) from None
    except Exception as error:
        reason = (
            str(error)
            if isinstance(error, CorruptFileError)
            else f"{type(error).__name__}: {first_line(error)}"
        )
        raise AfterimageError(
            f"cannot read weights from {printable_path(path)}: it begins like a checkpoint, but is "
            f"damaged or truncated at {size:,} bytes ({reason}); download or save it again"
        ) from None
    return _named(path, content)


def _read(path: Path, head: bytes, size: int) -> Any:
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= MAX_HEADER:
        with utf8_path(path) as name:
            return load_file(name)
    if head[:4] == b"PK\3\4":
        return _read_zip(path)
    if head[:1] == b"\x80" and head[1:2] <= b"\5":
        with open(path, "rb") as stream:
            return read_stream(stream, size)
    if path.name.endswith(".index.json") and head.lstrip()[:1] == b"{":
        return {
            name: tensor
            for file in list_shards(path)
            for name, tensor in read_named_tensors(file).tensors.items()
        }
    raise AfterimageError(f"{printable_path(path)} holds no weights: {_kind_of(head, size)}; {VALID}")


def _read_zip(path: Path) -> Any:
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile:
        raise CorruptFileError("the list at the end of a zip file is missing") from None
    with archive:
        names = archive.namelist()
        pickles = [name for name in names if re.fullmatch(r"[^/]+/data\.pkl", name)]
        if not pickles:
            raise AfterimageError(
                f"{printable_path(path)} holds no weights: it is a zip file of {len(names)} files "
                f"({join_names(names)}); "
                f"if weights are inside, unpack it; {VALID}"
            )
        folder = pickles[0].removesuffix("data.pkl")
        if f"{folder}constants.pkl" in names:
            raise AfterimageError(
                f"{printable_path(path)} is a TorchScript archive, a program with its weights, which is "
                "not run; save its "
                f"tensors with safetensors.torch.save_file(torch.jit.load(FILE).state_dict(), FILE); {VALID}"
            )
        return read_archive(path, archive, folder)


def _kind_of(head: bytes, size: int) -> str:
    """Describe a file that is not a checkpoint."""
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if not size:
        return "it is empty"
    if start.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer to the file; fetch that with `git lfs pull`"
    if re.match(rb"<(!doctype|html|head|body|\?xml)", start, re.IGNORECASE):
        return "it is a web page, saved in place of the file; download that again"
    return f"its {size:,} bytes begin with {head[:40]!r}, which no known format does"


def _named(path: Path, content: Any) -> NamedTensors:
    """Flatten the content of a file. A container that occurs in several places is listed at the first one."""
    tensors: dict[str, Tensor] = {}
    containers: dict[str, str] = {}
    unread: dict[str, None] = {}
    seen: set[int] = set()

    def visit(value: Any, prefix: str, container: str, depth: int) -> None:
        if isinstance(value, PlaceholderObject) and not value and not value.is_module:
            unread[value.kind] = None
        if not isinstance(value, (dict, list, tuple)) or id(value) in seen or depth > DEPTH:
            return
        seen.add(id(value))
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            found = item.tensor if isinstance(item, DeferredTensor) else item
            name = f"{prefix}{key}"
            if not isinstance(found, Tensor):
                # The children of a pickled module extend the names of its tensors; they are not containers.
                inside = isinstance(value, PlaceholderObject) and isinstance(found, PlaceholderObject)
                visit(found, f"{name}.", container if inside else f"{name}.", depth + 1)
            elif isinstance(value, dict) and isinstance(key, str):
                if name in tensors:
                    raise AfterimageError(f"{printable_path(path)} holds two tensors that are called {name}")
                tensors[name], containers[name] = found, container

    visit(content, "", "", 0)
    if not tensors:
        keys = (
            f" with {join_names([str(key) for key in content])}"
            if isinstance(content, dict) and content
            else ""
        )
        others = f"; not read, as they are no tensors: {join_names(list(unread))}" if unread else ""
        kind = getattr(content, "kind", type(content).__name__)
        raise AfterimageError(
            f"{printable_path(path)} holds no named tensors: it is a {kind}{keys}{others}; {VALID}"
        )
    return NamedTensors(str(path), tensors, containers, tuple(unread))


def save_decoder(path: Path, tensors: Mapping[str, Tensor], feature_identity: Mapping[str, Any]) -> None:
    """Write a decoder to a safetensors file; equal arguments give equal bytes.

    Args:
        path: the file
        tensors: its parameters and buffers by name
        feature_identity: identity of the features that it was trained on: their sources, the digests of the
            encoders' weights, and for a decoder from outside this package the digest of its code

    Raises:
        AfterimageError: the file cannot be written
    """
    write_atomic(
        path, save(to_safetensors_form(tensors), {"made_for": json.dumps(feature_identity, sort_keys=True)})
    )


def load_decoder(path: Path, feature_identity: Mapping[str, Any]) -> dict[str, Tensor]:
    """Read a decoder's parameters and buffers.

    Args:
        path: the file
        feature_identity: the same of the features that it will be used with

    Raises:
        AfterimageError: the file is damaged, or was made for other features or by other code
    """
    tensors, metadata = load_tensors(path)
    try:
        stored = json.loads(metadata.get("made_for", "null"))
        if not isinstance(stored, dict):
            raise ValueError("it does not say which features it was made for")
    except (ValueError, RecursionError) as error:
        raise AfterimageError(f"cannot read {printable_path(path)}: {error}") from None
    for key, value in feature_identity.items():
        if stored.get(key) == value:
            continue
        if key == "code":
            raise AfterimageError(
                f"{printable_path(path)} was made by other code: its decoder's file had the SHA-256 "
                f"{stored.get(key)!s:.64}, and now has {value!s:.64}; bring that file back, or train again in "
                "another --output-dir"
            )
        raise AfterimageError(
            f"{printable_path(path)} was made for other features: its {key} are "
            f"{stored.get(key)!s:.300}, but these are "
            f"{value!s:.300}"
        )
    return tensors


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors and the metadata of a safetensors file.

    Raises:
        AfterimageError: the file is missing or damaged; the message names it
    """
    try:
        if path.exists() and not path.is_file():  # opening a named pipe would block forever
            raise OSError("it is not a regular file")
        with utf8_path(path) as name, safe_open(name, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise AfterimageError(f"cannot read {printable_path(path)}: {error}") from None


def to_safetensors_form(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors in the form that safetensors can store: on the CPU and contiguous."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
