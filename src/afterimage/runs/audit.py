"""The result of an audit as plain values, between what measures it and what reports it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

BLIND = "no features"
"""The attacker who sees nothing and answers with the mean of their own images."""


@dataclass
class Results:
    """Everything measured, as plain values: `rows` are cells' summaries, `costs` by layer and defence."""

    subject: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    blind: list[dict[str, Any]] = field(default_factory=list)
    costs: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    unmeasured: set[tuple[str, str]] = field(default_factory=set)
    """Layers and defences of which an attacker, or all of it, could not be measured."""


SIDE = 112
"""Images are compared at this many pixels on their shorter side, or at their own size where they are smaller."""

DISTANCES = {
    "pixels": "mean squared error of pixels",
    "correlation": "one minus the correlation of pixels, which contrast and brightness do not change",
    "lpips": "LPIPS, a learned perceptual distance",
}
