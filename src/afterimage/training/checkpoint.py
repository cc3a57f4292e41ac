"""Tensors on disk, written completely or not at all: a run's best decoder, and the checkpoints of its training."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from afterimage.config import AfterimageError, utf8_path
from afterimage.models.decoders import decoder_digest
from afterimage.models.reconstructor import Encoders, Reconstructor, build_feature_decoder
from afterimage.runs.files import write_atomic
from afterimage.runs.results import UsedWeights
from afterimage.runs.run import Run
from afterimage.training.stored_features import build_encoders

CHECKPOINT, PREVIOUS = "checkpoint.safetensors", "checkpoint.previous.safetensors"


def save_decoder(path: Path, tensors: Mapping[str, Tensor], made_for: Mapping[str, Any]) -> None:
    """Write a decoder to a safetensors file; equal arguments give equal bytes.

    Args:
        path: the file
        tensors: its parameters and buffers by name
        made_for: sources, digests of the encoders' weights, that it was trained on, and of a decoder of one's own the
            digest of its code

    Raises:
        AfterimageError: the file cannot be written
    """
    write_atomic(path, save(plain(tensors), {"made_for": json.dumps(made_for, sort_keys=True)}))


def load_decoder(path: Path, made_for: Mapping[str, Any]) -> dict[str, Tensor]:
    """Read a decoder's parameters and buffers.

    Args:
        path: the file
        made_for: sources, digests of the encoders' weights, that it is used on, and of a decoder of one's own the
            digest of its code

    Raises:
        AfterimageError: the file is damaged, or was made for other features or by other code
    """
    tensors, metadata = load_tensors(path)
    try:
        stored = json.loads(metadata.get("made_for", "{}"))
        differing = {key: stored[key] for key in made_for if key in stored and stored[key] != made_for[key]}
    except (ValueError, TypeError, RecursionError) as error:
        raise AfterimageError(f"cannot read {path}: {error}") from None
    for key, value in differing.items():
        if key == "code":
            raise AfterimageError(
                f"{path} was made by other code: its decoder's file had the SHA-256 {value!s:.64}, and now has "
                f"{made_for[key]!s:.64}; bring that file back, or train again in another --output-dir"
            )
        raise AfterimageError(
            f"{path} was made for other features: its {key} are {value!s:.300}, but these are "
            f"{made_for[key]!s:.300}"
        )
    return tensors


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors and the metadata of a safetensors file.

    Raises:
        AfterimageError: the file is missing or damaged; the message names it
    """
    try:
        if path.exists() and not path.is_file():  # opening a named pipe would wait for ever
            raise OSError("it is not a regular file")
        with utf8_path(path) as name, safe_open(name, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise AfterimageError(f"cannot read {path}: {error}") from None


def save_checkpoint(run: Run, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write a checkpoint with its digest; the previous one is kept until this one is safe on disk.

    Args:
        run: the run
        tensors: tensors of decoder, best decoder and optimizer by name
        facts: everything else, as JSON values

    Raises:
        AfterimageError: the file cannot be written
    """
    stored, text = plain(tensors), json.dumps(facts)
    content = save(stored, {"facts": text, "sha256": _digest(stored, text)})
    write_atomic(run.file(CHECKPOINT), content, keep=run.file(PREVIOUS))


def load_checkpoints(run: Run, log: Callable[[str], None]) -> Iterator[tuple[dict[str, Tensor], dict]]:
    """Yield the tensors and facts of a run's undamaged checkpoints, newest first.

    Args:
        run: the run
        log: is told of damaged checkpoints
    """
    for name in (CHECKPOINT, PREVIOUS):
        path = run.file(name)
        if not path.exists():
            continue
        try:
            tensors, metadata = load_tensors(path)
            text = metadata.get("facts", "")
            if _digest(tensors, text) != metadata.get("sha256"):
                raise AfterimageError(f"{path} is damaged: its contents do not have its digest")
            try:
                facts = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise AfterimageError(f"{path} is damaged: {error}") from None
            if not (isinstance(facts, dict) and isinstance(facts.get("identity"), dict)):
                raise AfterimageError(f"{path} is damaged: it does not say which run it belongs to")
        except AfterimageError as error:
            log(f"{error}; it is not used")
        else:
            yield tensors, facts


def remove_checkpoints(run: Run) -> None:
    """Remove a run's checkpoints, if they can be removed."""
    for name in (CHECKPOINT, PREVIOUS):
        with contextlib.suppress(OSError):
            run.file(name).unlink()


def plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors as safetensors can store them: on the CPU and contiguous."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _digest(tensors: Mapping[str, Tensor], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return an optimizer's state as tensors by name, and its settings as JSON values."""
    state = optimizer.state_dict()
    tensors = {
        f"{index}.{key}": torch.as_tensor(value)
        for index, slot in state["state"].items()
        for key, value in slot.items()
    }
    groups = [
        {k: v for k, v in group.items() if not isinstance(v, Tensor)} for group in state["param_groups"]
    ]
    return tensors, {"param_groups": groups}


def unpack_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]
) -> None:
    """Load what `pack_optimizer` returned into an optimizer."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": facts["param_groups"]})
    # Fused kernels read parameter and state side by side in memory, and a checkpoint keeps no memory format.
    for parameter, slot in optimizer.state.items():
        for key, value in slot.items():
            if value.shape == parameter.shape:
                slot[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors with `prefix:` before their names."""
    return {f"{prefix}:{name}": tensor for name, tensor in tensors.items()}


def without_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose names begin with `prefix:`, without it."""
    start = f"{prefix}:"
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}


def load_reconstructor(run: Run | str | Path, *, weights: str | None = None) -> Reconstructor:
    """Rebuild a finished run's reconstructor from its folder, in evaluation mode.

    Args:
        run: the run or its folder
        weights: file or folder of the encoders' weights, with which a run of stored features gets its encoder; None
            for the run's own setting

    Raises:
        AfterimageError: the run has no decoder, the decoder was made for other features, or the encoders' weights are
            not those it was trained on
    """
    run = run if isinstance(run, Run) else Run.open(run)
    config = run.config
    path = run.file("decoder.safetensors")
    if not path.exists():
        raise AfterimageError(f"run {run.name} has no decoder yet (state: {run.state})")
    encoders = build_encoders(config, config.sources, weights=weights)
    _same_weights(run, encoders)
    try:
        sources = list(encoders.sources)
        made_for = {"sources": sources, "weights": encoders.weight_digests(sources)}
        if code := decoder_digest(config.decoder.name):
            made_for["code"] = code
        tensors = load_decoder(path, made_for)
        model = build_feature_decoder(config, encoders.specs)
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise AfterimageError(f"cannot load {path}: {error}") from None
    return Reconstructor(encoders, model).eval()


def _same_weights(run: Run, encoders: Encoders) -> None:
    if not run.has_result:
        return
    recorded = {weights.model: weights for weights in run.result.weights}
    for weights in encoders.weights_of(encoders.sources):
        before = recorded.get(weights.model, weights)
        if before.identity != weights.identity:
            raise AfterimageError(
                f"run {run.name} was trained on weights of {weights.model} with {_told(before)}, but these have "
                f"{_told(weights)}"
            )


def _told(weights: UsedWeights) -> str:
    return f"digest {weights.sha256[:12] or f'none: {weights.label}'} ({weights.location})"
