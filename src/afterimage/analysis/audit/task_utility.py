"""Measure the cost of a defence: how well the network's output is preserved, and the bytes that are sent.

The whole network runs on the image, and a hook replaces the layer's output by the defended features. So any
network can be continued from any layer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from afterimage.analysis.audit.defences.chain import Defence
from afterimage.config import AfterimageError, format_count
from afterimage.data.images import ImageSet
from afterimage.evaluation.intervals import interval_dict, mean_interval, share_interval
from afterimage.models.encoders.encoder import Encoder, normalise
from afterimage.models.encoders.tensor_layout import Layout, output_items, reorder
from afterimage.models.encoders.tracing import trace
from afterimage.runtime.terminal import Progress, no_progress

Change = Callable[[Tensor], Tensor]


class CostUnavailable(Exception):
    """Error of a cost that cannot be measured; the message says why."""


@dataclass
class ContinuedNetwork:
    """Network with a hooked module: a function from images in [0, 1] to the output, optionally with other features.

    The features are those in the output of `module`, located there by `layout`.

    The `kind` of the network's output is `classes` or `embedding`.
    """

    run: Callable[[Tensor], Any]
    module: nn.Module
    layout: Layout
    kind: str

    @property
    def prefix(self) -> int:
        """Number of tokens before and after the map's locations, which are passed on undefended."""
        return self.layout.prefix + self.layout.suffix

    @torch.inference_mode()
    def __call__(self, images: Tensor, change: Change | None = None, *, layer_output: Any = None) -> Tensor:
        """Return final outputs `(B, K)`; `change` changes the map, `layer_output` replaces the layer's output."""

        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            if layer_output is not None:
                return layer_output
            return (
                output
                if change is None
                else _replace_features(output, self.layout, change(self.layout(output)))
            )

        handle = self.module.register_forward_hook(hook)
        try:
            return _output_vectors(self.run(images))
        finally:
            handle.remove()

    def has_bypass(self, images: Tensor) -> bool:
        """Return whether the network's output depends on the image beyond the layer's output.

        The output is compared with that of other images whose layer output is replaced by the original one.
        """
        outputs: list[Any] = []
        handle = self.module.register_forward_hook(
            lambda module, args, output: outputs.append(tree_map_only(Tensor, torch.clone, output))
        )
        before = self(images)
        handle.remove()
        other = self(images.flip(0).roll(1, 3), layer_output=outputs[0])
        return not torch.allclose(before, other, rtol=1e-3, atol=1e-4 * float(before.abs().max()))


def whole_network(encoder: Encoder, prediction: str = "auto") -> ContinuedNetwork:
    """Build the whole network of an encoder of one layer, including everything after the layer.

    Raises:
        CostUnavailable: the weights lack later layers, or the network's own order of tokens cannot be restored
    """
    (layer,) = encoder._layers
    model, kind = _whole(encoder, prediction)
    if reorder(model, layer.module) is not None:
        name = encoder.model_name
        raise CostUnavailable(
            f"{name} keeps its tokens in its own order, which cannot be restored after a defence"
        )
    mean, std = encoder.mean, encoder.std
    return ContinuedNetwork(
        lambda images: model(normalise(images, mean, std)),
        model.get_submodule(layer.module),
        layer.layout,
        kind,
    )


def _whole(encoder: Encoder, prediction: str) -> tuple[nn.Module, str]:
    network, size, weights = encoder.network, encoder.image_size, encoder.weights
    device, classifiers = encoder.mean.device, network.classifiers
    kinds = [prediction]
    if prediction == "auto":
        kinds = ["classes", "embedding"] if classifiers else ["embedding"]
    if weights.is_random:
        seed = int(weights.location.split()[-1])
        return trace(network, size).create_random(seed, weights.origin).to(device), kinds[0]
    reads = [names for _, names, _ in trace(network, size).reads]
    heads = tuple(f"{head}." for head in classifiers)
    reason = ""
    for kind in kinds:
        used = reads if kind == "classes" else [r for r in reads if not any(n.startswith(heads) for n in r)]
        try:
            model, _ = network.load(size, weights, used)
        except AfterimageError as error:
            reason = str(error)
            continue
        if kind == "embedding":
            model = network.without_classifier(model)
        return model.requires_grad_(False).to(device), kind
    raise CostUnavailable(reason)


def measure_cost(
    network: ContinuedNetwork,
    defences: Sequence[Defence],
    image_set: ImageSet,
    *,
    batch_size: int = 8,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Progress = no_progress,
) -> list[dict[str, Any]]:
    """Measure the costs of fitted defences on test images; the noise is drawn from `seed`.

    Returns:
        for each defence `kind`; `score`, the share of images with the same top-1 class or the mean cosine
            similarity of embeddings, with its interval; `cosine`, that mean for either kind; `bytes` of one
            image's features and prefix tokens, without entropy coding; `plain_bytes` without the defence;
            `prefix_bytes`; `notes`

    Raises:
        CostUnavailable: the network does not return one vector for each image
    """
    same: list[list[bool]] = [[] for _ in defences]
    cosines: list[list[float]] = [[] for _ in defences]
    for defence in defences:
        defence.reseed(seed)
    for start in range(0, len(image_set), batch_size):
        images = image_set.crops(range(len(image_set))[start : start + batch_size], device=device)
        plain = network(images)
        for i, defence in enumerate(defences):
            defended = network(images, lambda maps, defence=defence: defence(maps))
            same[i] += (plain.argmax(1) == defended.argmax(1)).tolist()
            cosines[i] += nn.functional.cosine_similarity(plain, defended, dim=1).tolist()
        progress("measuring what defences cost", start + len(images), len(image_set))
    notes = []
    if network.prefix:
        notes.append(
            f"{format_count(network.prefix, 'prefix token')} beside the map: counted as sent, but neither defended nor "
            "attacked, so the network may keep its answers by them alone"
        )
    if network.has_bypass(image_set.crops(range(min(2, len(image_set))), device=device)):
        notes.append(
            "more than this layer's output reaches the end of the network; the rest goes on undefended"
        )
    costs = []
    for defence, agreed, cosine in zip(defences, same, cosines, strict=True):
        extra = 4 * network.prefix * defence.spec.channels
        mean = mean_interval(np.array(cosine), (-1.0, 1.0))
        share = share_interval(np.array(agreed))
        costs.append(
            {
                "kind": network.kind,
                "score": interval_dict(share if network.kind == "classes" else mean),
                "cosine": interval_dict(mean),
                "bytes": defence.sent_bytes + extra,
                "plain_bytes": defence.plain_bytes + extra,
                "prefix_bytes": extra,
                "notes": notes,
            }
        )
    return costs


def cost_without_network(defence: Defence, reason: str) -> dict[str, Any]:
    """Return the cost of a defence without the rest of the network: bytes only, with the reason as a note."""
    sizes = {"bytes": defence.sent_bytes, "plain_bytes": defence.plain_bytes, "prefix_bytes": 0}
    return {"kind": None, "score": None, "cosine": None, **sizes, "notes": [f"cost unavailable: {reason}"]}


def _replace_features(output: Any, layout: Layout, maps: Tensor, depth: int = 0) -> Any:
    """Return a module's output with its feature map replaced: the inverse of `Layout`."""
    if depth < len(layout.key):
        step = layout.key[depth]
        inner = _replace_features(output_items(output)[step], layout, maps, depth + 1)
        if isinstance(output, MutableMapping):
            changed = copy.copy(output)
            changed[step] = inner
            return changed
        if not isinstance(output, list | tuple):
            changed = copy.copy(output)
            object.__setattr__(changed, step, inner)  # works for frozen dataclasses too
            return changed
        values = list(output)
        values[step] = inner
        return type(output)(*values) if hasattr(output, "_fields") else type(output)(values)
    if layout.axes == "NHWC":
        return maps.permute(0, 2, 3, 1).contiguous()
    if layout.axes == "NLC":
        places, after = maps.flatten(2).transpose(1, 2), output.shape[1] - layout.suffix
        return torch.cat([output[:, : layout.prefix], places, output[:, after:]], 1)
    if layout.axes == "NCL":
        after = output.shape[2] - layout.suffix
        return torch.cat([output[:, :, : layout.prefix], maps.flatten(2), output[:, :, after:]], 2)
    return maps.flatten(1) if layout.axes == "NC" else maps


def _output_vectors(output: Any) -> Tensor:
    """Find the vector of each image in a network's output, and return them as `(B, K)`."""
    while not isinstance(output, Tensor):
        values = list(output_items(output).values())
        vectors = [v for v in values if isinstance(v, Tensor) and v.ndim == 2]
        if len(vectors) == 1:
            return vectors[0].float()
        if not values:
            raise CostUnavailable(
                f"the network returns nothing that is a tensor, but a {type(output).__name__}"
            )
        output = values[0]
    if output.ndim < 2:
        raise CostUnavailable("the network returns a tensor that is not a vector for each image")
    return output.flatten(1).float()
