"""Read tensors from files of torch.save or pickle as data: nothing that a file names is imported or called.

A pickle is a list of instructions, which build containers, numbers and text, and call what the file names. Here
every name gives a stand-in of this module: for the functions that rebuild tensors and arrays one that does so, for
any other class or function a `PlaceholderObject` that does nothing. A checkpoint may thus hold settings and optimizer
states of any type beside its tensors.

`torch.load(weights_only=True)` refuses a whole file because of one such object, for example the
`argparse.Namespace` or NumPy number that most training scripts store, and reads no pickled arrays.
"""

from __future__ import annotations

import io
import pickle
import re
import struct
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from afterimage.config import utf8_path

MAGIC = 0x1950A86A20F9469CFC6C
"""Number at the start of each file that torch.save wrote before torch 1.6."""
DANGEROUS_NAMES = frozenset(
    ["os", "posix", "nt", "sys", "subprocess", "importlib", "runpy", "pty", "ctypes", "socket", "shutil", "code"]
    + [f"{module}.{name}" for module in ("builtins", "__builtin__")
       for name in ("eval", "exec", "execfile", "compile", "open", "input", "breakpoint", "__import__", "apply")]
)  # fmt: skip
"""Modules and functions that run commands; training never stores them, so files that name one are refused."""
DTYPES = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
"""torch's data types by their names in pickles."""
with warnings.catch_warnings():  # these classes are deprecated, but files name them
    warnings.simplefilter("ignore")
    STORAGES = {
        name: kind.dtype
        for name, kind in vars(torch).items()
        if name.endswith("Storage") and hasattr(kind, "dtype")
    }
STORAGES |= dict.fromkeys(("UntypedStorage", "_UntypedStorage"), torch.uint8)
"""Data types of torch's storage classes."""


class CorruptFileError(Exception):
    """Error for a file whose content does not match its beginning; the message says how."""


class UnsafePickleError(Exception):
    """Error for a file that names something that runs commands; the message is that name."""


class PlaceholderObject(dict):
    """Placeholder for an object of an unknown type, whose name is `kind`, with the items that were set on it.

    The parameters, buffers and children of a pickled `nn.Module` become its items, so that tensors have the
    same names as in the module's state dict.
    """

    kind = ""
    is_module = False

    def __new__(cls, *_: Any, **__: Any) -> PlaceholderObject:
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def __call__(self, *_: Any) -> PlaceholderObject:
        return type(self)()

    __hash__ = object.__hash__  # an object may be a key or a member of a set
    __eq__ = object.__eq__

    def extend(self, items: Any) -> None:
        """Drop the items of an object that is a list."""

    append = add = extend

    def __setstate__(self, state: Any) -> None:
        """Take over the tensors and children of a pickled module; the state of any other object is dropped."""
        if isinstance(state, dict) and isinstance(state.get("_modules"), dict):
            self.is_module, hidden = True, state.get("_non_persistent_buffers_set")
            for part in ("_parameters", "_buffers", "_modules"):
                if isinstance(items := state.get(part), dict):
                    self.update({k: v for k, v in items.items() if not (hidden and k in hidden)})


class Function:
    """Stand-in for a function in `BUILDERS`, which is called instead.

    It is a class, because a pickle can set attributes of a function, but not of a class with `__setstate__`.
    """

    build: ClassVar[Callable[..., Any]]

    def __new__(cls, *arguments: Any) -> Any:
        return cls.build(*arguments)

    def __setstate__(self, state: Any) -> None:
        """Ignore the state: a pickle may set attributes of a function."""


class Items(dict):
    """A dictionary of another class, such as an ordered one; its attributes are dropped."""

    def __setstate__(self, state: Any) -> None:
        """Drop the attributes."""


class Storage(NamedTuple):
    """Bytes that several tensors may share, and the type of their values."""

    untyped: torch.UntypedStorage
    dtype: torch.dtype


class DeferredTensor:
    """Tensor or NumPy array, whose content may be set later by the pickle.

    `tensor` is None if its values are not numbers.
    """

    kind = "Tensor"

    def __init__(self, tensor: Tensor | None = None) -> None:
        self.tensor = tensor

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, columns_first, content = state
        self.tensor = _from_bytes(content, dtype, shape, "F" if columns_first else "C").tensor


class _Dtype:
    """NumPy's description of a data type: kind and size, such as f4, and byte order."""

    def __init__(self, code: Any, *_: Any) -> None:
        self.code, self.order = str(code), "="

    def __setstate__(self, state: Any) -> None:
        self.order = str(state[1])

    def find(self) -> np.dtype | None:
        if not re.fullmatch(r"[biufc]\d{1,2}", self.code) or self.order not in "<>|=":
            return None
        return np.dtype(("=" if self.order == "|" else self.order) + self.code)


def _from_bytes(content: Any, dtype: Any, shape: Any, order: Any = "C") -> DeferredTensor:
    """Rebuild an array of numbers; one of text or objects has no tensor."""
    content = content.encode("latin1") if isinstance(content, str) else content
    found = dtype.find() if isinstance(dtype, _Dtype) else None
    if found is None or not isinstance(content, (bytes, bytearray)):
        return DeferredTensor()
    array = np.frombuffer(content, found).reshape(shape, order="F" if order == "F" else "C")
    return DeferredTensor(torch.from_numpy(array.astype(found.newbyteorder("="), order="C")))


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> DeferredTensor:
    """Rebuild a tensor; lazily negated or conjugated ones, marked at the end of `rest`, are left out."""
    if not isinstance(storage, Storage) or (len(rest) > 2 and rest[2]):
        return DeferredTensor()
    shape, steps, start = tuple(map(int, size)), tuple(map(int, stride)), int(offset)
    # torch would silently enlarge some storages if a tensor needs more values than they have.
    end = start + sum((n - 1) * step for n, step in zip(shape, steps, strict=True)) + 1
    if min((start, *shape, *steps)) < 0 or (
        0 not in shape and end * storage.dtype.itemsize > storage.untyped.nbytes()
    ):
        raise CorruptFileError("one of its tensors is larger than what is stored of it")
    return DeferredTensor(torch.empty((0,), dtype=storage.dtype).set_(storage.untyped, start, shape, steps))


def _tensor_as(
    storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *rest: Any
) -> DeferredTensor:
    if not isinstance(storage, Storage) or dtype not in DTYPES.values():
        return DeferredTensor()
    return _tensor(Storage(storage.untyped, dtype), offset, size, stride, grad, hooks, *rest)


BUILDERS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": Items,
    "collections.Counter": Items,
    "collections.defaultdict": lambda *_: Items(),
    "torch.Size": lambda size=(): tuple(size),
    # Bytes that pickle protocol 2 stored as text.
    "_codecs.encode": lambda text, encoding="latin1": text.encode("utf8" if encoding == "utf8" else "latin1"),
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_as,
    # A tensor of a subclass, or with attributes, becomes a plain one.
    "torch._tensor._rebuild_from_type_v2": lambda function, kind, arguments, *_: function(*arguments),
    "torch.storage._load_from_bytes": lambda content: read_stream(io.BytesIO(content), len(content)),
    "numpy.dtype": _Dtype,
    "numpy.core.multiarray._reconstruct": lambda *_: DeferredTensor(),
    "numpy.core.numeric._frombuffer": _from_bytes,
    **dict.fromkeys(("builtins.dict", "__builtin__.dict"), Items),
    **dict.fromkeys(("builtins.set", "__builtin__.set"), lambda items=(): set(items)),
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
}
"""Functions that may be called, by their names in pickles; no other function ever is."""


class Reader(pickle._Unpickler):
    """Python's own reader of pickles, in which every name gives a stand-in of this module.

    The compiled one would take any amount of memory that a file asks for.

    Args:
        stream: the file, at the position of the pickle
        persistent: function that returns an object stored outside the pickle, by its key
    """

    def __init__(self, stream: io.BufferedIOBase, persistent: Callable[[Any], Any] | None = None) -> None:
        super().__init__(stream, encoding="latin1")
        self.persistent = persistent

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}".replace("numpy._core.", "numpy.core.")
        if full in DANGEROUS_NAMES or module.partition(".")[0] in DANGEROUS_NAMES:
            raise UnsafePickleError(full)
        if full in DTYPES:
            return DTYPES[full]
        if full in BUILDERS:
            return type(full, (Function,), {"build": staticmethod(BUILDERS[full])})
        return type(full, (PlaceholderObject,), {"kind": full})

    def persistent_load(self, key: Any) -> Any:
        if self.persistent is None:
            raise CorruptFileError("it refers to tensors that another file holds")
        return self.persistent(key)

    def load_bytearray8(self) -> None:
        """Read bytes without setting aside the memory that the file claims for them."""
        self.append(bytearray(self.read(int.from_bytes(self.read(8), "little"))))

    dispatch: ClassVar = {**pickle._Unpickler.dispatch, pickle.BYTEARRAY8[0]: load_bytearray8}


def _storage_type(named: Any) -> torch.dtype:
    name = str(getattr(named, "kind", named)).rpartition(".")[2]
    if name not in STORAGES:
        raise CorruptFileError(f"it holds tensors of a type that is not known, {name}")
    return STORAGES[name]


def _bytes_of(dtype: torch.dtype, count: Any, limit: int) -> int:
    size = int(count) * dtype.itemsize
    if not 0 <= size <= limit:
        raise CorruptFileError(f"it says that {size:,} bytes of tensors follow, more than it has")
    return size


def read_stream(stream: io.BufferedIOBase, size: int) -> Any:
    """Read a plain pickle, or a file of torch.save before torch 1.6, whose tensors' bytes follow the pickle.

    Args:
        stream: the file
        size: its size in bytes

    Raises:
        UnsafePickleError: the file names something that runs commands
        Exception: the file is damaged; the type varies
    """
    first = Reader(stream).load()
    if first != MAGIC:
        return first
    Reader(stream).load(), Reader(stream).load()  # the version, and properties of the machine
    found: dict[Any, tuple[Tensor, torch.dtype]] = {}
    left = size

    def persistent(key: Any) -> Any:
        nonlocal left
        kind, *rest = key
        if kind == "module":  # a class, with its source text
            return rest[0]
        if kind != "storage":
            raise CorruptFileError(f"it refers to {kind!r}, which is no tensor")
        named, name, _, count, view = rest
        if view is not None:
            raise CorruptFileError("its tensors share memory in a way that torch no longer writes")
        dtype = _storage_type(named)
        if name not in found:
            found[name] = torch.empty(_bytes_of(dtype, count, left), dtype=torch.uint8), dtype
            left -= found[name][0].numel()
        return Storage(found[name][0].untyped_storage(), dtype)

    value = Reader(stream, persistent).load()
    for name in Reader(stream).load():
        content, dtype = found[name]
        (count,) = struct.unpack("<q", stream.read(8))
        if count * dtype.itemsize != content.numel():
            raise CorruptFileError(
                f"one of its tensors has {count:,} values, another number than its storage declares"
            )
        if content.numel() and stream.readinto(content.numpy()) != content.numel():
            raise CorruptFileError("it is cut short")
    return value


def read_archive(path: Path, archive: zipfile.ZipFile, folder: str) -> Any:
    """Read a file of torch.save since torch 1.6, a zip file with a pickle and a record of bytes per storage.

    Records are mapped from the file, so their bytes are read only when they are used.

    Args:
        path: path of the file
        archive: the same file, opened
        folder: the archive's only folder, with a slash at its end

    Raises:
        UnsafePickleError: the file names something that runs commands
        Exception: the file is damaged; the type varies
    """
    records = {info.filename: info for info in archive.infolist()}
    if any(info.compress_type != zipfile.ZIP_STORED for info in records.values()):
        raise CorruptFileError("its records are compressed, which torch.save never does")
    order = archive.read(f"{folder}byteorder") if f"{folder}byteorder" in records else b"little"
    with utf8_path(path) as name:
        whole = torch.UntypedStorage.from_file(name, False, path.stat().st_size)
    found: dict[str, Storage] = {}

    def persistent(key: Any) -> Any:
        kind, named, name, _, count = key[:5]
        if kind != "storage":
            raise CorruptFileError(f"it refers to {kind!r}, which is no tensor")
        dtype = _storage_type(named)
        if name not in found:
            info = records.get(f"{folder}data/{name}")
            if info is None:
                raise CorruptFileError(f"its record data/{name} is missing")
            size = _bytes_of(dtype, count, info.file_size)
            found[name] = Storage(_record(path, info, whole, size), dtype)
            if order.decode() != sys.byteorder:
                found[name].untyped.byteswap(dtype)
        return Storage(found[name].untyped, dtype)

    return Reader(io.BytesIO(archive.read(f"{folder}data.pkl")), persistent).load()


def _record(
    path: Path, info: zipfile.ZipInfo, whole: torch.UntypedStorage, size: int
) -> torch.UntypedStorage:
    with open(path, "rb") as stream:
        stream.seek(info.header_offset)
        header = stream.read(30)
    if header[:4] != b"PK\3\4":
        raise CorruptFileError(f"its record {info.filename} is not where it should be")
    start = info.header_offset + 30 + sum(struct.unpack("<2H", header[26:30]))
    if start + size > whole.nbytes():
        raise CorruptFileError("it is cut short")
    return whole[start : start + size]
