"""Compare all decoders at equal training time on shallow and deep layers, for which `residual` is designed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from afterimage.config import AfterimageError, to_dict
from benchmarks.child import in_child
from benchmarks.rows import Goal, Row
from benchmarks.settings import Settings

SOURCES = (
    "resnet18.tv_in1k:layer1",
    "resnet18.tv_in1k:layer3",
    "vit_tiny_patch16_224.augreg_in21k_ft_in1k:block0",
    "vit_tiny_patch16_224.augreg_in21k_ft_in1k:block11",
)
DECODERS = ("residual", "transposed", "attention", "wavelet", "frequency", "linear")


def decoders(settings: Settings) -> Iterator[Row]:
    """Measure test errors after equal training time: `residual` against the best of the other decoders."""
    data = settings.photographs()
    for source in SOURCES:
        what = f"{source}: test error after {settings.seconds:g} s of training a decoder"
        runs = [to_dict(settings.run(source, name, data, weights="pretrained")) for name in DECODERS]
        try:
            with settings.doing(what):
                limits = {"seconds": settings.seconds, "accelerator": settings.accelerator}
                outcome = in_child("contest:compare", configs=runs, **limits).value
        except AfterimageError as error:
            yield Row("decoders", what, goal=Goal("ratio", 1.0), unavailable=str(error))
            continue
        yield _row(what, outcome)


def _row(what: str, outcome: dict[str, dict[str, Any]]) -> Row:
    ours, *others = (outcome[name] | {"name": name} for name in DECODERS)
    best = min(others, key=lambda one: one["mse"])
    listed = ", ".join(
        f"{name} {one['psnr']:.2f} dB ({one['images']:,} images in {one['seconds']:.0f} s)"
        for name, one in outcome.items()
    )
    return Row(
        "decoders",
        what,
        "MSE",
        [ours["mse"]],
        [best["mse"]],
        goal=Goal("ratio", 1.0),
        notes=[f"reference: {best['name']}, the best of the others", listed],
        points=[{"decoder": name, **one} for name, one in outcome.items()],
    )
