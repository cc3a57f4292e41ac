"""Vision towers of transformers: `transformers/facebook/dinov2-base`, a hub repository or a local folder."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from afterimage.config import AfterimageError, absolute_model, first_line, size_pair, split_provider
from afterimage.models.encoders.providers.base import Convert, Network, per_channel_values
from afterimage.models.encoders.tensor_layout import Size
from afterimage.models.factories import library, quiet
from afterimage.models.weights import SNAPSHOT, Weights, search_weights
from afterimage.runtime.hub import CONFIG, read_config

PROCESSORS = ("preprocessor_config.json", "processor_config.json")
"""Files in a repository that describe the preparation of images."""
ENCODERS = {"vit_mae": ("vit", {"add_pooling_layer": False})}
"""Networks that are built as another type, by `model_type`: a masked autoencoder drops and shuffles its
patches, but its encoder is a ViT."""


@dataclass(frozen=True)
class TransformersNetwork(Network):
    """The vision tower of a model of transformers. No code of a repository is run.

    Attributes:
        config: the tower's configuration
        tower: the tower's class
    """

    blocks = (
        "encoder.layer",
        "encoder.layers",
        "layers",
        "layer",
        "model.layer",
        "model.layers",
        "encoder.blocks",
        "blocks",
    )
    config: Any = field(default=None, compare=False, repr=False)
    tower: Any = field(default=None, compare=False, repr=False)

    @classmethod
    def open(cls, name: str) -> TransformersNetwork:
        """Return the description of a vision tower by repository, `OWNER/NAME[@REVISION]`, or local folder.

        Raises:
            AfterimageError: transformers is not installed, the repository or folder does not describe a
                network that transformers has, it needs its own code, or its normalisation of images is not
                given
        """
        transformers = library("transformers")
        name = split_provider(absolute_model(f"transformers/{name}"))[1]
        settings = read_config(name, (CONFIG,))
        kind = settings.get("model_type")
        if kind not in transformers.CONFIG_MAPPING:
            raise AfterimageError(
                f"{name} needs code of its own ({', '.join(settings['auto_map'].values())}), which is not run; "
                "write a factory for it and take python/FILE.py:factory"
                if isinstance(settings.get("auto_map"), dict)
                else f"{name} is no network of transformers {transformers.__version__}: its {CONFIG} names the "
                f"model_type {kind!r}; networks of timm's are taken as {name.removeprefix('timm/')}"
            )
        try:
            config = transformers.CONFIG_MAPPING[kind].from_dict(settings)
            config = getattr(config, "vision_config", None) or config
            same_as, _ = ENCODERS.get(config.model_type, (None, None))
            of = type(config) if same_as is None else transformers.CONFIG_MAPPING[same_as]
            tower = transformers.MODEL_MAPPING.get(of, None)
        except Exception as error:
            raise AfterimageError(f"cannot use the {CONFIG} of {name}: {first_line(error)}") from None
        if not inspect.isclass(tower) or tower.main_input_name != "pixel_values":
            takes = f", which takes {tower.main_input_name}" if inspect.isclass(tower) else ""
            raise AfterimageError(
                f"{name} has no vision tower: its {CONFIG} describes a {config.model_type!r}{takes}"
            )
        mean, std, size = _preparation(name, config)
        return cls(f"transformers/{name}", mean, std, size, config=config, tower=tower)

    def build(self, image_size: Size) -> nn.Module:
        _, options = ENCODERS.get(self.config.model_type, (None, {}))
        module = self.tower(type(self.config).from_dict(self.config.to_dict()), **options).float()
        if "interpolate_pos_encoding" in inspect.signature(self.tower.forward).parameters:
            module.register_forward_pre_hook(_interpolate, with_kwargs=True)
        if "spatial_shapes" in inspect.signature(self.tower.forward).parameters:
            module.register_forward_pre_hook(_as_patches, with_kwargs=True)
        return module

    def find_weights(self, weights: str | Path = "pretrained") -> Weights:
        return search_weights(self.name, weights, repository=split_provider(self.name)[1], files=SNAPSHOT)

    def convert(self, module: nn.Module, image_size: Size) -> Convert | None:
        def convert(state: dict[str, Tensor]) -> Mapping[str, Tensor]:
            with quiet("transformers"):
                loaded, info = self.tower.from_pretrained(
                    None,
                    config=type(self.config).from_dict(self.config.to_dict()),
                    state_dict=state,
                    dtype=torch.float32,
                    output_loading_info=True,
                )
            missing = info["missing_keys"]
            return {key: value for key, value in loaded.state_dict().items() if key not in missing}

        return convert


def _interpolate(module: nn.Module, args: tuple, options: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Enable images of any size in a vision transformer."""
    return args, {**options, "interpolate_pos_encoding": True}


def _as_patches(module: nn.Module, args: tuple, options: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Cut images into patches, row by row and without padding, for a tower that takes any shape (NaFlex)."""
    images, patch = args[0], module.config.patch_size
    batch, channels, height, width = images.shape
    if height % patch or width % patch:
        raise ValueError(f"its images' sides must be multiples of {patch}")
    rows, columns = height // patch, width // patch
    cut = images.reshape(batch, channels, rows, patch, columns, patch).permute(0, 2, 4, 3, 5, 1)
    return (), {
        **options,
        "pixel_values": cut.reshape(batch, rows * columns, -1),
        "pixel_attention_mask": torch.ones(batch, rows * columns, dtype=torch.long, device=images.device),
        "spatial_shapes": torch.tensor([[rows, columns]] * batch, device=images.device).reshape(batch, 2),
    }


def _preparation(name: str, config: Any) -> tuple[tuple[float, ...], tuple[float, ...], Size]:
    """Return the mean, the standard deviation and the image size of a repository's preparation of images."""
    settings = read_config(name, PROCESSORS)
    settings = settings.get("image_processor", settings)
    try:
        channels = getattr(config, "num_channels", 3)
        if not settings.get("do_normalize", True):
            settings = {**settings, "image_mean": (0.0,) * 3, "image_std": (1.0,) * 3}
        mean, std = (per_channel_values(settings[key], channels, key) for key in ("image_mean", "image_std"))
        if min(std) <= 0:
            raise ValueError(f"image_std must be greater than 0, got {std}")
        size = settings.get("crop_size") or settings.get("size") or getattr(config, "image_size", None)
        if size is None:  # a tower for any shape gives the number of patches in its square of positions
            size = math.isqrt(getattr(config, "num_patches", 0)) * getattr(config, "patch_size", 0) or 224
        if isinstance(size, Mapping):
            size = (size["height"], size["width"]) if "height" in size else next(iter(size.values()))
        return mean, std, size_pair(size)
    except (KeyError, TypeError, ValueError, AfterimageError) as error:
        raise AfterimageError(f"cannot use the {PROCESSORS[0]} of {name}: {first_line(error)}") from None
