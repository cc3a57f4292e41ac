"""Read tensors from files of torch.save or pickle as data: nothing that a file names is imported or called.

A pickle is a list of instructions. This module executes those that build containers, numbers, text, tensors
and arrays. Any other class or call in a file becomes an `Inert` placeholder that does nothing. A checkpoint
may thus hold settings and optimizer states of any type beside its tensors.

`torch.load(weights_only=True)` refuses a whole file because of one such object, for example the
`argparse.Namespace` or NumPy number that most training scripts store. Its list of permitted classes does not
help: it cannot fill dictionaries or lists of other classes, which settings often are, and it reads only
pickle's protocol 2, thus no pickled arrays.
"""

from __future__ import annotations

import io
import pickletools
import re
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from afterimage.config import utf8_path

MAGIC = 0x1950A86A20F9469CFC6C
"""Number at the start of each file that torch.save wrote before torch 1.6."""
CODE = frozenset(
    ["os", "posix", "nt", "sys", "subprocess", "importlib", "runpy", "pty", "ctypes", "socket", "shutil", "code"]
    + [f"{module}.{name}" for module in ("builtins", "__builtin__")
       for name in ("eval", "exec", "execfile", "compile", "open", "input", "breakpoint", "__import__", "apply")]
)  # fmt: skip
"""Modules and functions that run commands; training never stores them, so files that name one are refused."""
MAX_RATIO = 500
"""Largest factor by which a compressed record may grow when it is unpacked, against archives made to fill the
memory. torch.save does not compress records.
"""
DTYPES = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
"""torch's data types by their names in pickles."""
STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64, "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8, "_UntypedStorage": torch.uint8,
    # Quantised tensors are skipped, like all other special tensors.
    "QInt8Storage": torch.int8, "QUInt8Storage": torch.uint8, "QInt32Storage": torch.int32,
    "QUInt4x2Storage": torch.uint8, "QUInt2x4Storage": torch.uint8,
}  # fmt: skip
"""Data types of torch's storage classes."""


class Damaged(Exception):
    """Error for a file whose content does not match its beginning; the message says how."""


class HoldsCode(Exception):
    """Error for a file that names something that runs commands; the message is that name."""


class Global(NamedTuple):
    """A class or function that a pickle names; it is never imported."""

    name: str


class Inert(dict):
    """Placeholder for an object of an unknown type: the type's name, and the items that were set on the object.

    The parameters, buffers and children of a pickled `nn.Module` become its items, so that tensors have the
    same names as in the module's state dict.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.is_module = kind, False

    __hash__ = object.__hash__  # an object may be a key or a member of a set
    __eq__ = object.__eq__

    def set_state(self, state: Any) -> None:
        """Take over the tensors and children of a pickled module; the state of any other object is dropped."""
        if isinstance(state, dict) and isinstance(state.get("_modules"), dict):
            self.is_module, hidden = True, state.get("_non_persistent_buffers_set")
            for part in ("_parameters", "_buffers", "_modules"):
                if isinstance(items := state.get(part), dict):
                    self.update({k: v for k, v in items.items() if not (hidden and k in hidden)})


class Storage(NamedTuple):
    """Bytes that several tensors may share, and the type of their values."""

    untyped: torch.UntypedStorage
    dtype: torch.dtype


class _Dtype:
    """NumPy's description of a data type: kind and size, such as f4, and byte order."""

    def __init__(self, code: Any, *_: Any) -> None:
        self.code, self.order = str(code), "="

    def set_state(self, state: Any) -> None:
        self.order = str(state[1])

    def find(self) -> np.dtype | None:
        if not re.fullmatch(r"[biufc]\d{1,2}", self.code) or self.order not in "<>|=":
            return None
        return np.dtype(("=" if self.order == "|" else self.order) + self.code)


class _Array:
    """A NumPy array; its content follows later in the pickle."""

    def __init__(self, *_: Any) -> None:
        self.tensor: Tensor | None = None

    def set_state(self, state: Any) -> None:
        _, shape, dtype, columns_first, content = state
        self.tensor = _from_bytes(content, dtype, shape, "F" if columns_first else "C")


def _from_bytes(content: Any, dtype: Any, shape: Any, order: Any = "C") -> Tensor | None:
    """Return an array of numbers as a tensor; None for an array of text or objects."""
    content = content.encode("latin1") if isinstance(content, str) else content
    found = dtype.find() if isinstance(dtype, _Dtype) else None
    if found is None or not isinstance(content, (bytes, bytearray)):
        return None
    array = np.frombuffer(content, found).reshape(shape, order="F" if order == "F" else "C")
    return torch.from_numpy(array.astype(found.newbyteorder("="), order="C"))


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> Any:
    """Rebuild a tensor. Lazily negated or conjugated ones, marked at the end of `rest`, become an `Inert`."""
    if not isinstance(storage, Storage) or (len(rest) > 2 and rest[2]):
        return Inert("a tensor of another kind")
    shape, steps, start = tuple(map(int, size)), tuple(map(int, stride)), int(offset)
    # torch would silently enlarge some storages if a tensor needs more values than they have.
    end = start + sum((n - 1) * step for n, step in zip(shape, steps, strict=True)) + 1
    if min((start, *shape, *steps)) < 0 or (
        0 not in shape and end * storage.dtype.itemsize > storage.untyped.nbytes()
    ):
        raise Damaged("one of its tensors is larger than what is stored of it")
    return torch.empty((0,), dtype=storage.dtype).set_(storage.untyped, start, shape, steps)


def _tensor_as(
    storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *rest: Any
) -> Any:
    if not isinstance(storage, Storage) or dtype not in DTYPES.values():
        return Inert("a tensor of another kind")
    return _tensor(Storage(storage.untyped, dtype), offset, size, stride, grad, hooks, *rest)


def _pairs(*arguments: Any) -> dict:
    return dict(arguments[0]) if arguments and isinstance(arguments[0], (list, tuple, dict)) else {}


def _text_as_bytes(text: Any, encoding: Any = "latin1") -> bytes:
    """Return bytes that pickle protocol 2 stored as text."""
    return text.encode({"latin1": "latin1", "utf8": "utf8"}.get(encoding, "latin1"))


def _of_type(function: Any, kind: Any, arguments: Any, *_: Any) -> Any:
    """Rebuild a tensor of a subclass, or with attributes, as a plain tensor."""
    return _call(function, arguments)


BUILDERS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _pairs,
    "collections.Counter": _pairs,
    "collections.defaultdict": lambda *_: {},
    "builtins.dict": _pairs,
    "__builtin__.dict": _pairs,
    "builtins.set": lambda items=(): set(items),
    "__builtin__.set": lambda items=(): set(items),
    "torch.Size": lambda size=(): tuple(size),
    "_codecs.encode": _text_as_bytes,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_as,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
    "torch._utils._rebuild_xla_tensor": lambda data, *_: data,
    "torch._utils._rebuild_device_tensor_from_numpy": lambda data, *_: data,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": lambda data, *_: data,
    "torch._tensor._rebuild_from_type_v2": _of_type,
    "torch.storage._load_from_bytes": lambda content: read_stream(io.BytesIO(content), len(content)),
    "numpy.dtype": _Dtype,
    "numpy.core.multiarray._reconstruct": _Array,
    "numpy.core.numeric._frombuffer": _from_bytes,
}
"""Functions that may be called, by their names in pickles; no other function ever is."""


def _named(module: Any, name: Any) -> Any:
    if not isinstance(module, str) or not isinstance(name, str):
        raise Damaged("it names a class that is no text")
    full = f"{module}.{name}".replace("numpy._core.", "numpy.core.")
    if full in CODE or module.partition(".")[0] in CODE:
        raise HoldsCode(full)
    return DTYPES.get(full) or Global(full)


def _call(target: Any, arguments: Any) -> Any:
    if not isinstance(target, Global):
        return Inert(target.kind if isinstance(target, Inert) else type(target).__name__)
    if target.name not in BUILDERS:
        return Inert(target.name)
    return BUILDERS[target.name](*arguments)


class _Machine:
    """Interpreter of the instructions of one pickle, with a stack and a memo of values for later use."""

    def __init__(self, persistent: Callable[[Any], Any] | None) -> None:
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.persistent = persistent

    def marked(self) -> list[Any]:
        """Remove the last mark and return the values above it."""
        items, self.stack = self.stack, self.below.pop()
        return items

    def arguments(self, count: int) -> list[Any]:
        """Remove `count` values from the stack and return them."""
        if not 0 < count <= len(self.stack):
            raise Damaged("its instructions ask for values that are not there")
        taken = self.stack[-count:]
        del self.stack[-count:]
        return taken

    def set_items(self, items: list[Any]) -> None:
        """Set keys and values, which alternate, on the dictionary on top of the stack."""
        if isinstance(self.stack[-1], dict):
            self.stack[-1].update(zip(items[::2], items[1::2], strict=True))

    def add(self, items: list[Any]) -> None:
        """Add items to the list or set on top of the stack."""
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif isinstance(target, set):
            target.update(items)

    def persist(self, key: Any) -> Any:
        """Return an object that is stored outside the pickle."""
        if self.persistent is None:
            raise Damaged("it refers to tensors that another file holds")
        return self.persistent(key)

    def step(self, name: str, value: Any) -> None:
        """Execute one instruction."""
        stack = self.stack
        match name:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                self.below.append(stack)
                self.stack = []
            case "POP":
                self.stack.pop() if stack else self.marked()
            case "POP_MARK":
                self.marked()
            case "DUP":
                stack.append(stack[-1])
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name])
            case "EMPTY_DICT" | "EMPTY_LIST" | "EMPTY_TUPLE" | "EMPTY_SET":
                stack.append({"DICT": dict, "LIST": list, "TUPLE": tuple, "SET": set}[name[6:]]())
            case "DICT":
                items = self.marked()
                self.stack.append({})
                self.set_items(items)
            case "LIST" | "TUPLE" | "FROZENSET":
                items = self.marked()
                self.stack.append({"LIST": list, "TUPLE": tuple, "FROZENSET": frozenset}[name](items))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(self.arguments(int(name[-1]))))
            case "APPEND":
                self.add(self.arguments(1))
            case "APPENDS" | "ADDITEMS":
                self.add(self.marked())
            case "SETITEM":
                self.set_items(self.arguments(2))
            case "SETITEMS":
                self.set_items(self.marked())
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self.memo[value] = stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(self.memo[value])
            case "GLOBAL":
                stack.append(_named(*value.split(" ", 1)))
            case "STACK_GLOBAL":
                stack.append(_named(*self.arguments(2)))
            case "REDUCE" | "NEWOBJ":
                stack.append(_call(*self.arguments(2)))
            case "NEWOBJ_EX":
                target, arguments, _ = self.arguments(3)
                stack.append(_call(target, arguments))
            case "INST":
                arguments = self.marked()
                self.stack.append(_call(_named(*value.split(" ", 1)), arguments))
            case "OBJ":
                target, *arguments = self.marked()
                self.stack.append(_call(target, arguments))
            case "BUILD":
                (state,) = self.arguments(1)
                if isinstance(stack[-1], (Inert, _Array, _Dtype)):
                    stack[-1].set_state(state)
            case "PERSID":
                stack.append(self.persist(value))
            case "BINPERSID":
                stack.append(self.persist(*self.arguments(1)))
            case "EXT1" | "EXT2" | "EXT4":
                stack.append(Inert("an extension"))
            case "NEXT_BUFFER" | "READONLY_BUFFER":
                raise Damaged("it refers to arrays that another file holds")
            case _:  # numbers, text and bytes are values already
                stack.append(value)


def read_pickle(stream: io.BufferedIOBase, persistent: Callable[[Any], Any] | None = None) -> Any:
    """Read the pickle at the stream's position and return its value; the position moves to the pickle's end.

    Args:
        stream: the stream
        persistent: function that returns an object stored outside the pickle, by its key

    Raises:
        HoldsCode: the pickle names something that runs commands
        Exception: the pickle is damaged; the type varies
    """
    machine = _Machine(persistent)
    for opcode, value, _ in pickletools.genops(stream):
        if opcode.name == "STOP":
            return machine.stack.pop()
        machine.step(opcode.name, value)
    raise Damaged("it ends early")


def _storage_type(named: Any) -> torch.dtype:
    name = named.name.rpartition(".")[2] if isinstance(named, Global) else str(named)
    if name not in STORAGES:
        raise Damaged(f"it holds tensors of a type that is not known, {name}")
    return STORAGES[name]


def _bytes_of(dtype: torch.dtype, count: Any, limit: int) -> int:
    size = int(count) * dtype.itemsize
    if not 0 <= size <= limit:
        raise Damaged(f"it says that {size:,} bytes of tensors follow, more than it has")
    return size


def read_stream(stream: io.BufferedIOBase, size: int) -> Any:
    """Read a plain pickle, or a file of torch.save before torch 1.6, whose tensors' bytes follow the pickle.

    Args:
        stream: the file
        size: its size in bytes

    Raises:
        HoldsCode: the file names something that runs commands
        Exception: the file is damaged; the type varies
    """
    first = read_pickle(stream)
    if first != MAGIC:
        return first
    read_pickle(stream), read_pickle(stream)  # the version, and properties of the machine
    found: dict[Any, tuple[Tensor, torch.dtype]] = {}
    views: dict[Any, Storage] = {}
    left = size

    def persistent(key: Any) -> Any:
        nonlocal left
        kind, *rest = key
        if kind in ("module", b"module"):  # a class, with its source text
            return rest[0]
        if kind not in ("storage", b"storage"):
            raise Damaged(f"it refers to {kind!r}, which is no tensor")
        named, name, _, count, *view = rest
        dtype = _storage_type(named)
        if name not in found:
            found[name] = torch.empty(_bytes_of(dtype, count, left), dtype=torch.uint8), dtype
            left -= found[name][0].numel()
        whole = found[name][0].untyped_storage()
        if not view or view[0] is None:
            return Storage(whole, dtype)
        view_name, offset, length = view[0]
        start, end = (_bytes_of(dtype, number, whole.nbytes()) for number in (offset, offset + length))
        return views.setdefault(view_name, Storage(whole[start:end], dtype))

    value = read_pickle(stream, persistent)
    for name in read_pickle(stream):
        content, dtype = found[name]
        (count,) = struct.unpack("<q", stream.read(8))
        if count * dtype.itemsize != content.numel():
            raise Damaged(f"one of its tensors has {count:,} values and should have others")
        if content.numel() and stream.readinto(content.numpy()) != content.numel():
            raise Damaged("it is cut short")
    return value


def read_archive(path: Path, archive: zipfile.ZipFile, folder: str) -> Any:
    """Read a file of torch.save since torch 1.6, a zip file with a pickle and a record of bytes per storage.

    Uncompressed records are mapped from the file, so their bytes are read only when they are used.

    Args:
        path: path of the file
        archive: the same file, opened
        folder: the archive's only folder, with a slash at its end

    Raises:
        HoldsCode: the file names something that runs commands
        Exception: the file is damaged; the type varies
    """
    records = {info.filename: info for info in archive.infolist()}
    order = archive.read(f"{folder}byteorder") if f"{folder}byteorder" in records else b"little"
    with utf8_path(path) as name:
        whole = torch.UntypedStorage.from_file(name, False, path.stat().st_size)
    found: dict[str, Storage] = {}

    def persistent(key: Any) -> Any:
        kind, named, name, _, count = key[:5]
        if kind not in ("storage", b"storage"):
            raise Damaged(f"it refers to {kind!r}, which is no tensor")
        dtype = _storage_type(named)
        if name not in found:
            info = records.get(f"{folder}data/{name}")
            if info is None:
                raise Damaged(f"its record data/{name} is missing")
            size = _bytes_of(dtype, count, info.file_size)
            found[name] = Storage(_record(path, archive, info, whole, size), dtype)
            if order.decode() != sys.byteorder:
                found[name].untyped.byteswap(dtype)
        return Storage(found[name].untyped, dtype)

    return read_pickle(io.BytesIO(_unpacked(archive, records[f"{folder}data.pkl"])), persistent)


def _unpacked(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    if info.file_size > MAX_RATIO * max(info.compress_size, 4096):
        raise Damaged(f"its record {info.filename} grows to {info.file_size:,} bytes as it is unpacked")
    return archive.read(info)


def _record(
    path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo, whole: torch.UntypedStorage, size: int
) -> torch.UntypedStorage:
    if info.compress_type != zipfile.ZIP_STORED:
        content = bytearray(_unpacked(archive, info)[:size] or b"\0")
        return torch.frombuffer(content, dtype=torch.uint8).untyped_storage()
    with open(path, "rb") as stream:
        stream.seek(info.header_offset)
        header = stream.read(30)
    if header[:4] != b"PK\3\4":
        raise Damaged(f"its record {info.filename} is not where it should be")
    start = info.header_offset + 30 + sum(struct.unpack("<2H", header[26:30]))
    if start + size > whole.nbytes():
        raise Damaged("it is cut short")
    return whole[start : start + size]
