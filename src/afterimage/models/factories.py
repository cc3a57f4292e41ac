"""Import optional libraries, and users' factories such as `python/package.module:factory`."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from afterimage.config import AfterimageError, first_line, local_path, split_provider, unknown_choice_error
from afterimage.runs.files import sha256


def library(name: str) -> ModuleType:
    """Import an optional library, which an extra of this package installs.

    Raises:
        AfterimageError: the library is not installed
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise AfterimageError(
            f"{name}/... needs the library {name} ({first_line(error)}): pip install 'afterimage[{name}]'"
        ) from None


@contextlib.contextmanager
def quiet(name: str) -> Iterator[ModuleType]:
    """Import transformers or diffusers and silence its reports and progress bars in this block."""
    module = library(name)
    logging = module.utils.logging
    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield module
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


def call_factory(text: str, *arguments: Any, **options: Any) -> nn.Module:
    """Import a factory (a function or a class), call it and return the module that it makes.

    Args:
        text: `python/package.module:factory` or `python/path/to/file.py:factory`; the working folder is
            searched too
        arguments: positional arguments
        options: keyword arguments

    Raises:
        AfterimageError: the factory cannot be imported, does not exist, raises an error (also if it does not
            accept these arguments), or does not return an `nn.Module`
    """
    where, name = _parts(text)
    try:
        module = _import(where)
        factory: Callable[..., Any] | None = getattr(module, name, None)
        if factory is None:
            names = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
            raise unknown_choice_error(f"factory in {where}", name, names)
        made = factory(*arguments, **options)
    except AfterimageError:
        raise
    except (Exception, SystemExit) as error:
        raise AfterimageError(f"{text} failed: {type(error).__name__}: {error}") from error
    if not isinstance(made, nn.Module):
        raise AfterimageError(f"{text} must return a torch.nn.Module, got {type(made).__name__}")
    return made


def source_digest(text: str) -> str:
    """Return the SHA-256 of a factory's source file.

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
        sys.modules[spec.name] = module  # dataclasses look up the names in annotations here
        spec.loader.exec_module(module)
        return module
    _search_here()
    return importlib.import_module(where)


def _search_here() -> None:
    """Add the working folder to the module search path, which lacks it in an installed command."""
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
