"""Vision towers of open_clip: `open_clip/ViT-B-32::laion2b_s34b_b79k`, an architecture and a weight tag."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from afterimage.config import HUB_PREFIX, AfterimageError, first_line, size_pair, unknown_choice_error
from afterimage.models.encoders.providers.base import Convert, Network
from afterimage.models.encoders.tensor_layout import Size
from afterimage.models.factories import library
from afterimage.models.weights import Weights, search_weights
from afterimage.runtime.hub import read_config

CONFIG = "open_clip_config.json"
"""File in a hub repository that describes the network and the preparation of its images."""
FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
"""Names of the weights in a hub repository."""


@dataclass(frozen=True)
class OpenClipNetwork(Network):
    """The vision tower of a network of open_clip.

    Attributes:
        architecture: open_clip's name of the network, or a hub repository, `OWNER/NAME[@REVISION]`
        tag: open_clip's name of the weights; empty for random weights and those of a file or a repository
        settings: configuration of the network
    """

    blocks = ("transformer.resblocks", "trunk.blocks")
    architecture: str = ""
    tag: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def open(cls, name: str) -> OpenClipNetwork:
        """Return the description of a vision tower by open_clip's name, with or without tag, or a repository.

        Raises:
            AfterimageError: open_clip is not installed, or does not have the network or the weights
        """
        open_clip = library("open_clip")
        name = re.sub(HUB_PREFIX, "", name)
        architecture, _, tag = (name, "", "") if "/" in name else name.partition("::")
        if "/" in name:
            config = read_config(name, (CONFIG,))
            prepared = config.get("preprocess_cfg") or {}
        else:
            if ":" in architecture:
                raise AfterimageError(
                    f"open_clip/{name}: write ARCHITECTURE::TAG:LAYER, for example ViT-B-32::openai:ln_post"
                )
            if architecture not in open_clip.list_models():
                raise unknown_choice_error(
                    "open_clip model", architecture, ["OWNER/NAME of the hub", *open_clip.list_models()]
                )
            tags = open_clip.list_pretrained_tags_by_model(architecture)
            if tag and tag not in tags:
                raise unknown_choice_error(f"weights' tag of open_clip/{architecture}", tag, tags)
            # Without a tag, normalisation and size are those of the architecture's first published weights.
            prepared = open_clip.get_pretrained_cfg(architecture, tag or next(iter(tags), "")) or {}
            config = {"model_cfg": open_clip.get_model_config(architecture)}
        try:
            settings = config["model_cfg"]
            return cls(
                f"open_clip/{name}",
                tuple(map(float, prepared.get("mean") or open_clip.OPENAI_DATASET_MEAN)),
                tuple(map(float, prepared.get("std") or open_clip.OPENAI_DATASET_STD)),
                size_pair(prepared.get("size") or settings["vision_cfg"].get("image_size", 224)),
                has_fixed_size=True,
                architecture=architecture,
                tag=tag,
                settings=settings,
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise AfterimageError(
                f"cannot use the {CONFIG} of {name}: {type(error).__name__}: {first_line(error)}"
            ) from None

    def build(self, image_size: Size) -> nn.Module:
        from open_clip.model import CLIPVisionCfg, _build_vision_tower

        open_clip = library("open_clip")
        settings = self.settings
        weights = open_clip.get_pretrained_cfg(self.architecture, self.tag) or {}
        # The activation is the one that the weights were trained with.
        quick = weights.get("quick_gelu", settings.get("quick_gelu", False))
        # open_clip's ResNets accept only a single number, the side.
        size = image_size[0] if image_size[0] == image_size[1] else image_size
        tower = replace(CLIPVisionCfg(**settings["vision_cfg"]), image_size=size, timm_model_pretrained=False)
        return _build_vision_tower(settings["embed_dim"], tower, quick)

    def find_weights(self, weights: str | Path = "pretrained") -> Weights:
        open_clip = library("open_clip")
        if "/" in self.architecture:
            return search_weights(self.name, weights, repository=self.architecture, files=FILES)
        if str(weights) == "pretrained" and not self.tag:
            tags = open_clip.list_pretrained_tags_by_model(self.architecture)
            raise AfterimageError(
                f"{self.name} names no weights; write {self.name}::TAG, and for TAG one of {', '.join(tags)}"
            )
        published = open_clip.get_pretrained_cfg(self.architecture, self.tag) or {}
        repository, _, file = published.get("hf_hub", "").rpartition("/")
        stem = f"{self.architecture}.{self.tag}" if self.tag else self.architecture
        url = published.get("url") or None
        return search_weights(self.name, weights, [stem], repository, [file] if file else FILES, url)

    def convert(self, module: nn.Module, image_size: Size) -> Convert | None:
        from open_clip.model import resize_pos_embed

        def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
            whole: dict[str, Any] = {f"visual.{key}": value for key, value in state.items()}
            resize_pos_embed(whole, SimpleNamespace(visual=module))
            return {key.removeprefix("visual."): value for key, value in whole.items()}

        return convert
