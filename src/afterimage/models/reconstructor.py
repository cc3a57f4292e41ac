"""Reconstructors: frozen encoders, fusion and decoder as one module that rebuilds images from features."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from afterimage.config import AfterimageError, FeatureSpec, RunConfig, printable_path, split_source
from afterimage.models.decoders import Decoder, create_decoder, decoder_digest
from afterimage.models.decoders.base import ClosedForm, FeatureCrop
from afterimage.models.decoders.custom import CustomDecoder
from afterimage.models.encoders.encoder import Encoder
from afterimage.models.encoders.providers import resolve_source
from afterimage.models.fusion import FUSIONS, Fusion, create_fusion
from afterimage.models.hub import pull
from afterimage.models.weight_files import load_decoder
from afterimage.runs.repository import PREFIX
from afterimage.runs.results import FeatureMap, WeightsRecord
from afterimage.runs.run import Run


class FeatureSource(nn.Module, ABC):
    """Source of features for decoders: frozen networks, or stored features.

    Attributes:
        sources: `model:layer` of each feature map
    """

    sources: tuple[str, ...]

    @property
    def specs(self) -> tuple[FeatureSpec, ...]:
        """Shape of each source's features and their position in the image, in the order of `sources`."""
        return tuple(entry.spec for entry in self.describe())

    @abstractmethod
    def describe(self) -> list[FeatureMap]:
        """Return the description of every source's features, in order (see `Encoder.describe`)."""

    @abstractmethod
    def weights_of(self, sources: Sequence[str]) -> list[WeightsRecord]:
        """Return the origin of the weights behind `sources`, one entry per network."""

    @abstractmethod
    def notes_of(self, sources: Sequence[str]) -> list[str]:
        """Return notes for the run's result on how images reach the networks, or on the features' origin."""

    def weight_digests(self, sources: Sequence[str]) -> dict[str, str]:
        """Return the identity of the weights behind `sources` by model: a SHA-256, or the random draw."""
        return {weights.model: weights.identity for weights in self.weights_of(sources)}

    def index(self, source: str) -> int:
        """Return the index of a source in `sources`."""
        return self.sources.index(source)


class MultiEncoder(FeatureSource):
    """Frozen encoders for any number of sources; each network runs once, up to its deepest layer in use.

    Args:
        sources: names `model:layer`, for example `resnet34:layer2`.
        weights: `pretrained`, a file or folder of weights, or a kind of random weights (`random`,
            `random-init`).
        image_size: side of the images in pixels, or `(height, width)`; the features' shapes depend on it.
        seed: seed of random weights.

    Raises:
        AfterimageError: for an unknown model or layer, and for weights that are not available.
    """

    def __init__(
        self,
        sources: Sequence[str],
        *,
        weights: str = "pretrained",
        image_size: int | tuple[int, int] = 224,
        seed: int = 0,
    ) -> None:
        super().__init__()
        sources = [resolve_source(source) for source in sources]
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
        self._order = [position[source] for source in sources]

    def index(self, source: str) -> int:
        """Return the index of a source in `sources`; the model's tag may be left out."""
        return self.sources.index(resolve_source(source))

    def describe(self) -> list[FeatureMap]:
        entries = [entry for encoder in self.encoders for entry in encoder.describe()]
        return [entries[i] for i in self._order]

    def weights_of(self, sources: Sequence[str]) -> list[WeightsRecord]:
        used = set(sources)
        return [e.weights.record for e in self.encoders if used.intersection(e.sources)]

    def notes_of(self, sources: Sequence[str]) -> list[str]:
        used = set(sources)
        return [note for e in self.encoders if used.intersection(e.sources) for note in e.input_notes]

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> list[Tensor]:
        """Return the features of images `(B, 3, H, W)` in [0, 1].

        Returns:
            The feature map `(B, C, h, w)` of each source, in the order of `sources`.
        """
        features = [feature for encoder in self.encoders for feature in encoder(images)]
        return [features[i] for i in self._order]


def empty_features(specs: Sequence[FeatureSpec], device: torch.device) -> list[Tensor]:
    """Return empty feature maps `(0, C, h, w)`, which some networks cannot make from an empty batch."""
    return [torch.zeros(0, *spec.shape, device=device) for spec in specs]


class FeatureDecoder(nn.Module):
    """The trained part of a reconstructor, which rebuilds images from feature maps.

    `feature maps -> [fusion -> one feature map ->] decoder -> images`

    Args:
        decoder: decoder of one feature map.
        fusion: fusion of several feature maps into one; None if there is only one.
    """

    def __init__(self, decoder: Decoder, fusion: Fusion | None = None) -> None:
        super().__init__()
        self.fusion = fusion
        self.decoder = decoder

    def forward(self, features: Sequence[Tensor], crop: FeatureCrop | None = None) -> Tensor:
        """Rebuild images from features.

        Args:
            features: the feature map `(B, C, h, w)` of each source.
            crop: the part of the feature map to decode, one of the decoder's `feature_crops`; None for all of it.

        Returns:
            Images `(B, 3, H, W)` in [0, 1], or the part of them that the crop covers.
        """
        return self.decoder(self.fuse(features), crop)

    def fuse(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Return the one feature map that the decoder reads, in a list."""
        return list(features) if self.fusion is None else [self.fusion(features)]

    @property
    def trainable(self) -> bool:
        """True if any parameter is trained by gradient descent."""
        return any(parameter.requires_grad for parameter in self.parameters())

    @property
    def closed_forms(self) -> list[ClosedForm]:
        """Parts that are fitted in closed form, in the order of fitting."""
        return [part for part in (self.fusion, self.decoder) if part is not None and part.closed_form]

    def partial_fit(
        self, part: ClosedForm, features: Sequence[Tensor], images: Tensor, *, validation: bool = False
    ) -> None:
        """Add a batch to the fit of one of `closed_forms`: a fusion gets the features, a decoder the fused ones."""
        inputs = features
        if part is not self.fusion:
            inputs = (
                self.fuse(features) if len(images) else empty_features([self.decoder.spec], images.device)
            )
        part.partial_fit(inputs, images, validation=validation)

    def macs(self, specs: Sequence[FeatureSpec]) -> int:
        """Count the multiply-adds of decoding one image with features of the given shapes."""
        # Meta tensors have no values; on a CPU the counter would miss the kernel that computes attention.
        tensors = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        shapes = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
        training = self.training
        self.eval()
        try:
            return self._count(shapes, specs)
        except Exception:
            if not isinstance(self.decoder, CustomDecoder):
                raise
            return self._count(tensors, specs)  # it also holds tensors that are not registered
        finally:
            self.train(training)

    @torch.no_grad()
    def _count(self, tensors: dict[str, Tensor], specs: Sequence[FeatureSpec]) -> int:
        device = next((tensor.device for tensor in tensors.values()), None)
        features = [torch.zeros(1, *spec.shape, device=device) for spec in specs]
        with FlopCounterMode(display=False) as counter:
            torch.func.functional_call(self, tensors, (features,))
        return counter.get_total_flops() // 2


def build_feature_decoder(config: RunConfig, specs: Sequence[FeatureSpec]) -> FeatureDecoder:
    """Build a run's fusion and decoder for features of the given shapes.

    Initial weights depend only on the run's seed.

    Raises:
        AfterimageError: for an unknown name or option, and for a closed-form decoder after a trained fusion.
    """
    fusion = None
    if config.fusion is not None:
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            fusion = create_fusion(config.fusion, specs, config.data.size)
    decoder = create_decoder(
        config.decoder.name,
        specs if fusion is None else [fusion.spec],
        config.data.size,
        seed=config.seed,
        parameters=config.decoder.parameters,
        **config.decoder.options,
    )
    if fusion is not None and decoder.closed_form and fusion.trainable:
        *others, last = (repr(name) for name, cls in FUSIONS.items() if not cls.trainable)
        untrained = f"{', '.join(others)} or {last}"
        raise AfterimageError(
            f"{config.decoder.name} is fitted in closed form on features as they are; fuse them with "
            f"{untrained}, which have no parameters to train by gradient descent, instead of {config.fusion.name!r}"
        )
    return FeatureDecoder(decoder, fusion)


class Reconstructor(nn.Module):
    """Encoders and decoder as one module: `images -> frozen encoders -> [fusion ->] decoder -> images`.

    Args:
        encoders: maps images to a list of feature maps; stays frozen and in evaluation mode.
        decoder: maps the feature maps back to images.

    Attributes:
        origin: origin of the decoder: a run folder, or `hub:USER/NAME@COMMIT`; empty for a new one
    """

    def __init__(self, encoders: Encoder | FeatureSource, decoder: Decoder | FeatureDecoder) -> None:
        super().__init__()
        self.origin = ""
        self.encoders = encoders
        self.feature_decoder = decoder if isinstance(decoder, FeatureDecoder) else FeatureDecoder(decoder)

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 3 height width"]:
        """Rebuild images `(B, 3, H, W)` in [0, 1] from their features, with the same size and range."""
        features = self.encoders(images)
        return self.feature_decoder(features)

    @torch.inference_mode()
    def reconstruct(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch 3 height width"]:
        """Rebuild images as `forward` does, without gradients."""
        return self(images)

    @classmethod
    def from_pretrained(
        cls, name: str | Path, *, revision: str | None = None, weights: str | None = None
    ) -> Reconstructor:
        """Load a decoder and its encoder from a run folder, or from the hub, where `afterimage push` put it.

        Files of the hub are pinned to a commit, which `origin` names, and their digests are checked. The
        encoder's weights are found as for any encoder, and must be those that the decoder was trained on.

        Args:
            name: `[hub:]USER/NAME[/DECODER][@REVISION]`, or a run folder
            revision: branch, tag or commit if `name` has none; None for `main`
            weights: file or folder of the encoder's weights; None to search for them

        Raises:
            AfterimageError: the decoder is not available, is not the one that its repository describes, or
                was trained on other weights
        """
        is_folder = not str(name).startswith(PREFIX) and Path(name).is_dir()
        run = Run.open(name) if is_folder else pull(str(name), revision=revision)
        config, given = run.config, weights or run.config.weights
        size = config.data.size
        return load_trained_decoder(
            run, MultiEncoder(config.sources, weights=given, image_size=size, seed=config.seed)
        )


def load_trained_decoder(run: Run, encoders: FeatureSource) -> Reconstructor:
    """Combine a finished run's decoder with encoders, in evaluation mode.

    Args:
        run: the run
        encoders: encoders of the run's sources

    Raises:
        AfterimageError: the run has no decoder, the decoder was made for other features, or it was trained on
            other weights of the encoders
    """
    config, path = run.config, run.file("decoder.safetensors")
    if not path.exists():
        raise AfterimageError(f"run {run.name} has no decoder yet (state: {run.state})")
    _check_same_weights(run, encoders)
    try:
        sources = list(encoders.sources)
        feature_identity = {"sources": sources, "weights": encoders.weight_digests(sources)}
        if code := decoder_digest(config.decoder.name):
            feature_identity["code"] = code
        tensors = load_decoder(path, feature_identity)
        model = build_feature_decoder(config, encoders.specs)
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise AfterimageError(f"cannot load {printable_path(path)}: {error}") from None
    loaded = Reconstructor(encoders, model).eval()
    loaded.origin = run.origin
    return loaded


def _check_same_weights(run: Run, encoders: FeatureSource) -> None:
    """Raise an `AfterimageError` that names the network if the encoders have other weights or code than the run had."""
    if not run.has_result:
        return
    for before, now in run.result.other_weights(encoders.weights_of(encoders.sources)):
        raise AfterimageError(
            f"run {run.name} was trained on weights of {now.model} with {_describe_weights(before)}, but these have "
            f"{_describe_weights(now)}"
        )


def _describe_weights(weights: WeightsRecord) -> str:
    digest = f"digest {weights.sha256[:12] or f'none: {weights.label}'} ({weights.location})"
    return f"{digest} and code {weights.code[:12]}" if weights.code else digest
