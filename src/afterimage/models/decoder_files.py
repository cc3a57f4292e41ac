"""A trained decoder on disk: one safetensors file of its parameters and buffers, and what it was made for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from afterimage.config import AfterimageError, shown, utf8_path
from afterimage.runs.files import write_atomic


def save_decoder(path: Path, tensors: Mapping[str, Tensor], made_for: Mapping[str, Any]) -> None:
    """Write a decoder to a safetensors file; equal arguments give equal bytes.

    Args:
        path: the file
        tensors: its parameters and buffers by name
        made_for: its sources, the digests of the encoders' weights that it was trained on, and for a decoder
            from outside this package the digest of its code

    Raises:
        AfterimageError: the file cannot be written
    """
    write_atomic(path, save(plain(tensors), {"made_for": json.dumps(made_for, sort_keys=True)}))


def load_decoder(path: Path, made_for: Mapping[str, Any]) -> dict[str, Tensor]:
    """Read a decoder's parameters and buffers.

    Args:
        path: the file
        made_for: sources and digests of the encoders' weights that it will be used with, and for a decoder
            from outside this package the digest of its code

    Raises:
        AfterimageError: the file is damaged, or was made for other features or by other code
    """
    tensors, metadata = load_tensors(path)
    try:
        stored = json.loads(metadata.get("made_for", "null"))
        if not isinstance(stored, dict):
            raise ValueError("it does not say which features it was made for")
        differing = {key: stored.get(key) for key in made_for if stored.get(key) != made_for[key]}
    except (ValueError, TypeError, RecursionError) as error:
        raise AfterimageError(f"cannot read {shown(path)}: {error}") from None
    for key, value in differing.items():
        if key == "code":
            raise AfterimageError(
                f"{shown(path)} was made by other code: its decoder's file had the SHA-256 {value!s:.64}, and now has "
                f"{made_for[key]!s:.64}; bring that file back, or train again in another --output-dir"
            )
        raise AfterimageError(
            f"{shown(path)} was made for other features: its {key} are {value!s:.300}, but these are "
            f"{made_for[key]!s:.300}"
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
        raise AfterimageError(f"cannot read {shown(path)}: {error}") from None


def plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors in the form that safetensors can store: on the CPU and contiguous."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
