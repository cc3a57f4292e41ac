"""Name timm's models, build them, and load weights into them."""

from __future__ import annotations

import contextlib
import difflib
import functools
import inspect
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from typing import Any

import timm
import torch
from timm.models import PretrainedCfg, _builder, get_pretrained_cfg
from torch import Tensor, nn

from afterimage.config import HUB_PREFIX, AfterimageError, listed, split_source, unknown
from afterimage.models.encoders.match import best_match, nearest
from afterimage.models.encoders.random_init import Blank, ParameterUses, open_branches, parameter_uses, seeded
from afterimage.models.hub_files import repository_config
from afterimage.models.weight_files import NamedTensors


def resolve(source: str) -> str:
    """Pin the tag of the weights in `model:layer`: `vgg16:block1` becomes `vgg16.tv_in1k:block1`.

    The layer is not checked; that happens when it is measured.

    Raises:
        AfterimageError: timm does not know the model or the tag
    """
    model, layer = split_source(source.strip())
    return f"{resolve_model(model)}:{layer}"


@functools.cache
def resolve_model(name: str) -> str:
    """Return a timm model's name with the tag of its weights: the given one, or timm's default.

    A model without published weights has no tag and keeps its name. A repository of the hub, `OWNER/NAME` with
    or without `hf-hub:`, becomes the timm model whose weights it holds, or stays `OWNER/NAME`; its config.json
    then names the architecture.

    Raises:
        AfterimageError: the model, tag or repository is unknown
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
    """Return timm's name of a model's architecture.

    That is the name without the tag, or for a repository the entry in its config.json.

    Raises:
        AfterimageError: the repository cannot be read, or its network is not one of timm's
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
    """Return timm's current name of a model with an old name; None for any other."""
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
    """Create the error for an unknown model, with near matches only: timm has too many models to list."""
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
    """Return the published study's names for layers as `{alias: module path}`; real module paths take precedence.

    VGG's `block1` to `block5` are the pooled outputs. `block0` and so on of models with `blocks` are these blocks in
    order. PVT-v2's `stage1` to `stage4` are its stages. ResNet's `layer1` to `layer4` are module paths already.

    Args:
        model: the network
        name: timm's name, or a repository of the hub
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


Size = tuple[int, int]
_LOCK = threading.Lock()


def pretrained_config(name: str) -> dict[str, Any]:
    """Return timm's description of a model's weights, such as mean, std and the expected image size."""
    if "/" in name:
        return _repository(name)[0]
    config = get_pretrained_cfg(name, allow_unregistered=True)
    return config.to_dict() if config is not None else {}


@functools.cache
def _repository(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read from a repository's config.json the description of its weights, and timm's arguments for its network.

    Old files have no separate table for the weights. Arguments that set the image's size are left out, because
    `create_model` sets it. Missing entries take timm's defaults.
    """
    config, known = repository_config(name), {field.name for field in fields(PretrainedCfg)}
    entries, arguments = config.get("pretrained_cfg", config), config.get("model_args") or {}
    try:
        default = get_pretrained_cfg(architecture(name)) or PretrainedCfg()
        entries = {"num_classes": config.get("num_classes"), **entries, "architecture": architecture(name)}
        entries = {key: value for key, value in entries.items() if key in known and value is not None}
        shapes = {key: getattr(default, key) for key in ("fixed_input_size", "first_conv", "classifier")}
        weights = PretrainedCfg(**{**shapes, **entries}).to_dict()
        for key in ("mean", "std", "input_size"):
            if len([float(value) for value in weights[key]]) != 3:
                raise ValueError(f"{key} must be three numbers, got {weights[key]}")
        return weights, {key: value for key, value in arguments.items() if key != "img_size"}
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise AfterimageError(f"cannot use the config.json of {name}: {error}") from None


def has_fixed_size(name: str) -> bool:
    """Return whether a model is built for one image size; others take any."""
    return bool(pretrained_config(name).get("fixed_input_size"))


def native_size(name: str) -> Size:
    """Return the image size of a model's pretraining, `(height, width)` in pixels."""
    height, width = pretrained_config(name).get("input_size", (3, 224, 224))[-2:]
    return height, width


def create_model(name: str, image_size: Size, *, device: str = "cpu", **options: Any) -> nn.Module:
    """Build a timm model in evaluation mode.

    Args:
        name: timm's name with its tag, or a repository of the hub
        image_size: `(height, width)` of the images in pixels
        device: where the parameters are
        options: further arguments of `timm.create_model`
    """
    if has_fixed_size(name):
        options["img_size"] = image_size
    if "/" in name:
        config, arguments = _repository(name)
        options, name = {**arguments, **options, "pretrained_cfg": config}, architecture(name)
    with warnings.catch_warnings(), torch.device(device):
        warnings.simplefilter("ignore")
        return timm.create_model(name, **options).eval()


def create_random(name: str, image_size: Size, seed: int, kind: str = "random") -> nn.Module:
    """Build a random control.

    Args:
        name: timm's name with its tag, or a repository of the hub
        image_size: `(height, width)` of the images in pixels
        seed: seed of the weights
        kind: `random` (every block acts) or `random-init` (timm's own initialisation)
    """
    with seeded(seed):
        model = create_model(name, image_size)
    if kind == "random":
        open_branches(model, _parameter_uses(name, image_size))
    return model


@functools.lru_cache(maxsize=32)
def _parameter_uses(name: str, image_size: Size) -> ParameterUses:
    """Observe a model once for all of its seeds and layers: a pass takes several times as long as the weights."""
    with seeded(0), Blank():
        return parameter_uses(create_model(name, image_size), image_size)


def create_loaded(
    name: str, image_size: Size, file: NamedTensors, used: Sequence[tuple[str, ...]]
) -> tuple[nn.Module, str]:
    """Build a model with the weights of a file, named as timm or as their publisher names them.

    Position embeddings and the like are resampled to `image_size` by the model's own filter. The file may hold
    a part of the network only.

    Args:
        name: timm's name with its tag, or a repository of the hub
        image_size: `(height, width)` of the images in pixels
        file: the tensors of the file
        used: the tensors that the file must hold, each by all of its names

    Returns:
        the model, and a note on where in the file the weights are (see `best_match`), empty if that is obvious

    Raises:
        AfterimageError: a used tensor is missing, does not fit or is not finite; the message names the file
    """
    notes: list[str] = []
    load = functools.partial(_load, image_size=image_size, file=file, used=used, notes=notes)
    with seeded(0), _intercept(load), Blank():
        return create_model(name, image_size, pretrained=True), notes[0]


@contextlib.contextmanager
def _intercept(load: Callable[[nn.Module, Callable | None], None]) -> Iterator[None]:
    """Make timm call `load(model, filter)` instead of loading weights itself.

    The filter brings weights into a model's own names and shapes. It is an argument of that one internal call,
    and timm has no public access to it.
    """

    def replacement(model: nn.Module, *_: Any, filter_fn: Callable | None = None, **__: Any) -> None:
        load(model, filter_fn)

    with _LOCK:
        original = _builder.load_pretrained
        _builder.load_pretrained = replacement
        try:
            yield
        finally:
            _builder.load_pretrained = original


def _load(
    model: nn.Module,
    filter_fn: Callable | None,
    image_size: Size,
    file: NamedTensors,
    used: Sequence[tuple[str, ...]],
    notes: list[str],
) -> None:
    name, own = model.pretrained_cfg["architecture"], model.state_dict()
    required = [names for names in used if own[names[0]].is_floating_point()]
    match, note = best_match(file, own, required, lambda state: _fit(model, filter_fn, state, own, file.file))
    notes.append(note)
    if match.missing:
        like = nearest(file, match.missing[0])
        hint = f"; most like {match.missing[0]} is {like}" if like else ""
        raise AfterimageError(
            f"{file.file} lacks {listed(match.missing)}, which the layers in use of {name} read; "
            f"{file.holds()}{hint}"
        )
    read = {key for names in used for key in names}
    classifiers = tuple(_as_tuple(model.pretrained_cfg.get("classifier")))
    known = {key: value for key, value in match.state.items() if key in own}
    misfits = {key: value for key, value in known.items() if value.shape != own[key].shape}
    wrong = [
        f"{key} is {_shape(value)} there and {_shape(own[key])} in the model"
        for key, value in misfits.items()
        if key in read or not key.startswith(classifiers)
    ]
    if wrong:
        raise AfterimageError(f"{file.file} does not fit {name}: {listed(wrong)}{_resized(name, image_size)}")
    broken = [key for key in known if key in read and not known[key].sum(dtype=torch.float32).isfinite()]
    if broken:
        raise AfterimageError(f"{file.file} holds values that are not finite, in {listed(broken)}")
    model.load_state_dict({key: value for key, value in known.items() if key not in misfits}, strict=False)


def _fit(
    model: nn.Module, filter_fn: Callable | None, state: dict[str, Tensor], own: dict[str, Tensor], file: str
) -> dict[str, Tensor]:
    """Bring a state dict into the model's names and shapes.

    Some filters tell formats apart by the classifier's key, so they must not see a part of a network. If the
    names are the model's own already, missing tensors are filled in from the model and removed afterwards.
    """
    if filter_fn is None or all(key in own and value.shape == own[key].shape for key, value in state.items()):
        return state
    added = own.keys() - state.keys() if state.keys() <= own.keys() else ()
    arguments = ({**state, **{key: own[key] for key in added}}, model)
    try:
        fitted = filter_fn(*arguments[: len(inspect.signature(filter_fn).parameters)])
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        name = model.pretrained_cfg["architecture"]
        raise AfterimageError(f"{file} does not fit {name}: it cannot be converted ({reason})") from error
    return {key: value for key, value in fitted.items() if key not in added}


def _resized(name: str, size: Size) -> str:
    """Return a hint if a model of fixed size was built for another size than its weights are for."""
    native = tuple(pretrained_config(name).get("input_size", (3, *size))[-2:])
    if not has_fixed_size(name) or native == size:
        return ""
    return f" (built for {size[0]}x{size[1]} images; its weights are for {native[0]}x{native[1]})"


def _as_tuple(value: str | Sequence[str] | None) -> Sequence[str]:
    return (value,) if isinstance(value, str) else value or ()


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a scalar"
