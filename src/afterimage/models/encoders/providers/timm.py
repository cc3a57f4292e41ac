"""Networks of timm: resolve their names, build them, and load weights into them."""

from __future__ import annotations

import functools
import inspect
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any
from unittest import mock

import timm
from timm.models import PretrainedCfg, _builder, get_pretrained_cfg
from timm.models._registry import _deprecated_models
from torch import Tensor, nn

from afterimage.config import HUB_PREFIX, AfterimageError, unknown_choice_error
from afterimage.models.encoders.providers.base import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Network,
    SkipInit,
    per_channel_values,
    seeded,
    vgg_pool_aliases,
)
from afterimage.models.encoders.tensor_layout import Size
from afterimage.models.weight_files import read_named_tensors
from afterimage.models.weights import Weights, search_weights
from afterimage.runtime.hub import read_config

FILES = ("model.safetensors", "pytorch_model.bin")
"""Names of the weights in a hub repository."""
_LOCK = threading.Lock()
"""Lock of timm's function that loads weights, which `TimmNetwork.load` replaces for a moment."""


@functools.cache
def resolve_model(name: str) -> str:
    """Return a timm model's name with the tag of its weights: the given one, or timm's default.

    A model without published weights has no tag and keeps its name. A hub repository, `OWNER/NAME` with or
    without `hf-hub:`, becomes the timm model whose weights it holds, or stays `OWNER/NAME`; its config.json
    then names the architecture.

    Raises:
        AfterimageError: the model, tag or repository is unknown
    """
    name = re.sub(HUB_PREFIX, "", name)
    if "/" in name:
        return _resolve_repository(name)
    architecture, _, tag = name.partition(".")
    architecture, _, current_tag = (_deprecated_models.get(architecture) or architecture).partition(".")
    tag = tag or current_tag
    if not timm.is_model(architecture):
        known = dict.fromkeys(model.partition(".")[0] for model in timm.list_models(pretrained=True))
        raise unknown_choice_error(
            "model", name, [model for model in known if name.lower() in model] or known, limit=8
        )
    if not tag:
        config = get_pretrained_cfg(architecture)
        return f"{architecture}.{config.tag}" if config is not None and config.tag else architecture
    pinned, known = f"{architecture}.{tag}", _tags(architecture)
    if pinned not in known:
        raise unknown_choice_error("weights' tag", pinned, known or [architecture])
    return pinned


def _resolve_repository(name: str) -> str:
    owner, _, model = name.partition("/")
    known, _, tag = model.partition(".")
    if owner == "timm" and (
        known in _deprecated_models or (timm.is_model(known) and (not tag or model in _tags(known)))
    ):
        return resolve_model(model)
    if timm.is_model(owner.partition(".")[0]):
        raise AfterimageError(
            f"unknown model {name!r}; did you mean {owner!r}? A layer is named after a colon"
        )
    architecture(name)
    return name


def architecture(name: str) -> str:
    """Return timm's name of a model's architecture.

    This is the name without the tag, or for a repository the entry in its config.json.

    Raises:
        AfterimageError: the repository cannot be read, or its network is not one of timm's
    """
    if "/" not in name:
        return name.partition(".")[0]
    config = read_config(name)
    found = str(config.get("architecture", "")).partition(".")[0]
    if timm.is_model(found):
        return found
    says = f"names the architecture {found!r}" if found else "names no architecture"
    if isinstance(kind := config.get("model_type"), str):
        says += f" (it describes a {kind!r} of another library; if that is transformers, write transformers/{name})"
    raise AfterimageError(
        f"{name} is no model of timm's: its config.json {says}, which timm would have to know"
    )


def _tags(architecture: str) -> list[str]:
    return [name for name in timm.list_models(f"{architecture}.*", include_tags=True) if "." in name]


@functools.cache
def _repository(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read a repository's config.json: the description of its weights, and timm's arguments for its network.

    Old files have no separate table for the weights. Arguments that set the image size are left out, because
    `create_model` sets it. Missing entries take timm's defaults.
    """
    config, known = read_config(name), {field.name for field in fields(PretrainedCfg)}
    entries, arguments = config.get("pretrained_cfg", config), config.get("model_args") or {}
    try:
        default = get_pretrained_cfg(architecture(name)) or PretrainedCfg()
        entries = {"num_classes": config.get("num_classes"), **entries, "architecture": architecture(name)}
        entries = {key: value for key, value in entries.items() if key in known and value is not None}
        shapes = {key: getattr(default, key) for key in ("fixed_input_size", "first_conv", "classifier")}
        weights = PretrainedCfg(**{**shapes, **entries}).to_dict()
        channels = arguments.get("in_chans", weights["input_size"][0])
        weights["input_size"] = (channels, *weights["input_size"][1:])
        for key in ("mean", "std"):
            weights[key] = per_channel_values(weights[key], channels, key)
        if len([float(value) for value in weights["input_size"]]) != 3:
            raise ValueError(f"input_size must be three numbers, got {weights['input_size']}")
        return weights, {key: value for key, value in arguments.items() if key != "img_size"}
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise AfterimageError(f"cannot use the config.json of {name}: {error}") from None


class TimmNetwork(Network):
    """A network of timm, or of a hub repository with an architecture of timm."""

    channels_last = True
    blocks = ("blocks", "encoder.blocks")

    @classmethod
    def open(cls, name: str) -> TimmNetwork:
        """Return the description of a network by timm's name, with or without a tag, or by a repository."""
        name = resolve_model(name)
        published = get_pretrained_cfg(name, allow_unregistered=True)
        config = _repository(name)[0] if "/" in name else published.to_dict() if published else {}
        classifiers = config.get("classifier") or ()
        channels = config.get("input_size", (3,))[0]
        return cls(
            name,
            per_channel_values(config.get("mean", IMAGENET_MEAN), channels, "mean"),
            per_channel_values(config.get("std", IMAGENET_STD), channels, "std"),
            tuple(config.get("input_size", (3, 224, 224))[-2:]),
            bool(config.get("fixed_input_size")),
            (classifiers,) if isinstance(classifiers, str) else tuple(classifiers),
        )

    def build(self, image_size: Size, **options: Any) -> nn.Module:
        name = self.name
        if self.has_fixed_size:
            options["img_size"] = image_size
        if "/" in name:
            config, arguments = _repository(name)
            options, name = {**arguments, **options, "pretrained_cfg": config}, architecture(name)
        return timm.create_model(name, **options)

    def find_weights(self, weights: str | Path = "pretrained") -> Weights:
        if "/" in self.name:
            return search_weights(self.name, weights, repository=self.name, files=FILES)
        config = get_pretrained_cfg(self.name, allow_unregistered=True)
        repository, file, url = (
            (config.hf_hub_id, config.hf_hub_filename, config.url) if config else ("", "", "")
        )
        files = [file] if file else [*FILES]
        if file and not file.endswith(".safetensors"):
            files.insert(0, f"{Path(file).stem}.safetensors")
        stems = dict.fromkeys([self.name, self.name.partition(".")[0]])
        url = url if isinstance(url, str) and not url.endswith(".npz") else None
        return search_weights(self.name, weights, [*stems], repository or "", files, url)

    def load(
        self, image_size: Size, weights: Weights, used: Sequence[tuple[str, ...]]
    ) -> tuple[nn.Module, str]:
        notes: list[str] = []
        file = read_named_tensors(weights.file)

        def load(module: nn.Module, *_: Any, filter_fn: Callable | None = None, **__: Any) -> None:
            convert = None
            if filter_fn is not None:
                count = len(inspect.signature(filter_fn).parameters)

                def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
                    return filter_fn(*(state, module)[:count])

            notes.append(self.load_tensors(module, image_size, file, used, convert))

        # timm calls `load` in place of its own function, which is the only way to the model's filter. That
        # converts weights to the model's own names and shapes, and resamples position embeddings.
        with _LOCK, mock.patch.object(_builder, "load_pretrained", load), seeded(0), SkipInit():
            return self.create(image_size, pretrained=True), notes[0]

    def prefix_tokens(self, module: nn.Module) -> int | None:
        return int(getattr(module, "num_prefix_tokens", 0) or 0)  # some timm models lack the attribute

    def without_classifier(self, module: nn.Module) -> nn.Module:
        module.reset_classifier(0)
        return module

    def aliases(self, module: nn.Module) -> dict[str, str]:
        """Return the published study's names of layers.

        VGG's `block1` to `block5` are the pooled outputs. In models with `blocks`, `block0` and on are these
        blocks in order. PVT-v2's `stage1` to `stage4` are its stages. ResNet's `layer1` to `layer4` are
        module paths already.
        """
        name = architecture(self.name)
        if name.startswith("vgg"):
            return vgg_pool_aliases(module)
        if name.startswith("pvt_v2"):
            return {
                f"stage{n}": f"stages.{i}" for n, (i, _) in enumerate(module.stages.named_children(), start=1)
            }
        return super().aliases(module)
