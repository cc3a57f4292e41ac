"""The atomically written checkpoint of a run's training, and loading of a finished run's reconstructor."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from afterimage.config import AfterimageError, printable_path
from afterimage.models.reconstructor import Reconstructor, load_trained_decoder
from afterimage.models.weight_files import load_tensors, to_safetensors_form
from afterimage.runs.files import write_atomic
from afterimage.runs.run import Run
from afterimage.training.feature_loader import build_encoders

CHECKPOINT = "checkpoint.safetensors"


def save_checkpoint(run: Run, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write a checkpoint of tensors and JSON values with its digest."""
    stored, text = to_safetensors_form(tensors), json.dumps(facts)
    write_atomic(run.file(CHECKPOINT), save(stored, {"facts": text, "sha256": _digest(stored, text)}))


def load_checkpoint(run: Run, log: Callable[[str], None]) -> tuple[dict[str, Tensor], dict] | None:
    """Return the tensors and facts of a run's checkpoint; None, with a message to `log`, if it is damaged."""
    path = run.file(CHECKPOINT)
    if not path.exists():
        return None
    try:
        tensors, metadata = load_tensors(path)
        text = metadata.get("facts", "")
        if _digest(tensors, text) != metadata.get("sha256"):
            raise ValueError("its contents do not have its digest")
        facts = json.loads(text)
        if not (isinstance(facts, dict) and isinstance(facts.get("identity"), dict)):
            raise ValueError("it does not say which run it belongs to")
    except (AfterimageError, ValueError, RecursionError) as error:
        log(f"{printable_path(path)} is damaged and not used: {error}")
        return None
    return tensors, facts


def remove_checkpoint(run: Run) -> None:
    """Remove a run's checkpoint; a file that cannot be removed stays."""
    with contextlib.suppress(OSError):
        run.file(CHECKPOINT).unlink()


def _digest(tensors: Mapping[str, Tensor], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return an optimizer's state as tensors by name (`INDEX.KEY`), and its settings as JSON values."""
    state = optimizer.state_dict()
    tensors = {
        f"{index}.{key}": torch.as_tensor(value)
        for index, slot in state["state"].items()
        for key, value in slot.items()
    }
    return tensors, {"param_groups": state["param_groups"]}


def unpack_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]
) -> None:
    """Load the state and settings that `pack_optimizer` returned into an optimizer."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": facts["param_groups"]})
    # Fused kernels need the same memory format for parameter and state, and a checkpoint does not store it.
    for parameter, slot in optimizer.state.items():
        for key, value in slot.items():
            if value.shape == parameter.shape:
                slot[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors with `prefix:` before their names."""
    return {f"{prefix}:{name}": tensor for name, tensor in tensors.items()}


def without_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose names begin with `prefix:`, with this prefix removed."""
    start = f"{prefix}:"
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}


def load_reconstructor(run: Run | str | Path, *, weights: str | None = None) -> Reconstructor:
    """Rebuild a finished run's reconstructor from its folder, in evaluation mode.

    Args:
        run: the run or its folder
        weights: file or folder of the encoders' weights, which also gives a run of stored features an encoder; None
            for the run's own setting

    Raises:
        AfterimageError: the run has no decoder, the decoder was made for other features, or the encoders' weights
            differ from those of the training
    """
    run = run if isinstance(run, Run) else Run.open(run)
    return load_trained_decoder(run, build_encoders(run.config, run.config.sources, weights=weights))
