"""Figures of a report, drawn from plain rows. Importing this package imports matplotlib."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from afterimage.config import AfterimageError
from afterimage.report.figures.controls import controls, error_breakdown, rate
from afterimage.report.figures.curves import saturation, training_curves
from afterimage.report.figures.depth import bound_by_depth, quality_by_depth
from afterimage.report.figures.distribution import distributions
from afterimage.report.figures.fusion import fusion_weights
from afterimage.report.figures.image_grid import bound_images, grid, own_images, pages
from afterimage.report.figures.scatter import quality_by_locations, quality_by_parameters
from afterimage.report.figures.style import Drawing, render, style
from afterimage.report.rows import Rows
from afterimage.runtime.terminal import Progress, no_progress

__all__ = ["UNDRAWABLE", "Drawing", "draw", "own_images", "render", "style"]

DRAWING_ERRORS = (AfterimageError, ArithmeticError, ValueError)
"""Errors of images that cannot be read, and of matplotlib for numbers that no axis can show."""
FIGURES = (
    (bound_images, bound_by_depth, quality_by_depth),
    (
        fusion_weights, quality_by_locations, quality_by_parameters, training_curves, distributions, saturation,
        controls, error_breakdown, rate,
    ),
)  # fmt: skip
"""Functions that draw the figures of rows, in the order of a report, with the grids of images in between."""


def draw(
    rows: Rows, progress: Progress = no_progress, problems: list[str] | None = None
) -> Iterator[Drawing]:
    """Draw every figure for which the rows have data, one at a time, as figures are large.

    Args:
        rows: rows of the report
        progress: called with the progress
        problems: list to which messages on figures that cannot be drawn are added; None raises the error

    Yields:
        the figures
    """
    grids = [(page.title, partial(grid, page)) for page in pages(rows)]
    before, after = (
        [(make.__name__.replace("_", " "), partial(make, rows)) for make in group] for group in FIGURES
    )
    jobs = [*before, *grids, *after]
    for i, (name, job) in enumerate(jobs):
        progress("figures", i, len(jobs), figure=name)
        try:
            with style():
                drawings = job()
        except DRAWING_ERRORS as error:
            if problems is None:
                raise
            problems.append(f"The figure of {name} could not be drawn: {error}")
            continue
        yield from drawings
    progress("figures", len(jobs), len(jobs))
