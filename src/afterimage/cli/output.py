"""Output of results on the terminal."""

from __future__ import annotations

from collections.abc import Mapping

from afterimage.config import counted
from afterimage.runs.results import METRICS, LpipsStatus, Score
from afterimage.runtime.terminal import console


def score_line(name: str, score: Score | None, lpips: LpipsStatus) -> str:
    """Return a score as text, such as `PSNR 24.31 ± 2.80 dB over 100 images`; None for an unavailable metric."""
    metric = METRICS[name]
    if score is None:
        return f"{metric.title} unavailable: {lpips.reason}"
    label = f"LPIPS ({lpips.net})" if name == "lpips" else metric.title
    unit, digits = metric.unit, 2 if name == "psnr" else 4
    if score.std is None:
        return f"{label} {score.mean:.{digits}f}{unit}"
    return (
        f"{label} {score.mean:.{digits}f} ± {score.std:.{digits}f}{unit} over {counted(score.count, 'image')}"
    )


def image_lines(scores: Mapping[str, float | None], lpips: LpipsStatus) -> list[str]:
    """Return a `score_line` for each score of one image."""
    return [
        score_line(name, None if value is None else Score(value, None, 1), lpips)
        for name, value in scores.items()
    ]


def print_table(runs: list) -> None:
    """Print the table of results, and below it the table of measured bounds if there are any."""
    from afterimage.report.rows import read_rows
    from afterimage.report.tables import console_table

    rows = read_rows(runs)
    console(160).print(console_table(rows))
    if rows.inversions:
        from afterimage.report.inversion import print_bounds

        print_bounds(rows.inversions)
