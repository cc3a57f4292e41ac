"""Names: `model:layer` with the weights' tag pinned, and the study's own layer names as aliases."""

from __future__ import annotations

import contextlib
import difflib
import functools
import re

import timm
from timm.models import get_pretrained_cfg
from torch import nn

from afterimage.config import HUB_PREFIX, AfterimageError, split_source, unknown
from afterimage.hub_files import repository_config


def resolve(source: str) -> str:
    """`model:layer` with the weights' tag pinned: `vgg16:block1` becomes `vgg16.tv_in1k:block1`.

    The layer keeps the word it was written with; whether the model has it is seen when it is measured.
    Raises AfterimageError for a model or tag that timm does not know.
    """
    model, layer = split_source(source.strip())
    return f"{resolve_model(model)}:{layer}"


@functools.cache
def resolve_model(name: str) -> str:
    """A timm model's name with the tag of its weights: the one given, else timm's default.

    A model for which no weights were ever published has no tag and stays as it is. A repository of the hub,
    `OWNER/NAME` with `hf-hub:` before it or not, is the timm model whose weights it holds, or stays `OWNER/NAME`: its
    config.json then names the architecture.
    """
    name = re.sub(HUB_PREFIX, "", name)
    if "/" in name:
        return _resolve_repository(name)
    architecture, _, tag = name.partition(".")
    current = _renamed(architecture)
    if current is not None:
        architecture, _, current_tag = current.partition(".")
        tag = tag or current_tag
    elif not timm.is_model(architecture):
        raise _unknown_model(name)
    if not tag:
        config = get_pretrained_cfg(architecture)
        return f"{architecture}.{config.tag}" if config is not None and config.tag else architecture
    pinned, known = f"{architecture}.{tag}", _tags(architecture)
    if pinned not in known:
        raise unknown("weights' tag", pinned, known or [architecture])
    return pinned


def _resolve_repository(name: str) -> str:
    owner, _, model = name.partition("/")
    if owner == "timm":
        known, _, tag = model.partition(".")
        if _renamed(known) or (timm.is_model(known) and (not tag or model in _tags(known))):
            return resolve_model(model)
    if timm.is_model(owner.partition(".")[0]):
        raise AfterimageError(
            f"unknown model {name!r}; did you mean {owner!r}? A layer is named after a colon"
        )
    architecture(name)
    return name


def architecture(name: str) -> str:
    """What timm calls a model's architecture: its name without the tag; for a repository what its config.json says.

    Raises AfterimageError for a repository that cannot be read, or whose network is none of timm's.
    """
    if "/" not in name:
        return name.partition(".")[0]
    config = repository_config(name)
    found = str(config.get("architecture", "")).partition(".")[0]
    if timm.is_model(found):
        return found
    says = f"names the architecture {found!r}" if found else "names no architecture"
    if isinstance(kind := config.get("model_type"), str):
        says += f" (it describes a {kind!r} of another library)"
    raise AfterimageError(
        f"{name} is no model of timm's: its config.json {says}, which timm would have to know"
    )


def _renamed(architecture: str) -> str | None:
    """What timm calls a model today whose old name it still knows."""
    from timm.models._registry import _deprecated_models

    if architecture not in _deprecated_models:
        return None
    current = _deprecated_models[architecture]
    if not current:
        raise AfterimageError(f"timm has removed the model {architecture!r} and names no successor")
    return current


def _tags(architecture: str) -> list[str]:
    return [name for name in timm.list_models(f"{architecture}.*", include_tags=True) if "." in name]


def _unknown_model(name: str) -> AfterimageError:
    """Near matches only: timm knows over a thousand models, too many to list."""
    known = timm.list_models(pretrained=True)
    architectures = dict.fromkeys(known_name.partition(".")[0] for known_name in known)
    near = difflib.get_close_matches(name, [*known, *architectures], n=5, cutoff=0.6)
    near = near or [architecture for architecture in architectures if name.lower() in architecture][:5]
    hint = f"; did you mean {' or '.join(repr(match) for match in near)}?" if near else "."
    return AfterimageError(
        f"unknown model {name!r}{hint} Valid: any of timm's {len(architectures)} pretrained models, "
        "for example resnet34, vgg16, vit_base_patch16_224, convnext_tiny "
        '(python -c "import timm; print(timm.list_models(pretrained=True))")'
    )


def aliases(model: nn.Module, name: str) -> dict[str, str]:
    """The study's names for layers, as `{alias: module path}`; a real module path always wins over an alias.

    VGG's `block1` .. `block5` are the pooled outputs; `block0` .. of anything made of `blocks` are its blocks
    in order; PVT-v2's `stage1` .. `stage4` are its stages. ResNet's `layer1` .. `layer4` are module paths as
    they are.
    """
    name = architecture(name)
    if name.startswith("vgg"):
        pools = [f"features.{i}" for i, m in model.features.named_children() if isinstance(m, nn.MaxPool2d)]
        return {f"block{n}": path for n, path in enumerate(pools, start=1)}
    if name.startswith("pvt_v2"):
        return {f"stage{n}": f"stages.{i}" for n, (i, _) in enumerate(model.stages.named_children(), start=1)}
    for path in ("blocks", "encoder.blocks"):
        with contextlib.suppress(AttributeError):
            return {f"block{i}": f"{path}.{i}" for i, _ in enumerate(model.get_submodule(path).children())}
    return {}
