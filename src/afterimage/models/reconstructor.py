"""Encoders, fusion and decoder as one module: image in, image rebuilt from features out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from afterimage.config import AfterimageError, FeatureSpec, RunConfig, split_source
from afterimage.models.decoders import Decoder, create_decoder
from afterimage.models.decoders.base import FeatureCrop
from afterimage.models.encoders.encoder import Encoder
from afterimage.models.encoders.providers.timm import resolve
from afterimage.models.fusion import FUSIONS, Fusion, create_fusion
from afterimage.runs.results import FeatureMap, UsedWeights
from afterimage.runtime.distributed import SINGLE_PROCESS, ProcessGroup


class MultiEncoder(nn.Module):
    """Any number of `model:layer` sources; each network runs once, as deep as its deepest layer."""

    def __init__(
        self, sources: Sequence[str], *, weights: str = "pretrained", image_size: int = 224, seed: int = 0
    ) -> None:
        super().__init__()
        sources = [resolve(source) for source in sources]
        layers: dict[str, list[str]] = {}
        for source in sources:
            model, layer = split_source(source)
            if layer not in layers.setdefault(model, []):
                layers[model].append(layer)
        self.encoders = nn.ModuleList(
            Encoder(model, layers=names, weights=weights, image_size=image_size, seed=seed)
            for model, names in layers.items()
        )
        position = {s: i for i, s in enumerate(s for encoder in self.encoders for s in encoder.sources)}
        self.sources = tuple(sources)
        self._picks = [position[source] for source in sources]

    @property
    def specs(self) -> tuple[FeatureSpec, ...]:
        specs = [spec for encoder in self.encoders for spec in encoder.specs]
        return tuple(specs[i] for i in self._picks)

    def describe(self) -> list[FeatureMap]:
        """`Encoder.describe` for every source, in order."""
        entries = [entry for encoder in self.encoders for entry in encoder.describe()]
        return [entries[i] for i in self._picks]

    def weights_of(self, sources: Sequence[str]) -> list[UsedWeights]:
        """Where the weights behind `sources` come from, one entry a network."""
        used = set(sources)
        return [e.weights.used for e in self.encoders if used.intersection(e.sources)]

    def weight_digests(self, sources: Sequence[str]) -> dict[str, str]:
        """What tells the weights behind `sources` apart, by model: a SHA-256, or which random draw they are."""
        return {weights.model: weights.identity for weights in self.weights_of(sources)}

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> list[Tensor]:
        """Feature maps `(B, C, h, w)` of images in [0, 1], in the order of `sources`."""
        features = [feature for encoder in self.encoders for feature in encoder(images)]
        return [features[i] for i in self._picks]


def no_maps(specs: Sequence[FeatureSpec], device: torch.device) -> list[Tensor]:
    """The feature maps `(0, C, h, w)` of no images, which some networks cannot make themselves."""
    return [torch.zeros(0, spec.channels, spec.height, spec.width, device=device) for spec in specs]


@runtime_checkable
class ClosedForm(Protocol):
    """What is fitted on one pass over the images (see `Decoder`)."""

    @property
    def fit_bytes(self) -> int: ...

    def fit_macs(self, images: int) -> int: ...

    def begin_fit(self, images: int, seed: int, ranks: ProcessGroup = SINGLE_PROCESS) -> int: ...

    def partial_fit(
        self, features: Sequence[Tensor], images: Tensor, *, validation: bool = False
    ) -> None: ...

    def finalize_fit(self) -> list[str]: ...


class FeatureDecoder(nn.Module):
    """What is trained: an optional fusion and a decoder. Feature maps in, images `(B, 3, H, W)` in [0, 1] out."""

    def __init__(self, decoder: Decoder, fusion: Fusion | None = None) -> None:
        super().__init__()
        self.fusion = fusion
        self.decoder = decoder

    @property
    def trainable(self) -> bool:
        """Whether anything in it is trained by gradient descent."""
        return any(parameter.requires_grad for parameter in self.parameters())

    def fuse(self, features: Sequence[Tensor]) -> list[Tensor]:
        return list(features) if self.fusion is None else [self.fusion(features)]

    @property
    def closed_forms(self) -> list[ClosedForm]:
        """The parts with a closed form, in the order in which they are fitted."""
        return [part for part in (self.fusion, self.decoder) if part is not None and part.closed_form]

    def partial_fit(
        self, part: ClosedForm, features: Sequence[Tensor], images: Tensor, *, validation: bool = False
    ) -> None:
        """Give one of the `closed_forms` a batch: a fusion takes the features, a decoder what is made of them."""
        given = features
        if part is not self.fusion:
            given = self.fuse(features) if len(images) else no_maps([self.decoder.spec], images.device)
        part.partial_fit(given, images, validation=validation)

    def forward(self, features: Sequence[Tensor], crop: FeatureCrop | None = None) -> Tensor:
        return self.decoder(self.fuse(features), crop)

    def macs(self, specs: Sequence[FeatureSpec]) -> int:
        """Multiply-adds for one image with features of these shapes.

        Counted on tensors without values: of what computes attention on a CPU the counter sees nothing.
        """
        tensors = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        shapes = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
        features = [torch.empty(1, s.channels, s.height, s.width, device="meta") for s in specs]
        training = self.training
        self.eval()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            torch.func.functional_call(self, shapes, (features,))
        self.train(training)
        return counter.get_total_flops() // 2


def build_feature_decoder(config: RunConfig, specs: Sequence[FeatureSpec]) -> FeatureDecoder:
    """Fusion and decoder for features of the given shapes; initial weights depend on the run's seed alone."""
    fusion = None
    if config.fusion is not None:
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            fusion = create_fusion(config.fusion, specs, config.data.crop)
    decoder = create_decoder(
        config.decoder.name,
        specs if fusion is None else [fusion.spec],
        config.data.crop,
        seed=config.seed,
        parameters=config.decoder.parameters,
        **config.decoder.options,
    )
    if fusion is not None and decoder.closed_form and fusion.trainable:
        untrained = " or ".join(repr(name) for name, cls in FUSIONS.items() if not cls.trainable)
        raise AfterimageError(
            f"{config.decoder.name} is fitted in closed form on features as they are; fuse them with "
            f"{untrained}, which have nothing to learn by descent, instead of {config.fusion.name!r}"
        )
    return FeatureDecoder(decoder, fusion)


class Reconstructor(nn.Module):
    """`images -> encoder(s) -> [fusion ->] decoder -> images`, all in [0, 1]. Encoders stay frozen."""

    def __init__(self, encoders: Encoder | MultiEncoder, decoder: Decoder | FeatureDecoder) -> None:
        super().__init__()
        self.encoders = encoders
        self.head = decoder if isinstance(decoder, FeatureDecoder) else FeatureDecoder(decoder)

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 3 height width"]:
        return self.head(self.encoders(images))

    @torch.inference_mode()
    def reconstruct(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch 3 height width"]:
        """`forward` without gradients."""
        return self(images)
