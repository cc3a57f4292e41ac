"""Import what others wrote: `python/package.module:factory`, `python/path/to/file.py:factory`, or a library."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from afterimage.config import AfterimageError, first_line, local_path, split_provider, unknown
from afterimage.runs.files import sha256


def library(name: str) -> ModuleType:
    """Import a library that is an extra.

    Raises:
        AfterimageError: it is not installed
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise AfterimageError(
            f"{name}/... needs the library {name} ({first_line(error)}): pip install 'afterimage[{name}]'"
        ) from None


def call_factory(text: str, arguments: Mapping[str, Any] = {}, **options: Any) -> nn.Module:
    """Import a factory, a function or a class, and return what it makes.

    Args:
        text: `python/package.module:factory` or `python/path/to/file.py:factory`; the working folder is searched too
        arguments: its positional arguments, by what they are
        options: its keyword arguments

    Raises:
        AfterimageError: the factory cannot be imported, does not exist, takes other arguments, raises an error, or
            returns no `nn.Module`
    """
    where, name = _parts(text)
    try:
        module = _import(where)
        factory: Callable[..., Any] | None = getattr(module, name, None)
        if factory is None:
            names = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
            raise unknown(f"factory in {where}", name, names)
        _check_arguments(text, factory, arguments, options)
        made = factory(*arguments.values(), **options)
    except AfterimageError:
        raise
    except (Exception, SystemExit) as error:
        raise AfterimageError(f"{text} failed: {type(error).__name__}: {error}") from error
    if not isinstance(made, nn.Module):
        raise AfterimageError(f"{text} must return a torch.nn.Module, got {type(made).__name__}")
    return made


def source_digest(text: str) -> str:
    """Return the SHA-256 of the file that a factory is written in.

    Raises:
        AfterimageError: there is no such file
    """
    where, _ = _parts(text)
    _search_here()
    try:
        file = local_path(where) if where.endswith(".py") else importlib.util.find_spec(where).origin
        return sha256(Path(file))
    except (ImportError, AttributeError, TypeError, ValueError, OSError) as error:
        raise AfterimageError(f"{text} failed: {type(error).__name__}: {error}") from None


def _parts(text: str) -> tuple[str, str]:
    where, colon, name = split_provider(text)[1].rpartition(":")
    if not (where and colon and name):
        raise AfterimageError(
            f"{text!r} must be written python/package.module:factory, or python/FILE.py:factory"
        )
    return where, name


def _import(where: str) -> ModuleType:
    if where.endswith(".py"):
        file = Path(local_path(where))
        spec = importlib.util.spec_from_file_location(str(file), file)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # where dataclasses look for the names in annotations
        spec.loader.exec_module(module)
        return module
    _search_here()
    return importlib.import_module(where)


def _search_here() -> None:
    """Search the working folder for modules, as an installed command does not."""
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))


def _check_arguments(
    text: str, factory: Callable[..., Any], arguments: Mapping[str, Any], options: Mapping[str, Any]
) -> None:
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):  # written in C, and not described
        return
    try:
        signature.bind(*arguments.values(), **options)
    except TypeError as error:
        name = text.rpartition(":")[2]
        called = ", ".join([*arguments, *(f"{key}={value!r:.40}" for key, value in options.items())])
        raise AfterimageError(
            f"{text} is called as {name}({called}), but it is {name}{signature}: {error}"
        ) from None
