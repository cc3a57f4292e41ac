"""What inversions came to, from their run folders: one table of decoder, inversion and refinement, and the curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from afterimage.evaluation.intervals import mean_interval
from afterimage.report.figures.inversion import PAST, features_of, highest, mean_curve, named_features
from afterimage.report.findings import Finding, Numbers
from afterimage.report.format import number, span
from afterimage.report.rows import Row
from afterimage.runs.files import write_atomic, write_csv, write_json
from afterimage.runs.results import METRICS, Score
from afterimage.runtime.terminal import console


def bound_rows(inversions: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows for decoders, inversions from grey and refinements, in this order for each set of sources."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for found in inversions:
        facts, rows = found.inversion, groups.setdefault(features_of(found), [])
        if alone := facts.decoder_alone:
            row = _row(found, "decoder", facts.start_decoder, alone.scores, alone.seconds, 0, None)
            if not any(_same(row, other) for other in rows):
                rows.append(row)
        way = "refined" if facts.start else "inversion"
        measured = found.scores, facts.seconds_per_image, facts.steps, facts.feature_loss
        passes, psnr = highest(mean_curve(found.run))
        row = _row(found, way, found.decoder, *measured)
        rows.append(row | {"peak_passes": passes, "peak_psnr": psnr})
    order = ("decoder", "inversion", "refined")
    return [row for rows in groups.values() for row in sorted(rows, key=lambda row: order.index(row["way"]))]


def _row(
    found: Row, way: str, name: str, scores: Mapping[str, Score | None], seconds: float, passes: int,
    loss: float | None,
) -> dict[str, Any]:  # fmt: skip
    lpips = scores["lpips"]
    return {
        "sources": " + ".join(found.sources), "weights": found.origin, "way": way, "how": name,
        "psnr": scores["psnr"].mean, "ssim": scores["ssim"].mean, "lpips": lpips and lpips.mean,
        "lpips_net": found.lpips.net, "feature_loss": loss, "passes": passes,
        "seconds_per_image": round(seconds, 3), "images": scores["psnr"].count, "run": found.run.name,
        "optimizer": found.config.inversion.optimizer, "peak_passes": None, "peak_psnr": None,
    }  # fmt: skip


def _same(row: dict[str, Any], other: dict[str, Any]) -> bool:
    """The same decoder on the same images: several refinements may start from it."""
    measured = ("way", "how", "psnr", "ssim", "lpips", "images")
    return all(row[name] == other[name] for name in measured)


def bound_findings(inversions: Sequence[Row]) -> list[Finding]:
    """Set what decoders made of images beside the same images refined until the features fit, if there are any.

    Scores are means over the same images with 95 % bootstrap intervals (BCa).
    """
    refined = [
        row for row in inversions if row.inversion and row.inversion.start and row.inversion.decoder_alone
    ]
    if not refined:
        return []
    lines, metrics = [], [name for name in METRICS if any(row.scores[name] for row in refined)]
    for row in refined:
        alone = row.inversion.decoder_alone.scores
        cells = [named_features(" + ".join(row.sources), row.origin), row.inversion.start_decoder]
        for name in metrics:
            before, after = (
                number(s.mean, name) if s else "unavailable" for s in (alone[name], row.scores[name])
            )
            values = list(row.values(name).values())
            if len(values) > 1:
                after += f" {span(mean_interval(np.array(values)), name, signed=False)}"
            cells += [before, after]
        lines.append((*cells, f"{row.inversion.feature_loss:.2g}", str(len(row.per_image))))
    header = [f"{METRICS[name].title} {way}" for name in metrics for way in ("decoder", "refined")]
    counts = [str(count) for count in sorted({len(row.per_image) for row in refined})]
    passes = [str(steps) for steps in sorted({row.inversion.steps for row in refined})]
    return [
        Finding(
            "What a layer keeps, and what its decoder missed",
            paragraphs=(
                "A decoder's score at depth is the decoder's weakness as much as the layer's loss. The refined image "
                "started from the decoder's and was changed until its features were those of the original "
                f"({' or '.join(passes)} passes through the encoder, on the first {' or '.join(counts)} test images). "
                "What came back was read from the features, so it is a lower bound on what they keep: the measured "
                "bound. What the features do not determine is filled in, not averaged, which can cost PSNR.",
            ),
            tables=(
                Numbers(
                    "Decoder and measured bound on the same images, mean [95 % interval]",
                    ("features", "decoder", *header, "feature loss", "images"),
                    tuple(lines),
                ),
            ),
            wide=True,
        )
    ]


def print_bounds(inversions: Sequence[Row]) -> None:
    """The table of these inversions on the terminal, and of each whether it went on past its peak."""
    from rich.table import Table

    table = Table(caption="measured lower bounds on what the features hold", caption_justify="left")
    table.add_column("features", overflow="fold")
    table.add_column("how")
    for column in ("PSNR (dB)", "SSIM", "LPIPS", "feature loss", "passes", "s an image", "images"):
        table.add_column(column, justify="right")
    rows = bound_rows(inversions)
    for row in rows:
        lpips = "–" if row["lpips"] is None else f"{row['lpips']:.3f}"
        loss = "–" if row["feature_loss"] is None else f"{row['feature_loss']:.2g}"
        table.add_row(
            named_features(row["sources"], row["weights"]), row["how"], f"{row['psnr']:.2f}", f"{row['ssim']:.3f}",
            lpips, loss, str(row["passes"]), f"{row['seconds_per_image']:.2f}", str(row["images"]),
        )  # fmt: skip
    screen = console(160)
    screen.print(table)
    for row in rows:
        if row["peak_psnr"] is not None and row["peak_psnr"] - row["psnr"] >= PAST:
            hint = ""
            if not row["peak_passes"]:
                hint = "; the start is the best there is"
            elif row["optimizer"] == "lbfgs":  # Adam's learning rate depends on how many steps there will be
                hint = f". --steps {row['peak_passes']} ends there"
            screen.print(
                f"{named_features(row['sources'], row['weights'])}, {row['how']}: highest after "
                f"{row['peak_passes']} passes, "
                f"{row['peak_psnr']:.2f} dB; later ones fit the features and lead away from the images, "
                f"which only the originals tell{hint}",
                soft_wrap=True,
            )


def write_bounds(inversions: Sequence[Row], output: Path) -> list[Path]:
    """bounds.csv, bounds.json and saturation.png and .svg below `output`; returns their paths."""
    from afterimage.report.figures.inversion import draw_saturation
    from afterimage.report.figures.style import render

    rows = bound_rows(inversions)
    paths = [output / name for name in ("bounds.csv", "bounds.json", "saturation.png", "saturation.svg")]
    write_csv(paths[0], rows)
    write_json(paths[1], rows)
    for path, content in zip(paths[2:], render(draw_saturation(inversions).figure), strict=True):
        write_atomic(path, content)
    return paths
