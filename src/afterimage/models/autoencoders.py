"""Published autoencoders of diffusers, read from safetensors: encoders to latents and decoders from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from afterimage.config import AfterimageError, first_line, join_names, split_provider
from afterimage.models.factories import library, quiet
from afterimage.models.weights import Weights, search_weights
from afterimage.runtime.hub import CONFIG, read_config

NORMALISES = ("AutoencoderRAE",)
"""Classes of autoencoders that take and return images in [0, 1] and normalise latents themselves. All others
use images in [-1, 1], and pipelines scale their latents."""


@dataclass(frozen=True)
class Autoencoder:
    """Description of an autoencoder, before its weights are read.

    Attributes:
        name: `diffusers/OWNER/NAME[/SUBFOLDER][@REVISION]`, or `diffusers/FOLDER` with an absolute path
        kind: its class in diffusers
        config: its configuration
    """

    name: str
    kind: Any = field(repr=False)
    config: Mapping[str, Any] = field(repr=False, hash=False)

    @classmethod
    def open(cls, name: str) -> Autoencoder:
        """Return the description of the autoencoder with the given name.

        Raises:
            AfterimageError: diffusers is not installed, or the repository or folder does not exist or does
                not hold an autoencoder of images
        """
        diffusers = library("diffusers")
        repository, folder = _split_repository(name)
        config = read_config(repository, (f"{folder}{CONFIG}",))
        class_name = str(config.get("_class_name"))
        kind = (
            getattr(diffusers, class_name, None)
            if class_name.startswith(("Autoencoder", "VQModel"))
            else None
        )
        if kind is None:
            raise AfterimageError(
                f"{name} is no autoencoder of diffusers {diffusers.__version__}: its {CONFIG} names the _class_name "
                f"{class_name!r}; of a pipeline name the folder of the autoencoder, such as {name}/vae"
            )
        return cls(name, kind, config)

    @property
    def normalises(self) -> bool:
        """True if the autoencoder normalises images and latents itself."""
        return self.kind.__name__ in NORMALISES

    @property
    def image_size(self) -> int:
        """Side in pixels of the images that the autoencoder was made for."""
        get = self.config.get
        if self.normalises:
            return get("patch_size", 16) * (get("encoder_input_size", 224) // get("encoder_patch_size", 14))
        size = get("sample_size")
        return size if isinstance(size, int) and size > 0 else 256

    def find_weights(self, weights: str | Path = "pretrained") -> Weights:
        """Find the autoencoder's weight file."""
        repository, folder = _split_repository(self.name)
        stem = f"{folder}diffusion_pytorch_model"
        files = [f"{stem}.safetensors", f"{stem}.safetensors.index.json"]
        return search_weights(self.name, weights, [stem], repository, files)

    def create(self) -> nn.Module:
        """Build the autoencoder with diffusers' initial weights."""
        try:
            return self.kind.from_config(dict(self.config)).float().eval()
        except Exception as error:
            raise AfterimageError(f"cannot use the {CONFIG} of {self.name}: {first_line(error)}") from None

    def load(self, weights: Weights) -> nn.Module:
        """Build the autoencoder with the weights of a file.

        Raises:
            AfterimageError: a tensor is missing or does not fit
        """
        try:
            with quiet("diffusers"):
                module, info = self.kind.from_pretrained(
                    weights.file.parent,
                    torch_dtype=torch.float32,
                    use_safetensors=True,
                    local_files_only=True,
                    low_cpu_mem_usage=False,
                    output_loading_info=True,
                )
        except Exception as error:
            raise AfterimageError(f"{weights.file} does not fit {self.name}: {first_line(error)}") from None
        if missing := sorted(info["missing_keys"]):
            raise AfterimageError(f"{weights.file} lacks {join_names(missing)} of {self.name}")
        return module.eval()


class LatentEncoder(nn.Module):
    """The encoder of an autoencoder: images to latents, normalised as a diffusion model expects them.

    Args:
        autoencoder: the autoencoder; its decoder is removed
    """

    def __init__(self, autoencoder: nn.Module) -> None:
        super().__init__()
        self.autoencoder = _without(autoencoder, "decoder", "post_quant_conv")
        self.latents = nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        if _normalises(self.autoencoder):
            return self.latents(self._encode_any_size(images))
        encoded = self.autoencoder.encode(images)
        found = [getattr(encoded, name) for name in ("latent", "latents") if hasattr(encoded, name)]
        mean, std = _statistics(self.autoencoder)
        return self.latents(((found[0] if found else encoded.latent_dist.mode()) - mean) / std)

    def _encode_any_size(self, images: Tensor) -> Tensor:
        """Encode images of any size and shape with a representation autoencoder.

        The autoencoder's own `encode` resizes all images to one size. Here every image is resized by the same
        factor, so a larger image gives a larger map.
        """
        own, config = self.autoencoder, self.autoencoder.config
        factor = own.encoder_input_size / own.decoder_image_size
        if factor != 1:
            size = [round(side * factor) for side in images.shape[-2:]]
            images = F.interpolate(images, size=size, mode="bicubic", align_corners=False)
        cells = [side // config.encoder_patch_size for side in images.shape[-2:]]
        patch = (config.encoder_patch_size,) if config.encoder_type == "mae" else ()
        tokens = own._encoder_forward_fn(own.encoder, (images - own.encoder_mean) / own.encoder_std, *patch)
        return own._normalize_latents(tokens.mT.unflatten(2, cells)) * config.scaling_factor


class LatentDecoder(nn.Module):
    """The decoder of an autoencoder: latents to images.

    Args:
        autoencoder: the autoencoder; its encoder is removed
        raw: whether the inputs are not normalised yet and must be normalised first
    """

    def __init__(self, autoencoder: nn.Module, raw: bool) -> None:
        super().__init__()
        self.autoencoder = _without(autoencoder, "encoder", "quant_conv")
        self.raw, self.image_range = raw, (0.0 if _normalises(autoencoder) else -1.0, 1.0)
        self.requires_grad_(False)

    def forward(self, latents: Tensor) -> Tensor:
        normalises = _normalises(self.autoencoder)
        if self.raw and normalises:
            latents = self.autoencoder._normalize_latents(latents) * self.autoencoder.config.scaling_factor
        if not self.raw and not normalises:
            mean, std = _statistics(self.autoencoder)
            latents = latents * std + mean
        return self.autoencoder.decode(latents).sample


def _normalises(autoencoder: nn.Module) -> bool:
    return type(autoencoder).__name__ in NORMALISES


def _statistics(autoencoder: nn.Module) -> tuple[Any, Any]:
    """Return the mean and the standard deviation with which pipelines normalise latents."""
    config = autoencoder.config
    scale = config.get("scaling_factor") or 1.0
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is not None and std is not None:
        parameter = next(autoencoder.parameters())
        mean, std = (torch.as_tensor(v, dtype=torch.float32, device=parameter.device) for v in (mean, std))
        return mean.view(1, -1, 1, 1), std.view(1, -1, 1, 1) / scale
    return config.get("shift_factor") or 0.0, 1 / scale


def _without(autoencoder: nn.Module, *parts: str) -> nn.Module:
    for name in parts:
        if isinstance(getattr(autoencoder, name, None), nn.Module):
            setattr(autoencoder, name, nn.Identity())
    return autoencoder


def _split_repository(name: str) -> tuple[str, str]:
    """Return the repository with its revision (or a folder), and the subfolder with a slash at its end."""
    where = split_provider(name)[1]
    if Path(where).is_absolute():
        return where, ""
    where, at, revision = where.partition("@")
    owner, *rest = where.split("/")
    return f"{'/'.join([owner, *rest[:1]])}{at}{revision}", "".join(f"{part}/" for part in rest[1:])
