"""Live use of finished decoders: a visitor's settings become reconstructions and scores."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from torch import Tensor

from afterimage.analysis.audit.defences import Defence, create_defence
from afterimage.analysis.inversion.decoder_errors import DecoderErrors
from afterimage.analysis.inversion.inputs import from_files
from afterimage.analysis.inversion.invert import encode
from afterimage.analysis.inversion.refinement import Refinement, decoder_errors
from afterimage.config import DataConfig, split_source
from afterimage.config.inversion import InvertConfig
from afterimage.data.dataset import prepare_image
from afterimage.data.decode import MAX_PIXELS, BadImage, check_header, read_bytes
from afterimage.evaluation.evaluate import to_uint8
from afterimage.evaluation.metrics import Metrics
from afterimage.experiments.live_state import LiveState, examples
from afterimage.runs.results import LpipsStatus
from afterimage.runs.run import Run
from afterimage.training.checkpoint import load_reconstructor

YIELD_SECONDS = 0.005
"""Seconds after each pass of a search in which another thread may take the networks."""
HEATMAP_MAX = 0.25
"""Mean absolute colour difference of a pixel, in [0, 1], at which a heat map reaches its brightest colour."""
CACHE_SIZE = 4
"""Number of recent images, fitted defences of each source and learned errors that stay in memory, for each decoder."""


@dataclass(frozen=True)
class LiveView:
    """View of one decoder for a state: original, reconstruction, heat maps and scores.

    All images and heat maps are `(H, W, 3)` uint8.

    Attributes:
        title: layers, with models named without their tags
        label: shapes of the features, and name of the decoder
        original: the image as the encoder saw it
        image: the reconstruction
        error: heat map of the difference between reconstruction and original
        change_map: heat map of the difference between the reconstructions from changed and unchanged features; None if
            nothing was changed
        scores: PSNR, SSIM and LPIPS against the original, by name; None for a metric that is not available
        lpips: the LPIPS network, or why LPIPS is not available
        notes: remarks for the visitor, such as how many values were changed
    """

    title: str
    label: str
    original: np.ndarray
    image: np.ndarray
    error: np.ndarray
    change_map: np.ndarray | None
    scores: Mapping[str, float | None]
    lpips: LpipsStatus
    notes: tuple[str, ...] = ()


class LiveDecoder:
    """A finished run's decoder, with a cache of the features of the last few images and of fitted defences.

    Args:
        run: the run
        weights: file or folder of the encoders' weights; None for the run's own setting
        lpips: LPIPS network; None for the one that the run was measured with
        max_pixels: largest number of pixels of an uploaded image
        device: device of the computations

    Raises:
        AfterimageError: the reconstructor cannot be loaded, see `load_reconstructor`
    """

    def __init__(
        self,
        run: Run,
        *,
        weights: str | None = None,
        lpips: str | None = None,
        max_pixels: int = 50_000_000,
        device: str = "cpu",
    ) -> None:
        self.data, self.device, self.max_pixels = run.config.data, device, max_pixels
        self.reconstructor = load_reconstructor(run, weights=weights).to(device)
        self.specs = self.reconstructor.encoders.specs
        self.title = " + ".join(
            f"{model.split('.')[0]} {layer}" for model, layer in map(split_source, run.config.sources)
        )
        self.label = (
            f"{' + '.join('×'.join(map(str, spec.shape)) for spec in self.specs)} · {run.config.decoder.name}"
        )
        self.metrics = Metrics(lpips or run.lpips_net, size=min(self.data.size)).to(device)
        self._encoded = lru_cache(CACHE_SIZE)(self._encode)
        self._defence = lru_cache(CACHE_SIZE * len(self.specs))(self._fit_defence)
        self._errors = lru_cache(CACHE_SIZE)(self._learn_errors)
        self._networks = threading.Lock()  # held while they run, since they keep features meanwhile

    def show(self, state: LiveState, image: Path, second: Path) -> LiveView:
        """Decode the features of `image` after the changes in `state`; the result depends on the arguments alone.

        A search that runs at the same time waits after its current pass.

        Args:
            state: the settings
            image: the image file; its features are cached by its path
            second: file of the second image, whose features are swapped or averaged in

        Raises:
            BadImage: a file is not an image, or has too many pixels
        """
        with self._networks:
            return self._view(state, image, second, self._decode(self._features(state, image, second)))

    def refine(
        self, state: LiveState, image: Path, second: Path, *, steps: int
    ) -> Iterator[tuple[int, LiveView]]:
        """Refine the decoder's reconstruction: search for an image whose features match those changed by `state`.

        Args:
            state: the settings
            image: the image file
            second: file of the second image
            steps: number of passes through the encoder and back

        Yields:
            the number of passes done and a view of the best image so far, at every milestone of the saturation curve;
            closing the iterator ends the search

        Raises:
            AfterimageError: a file is not an image, or the search failed
        """
        with self._networks:
            targets = [target.clone() for target in self._features(state, image, second)]
            errors = self._errors(frozenset((state.image, state.second)))
            refinement = Refinement(self.reconstructor, InvertConfig(steps=steps), errors, seed=0)
            search = refinement.refine_features(targets, progress=self._yield_turn)
        while True:
            with self._networks:
                if (found := next(search, None)) is None:
                    return
                view = self._view(state, image, second, found.images)
            yield found.step, view

    def _yield_turn(self, *_: Any, **__: Any) -> None:
        """Between two passes of a search, leave the networks to a visitor who waits for them."""
        self._networks.release()
        time.sleep(YIELD_SECONDS)
        self._networks.acquire()

    def _encode(self, path: Path) -> tuple[Tensor, tuple[Tensor, ...]]:
        most = MAX_PIXELS if path in examples().values() else self.max_pixels
        image = _prepared(path, self.data, most).to(self.device)
        return image, tuple(encode(self.reconstructor.encoders, image))

    @torch.inference_mode()
    def _features(self, state: LiveState, image: Path, second: Path) -> list[Tensor]:
        """Return the features of an image after the changes and defences in `state`."""
        features = list(self._encoded(image)[1])
        if state.change != "none":
            others = self._encoded(second)[1]
            for i, spec in enumerate(self.specs):
                mine, other = features[i], others[i]
                new = {
                    "zero": torch.zeros_like(mine),
                    "swap": other,
                    "average": (mine + other) / 2,
                }[state.change]
                features[i] = torch.where(state.change_mask(spec, self.data.size).to(mine.device), new, mine)
        return [defence(maps) for maps, defence in zip(features, self._defences(state), strict=True)]

    def _defences(self, state: LiveState) -> list[Defence]:
        found = [self._defence(i, state.defence(spec)) for i, spec in enumerate(self.specs)]
        for defence in found:
            defence.reseed(0)  # the same state always shows the same image
        return found

    @cached_property
    def _example_features(self) -> list[Tensor]:
        encoded = [self._encode(path)[1] for path in examples().values()]
        return [torch.cat(maps) for maps in zip(*encoded, strict=True)]

    @torch.no_grad()
    def _fit_defence(self, index: int, text: str) -> Defence:
        """Create a defence of one feature map; scales and directions are fitted on the example photographs."""
        spec = self.specs[index]
        defence = create_defence(text, spec, image_size=self.data.size).to(self.device)
        if not defence.fitted:
            defence.fit(self._example_features[index])
        return defence

    def _learn_errors(self, without: frozenset[str]) -> DecoderErrors:
        """Learn the decoder's typical errors on the example photographs, without those named in `without`."""
        paths = [path for name, path in examples().items() if name not in without]
        images = from_files(paths, resize=self.data.resize, crop=self.data.crop).images
        return decoder_errors(self.reconstructor, images, len(images), self.device)

    @torch.inference_mode()
    def _decode(self, features: Sequence[Tensor]) -> Tensor:
        return self.reconstructor.feature_decoder(features).clamp(0, 1)

    @torch.inference_mode()
    def _view(self, state: LiveState, image: Path, second: Path, rebuilt: Tensor) -> LiveView:
        original, features = self._encoded(image)
        changed = state.change != "none" or any(state.defence(spec) != "none" for spec in self.specs)
        change_map = _heat(rebuilt - self._decode(features)) if changed else None
        scores = {name: values and values[0] for name, values in self.metrics(rebuilt, original).items()}
        return LiveView(
            self.title,
            self.label,
            to_uint8(original)[0],
            to_uint8(rebuilt)[0],
            _heat(rebuilt - original),
            change_map,
            scores,
            self.metrics.lpips_status,
            tuple(self._notes(state)),
        )

    def _notes(self, state: LiveState) -> Iterator[str]:
        for spec in self.specs:
            which = f" of {spec.layer}" if len(self.specs) > 1 else ""
            if state.change != "none":
                count = int(state.change_mask(spec, self.data.size).sum())
                if state.channel >= spec.channels:
                    yield f"nothing was changed{which}: its channels are 0 to {spec.channels - 1}"
                else:
                    yield f"{count:,} of {spec.values:,} values{which} were changed"
            if (text := state.defence(spec)) != "none":
                yield f"sent{which} as {text}"


@lru_cache(CACHE_SIZE)
def _prepared(path: Path, data: DataConfig, max_pixels: int) -> Tensor:
    """Load an image with `prepare_image`; errors give the file's name without its folder on the server."""
    try:
        width, height = check_header(read_bytes(path), path.name)
        if width * height > max_pixels:
            raise BadImage(
                path.name,
                f"has {width * height / 1e6:.1f} megapixels; at most {max_pixels / 1e6:g} are taken here",
            )
        return prepare_image(path, data)
    except BadImage as error:
        raise BadImage(path.name, error.reason) from None


def _heat(difference: Tensor) -> np.ndarray:
    """Draw the mean absolute difference over colours, of one image `(1, 3, H, W)`, as a heat map `(H, W, 3)` uint8."""
    share = difference[0].abs().mean(0).div(HEATMAP_MAX).clamp(0, 1).cpu().numpy()
    return matplotlib.colormaps["inferno"](share, bytes=True)[..., :3]
