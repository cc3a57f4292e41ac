"""Results of inversions in words and tables: measured bounds beside decoders' scores, and the curves."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

from afterimage.config.inversion import tuning_image_indices
from afterimage.evaluation.intervals import INTERVAL_NAME
from afterimage.report.bounds import OVERRUN_DB, Bound, features_label, mean_curve, named_features, with_curve
from afterimage.report.format import (
    Finding,
    TextTable,
    extent,
    format_score,
    interval_ends,
    interval_text,
    significant,
)
from afterimage.report.rows import Row, Rows, group_by, lpips_nets, mean_over_images, short_encoders
from afterimage.report.tables import heading
from afterimage.runs.files import write_atomic, write_csv, write_json
from afterimage.runs.results import METRICS
from afterimage.runtime.terminal import console


def bound_rows(inversions: Sequence[Row]) -> list[dict[str, Any]]:
    """Return rows by features: decoders, best estimates, inversions from grey, refinements, in this order."""
    order = ("decoder", "estimate", "inversion", "refined")
    rows = []
    for own in group_by(inversions, features_label).values():
        lines: list[dict[str, Any]] = []
        for found in own:
            facts, alone = found.inversion, found.inversion.decoder_alone
            cost = (facts.seconds_per_image, facts.steps, facts.feature_loss)
            answers = [(found.config.result_kind, found.decoder, found.scores, *cost)]
            if alone:
                cost = (alone.seconds, 0, alone.feature_loss)
                answers.insert(0, ("decoder", facts.start_decoder, alone.scores, *cost))
            for way, how, scores, seconds, passes, loss in answers:
                has_curve = way != "decoder" and with_curve([found])
                peak = max(mean_curve(found.run), key=itemgetter(1)) if has_curve else (None, None)
                line = {
                    "sources": found.features_text, "weights": found.weights_label, "way": way, "how": how,
                    **{metric: scores[metric] and scores[metric].mean for metric in METRICS},
                    "lpips_net": found.lpips.net, "feature_loss": loss, "passes": passes,
                    "seconds_per_image": round(seconds, 3), "images": scores["psnr"].count, "run": found.run.name,
                    "optimizer": found.config.inversion.optimizer, "peak_passes": peak[0], "peak_psnr": peak[1],
                }  # fmt: skip
                if way != "decoder" or not any(_same(line, other) for other in lines):
                    lines.append(line)
        rows += sorted(lines, key=lambda line: order.index(line["way"]))
    return rows


def _same(row: dict[str, Any], other: dict[str, Any]) -> bool:
    """Return True for the same decoder on the same images: several refinements may start from it."""
    measured = ("way", "how", "psnr", "ssim", "lpips", "images")
    return all(row[name] == other[name] for name in measured)


TITLE = "What a layer keeps, and what its decoder missed"
GAP_LABEL = "bound − decoder"


def bound_findings(bounds: Sequence[Bound]) -> list[Finding]:
    """Compare decoders with the images that inversions found from them; empty without bounds.

    Scores and differences are means over the same images with intervals; differences are paired by image.
    """
    if not bounds:
        return []
    founds = [bound.reference for bound in bounds]
    names, metrics = _names(bounds), [m for m in METRICS if any(row.scores[m] for row in founds)]
    lines = []
    for bound, name in zip(bounds, names, strict=True):
        for answer, row in bound.rows_by_name.items():
            cells = [mean_text(row, metric) for metric in metrics]
            lines.append((name, answer, *cells, distance_text(row.inversion.feature_loss), str(bound.count)))
            name = ""
        if any(missed := [_missed_text(bound, metric) for metric in metrics]):
            lines.append(("", GAP_LABEL, *missed, "", str(bound.count)))
    nets = " / ".join(lpips_nets(founds))
    heads = [heading(metric, nets if metric == "lpips" else "") for metric in metrics]
    table = TextTable(
        f"The answers to the same test images, mean [{INTERVAL_NAME}]",
        ("features", "answer", *heads, "feature distance", "images"), tuple(lines),
    )  # fmt: skip
    tables = (table, *_controls(bounds, names, metrics))
    return [Finding(TITLE, paragraphs=tuple(_paragraphs(bounds, metrics)), tables=tables, wide=True)]


def _controls(bounds: Sequence[Bound], names: Sequence[str], metrics: Sequence[str]) -> Iterable[TextTable]:
    """Tabulate scores that do not depend on an image's own features, beside those of the bound."""
    lines = []
    for bound, name in zip(bounds, names, strict=True):
        for answer, row in bound.rows_by_name.items():
            if (controls := row.inversion.controls) is None:
                continue
            cells = [name, answer]
            for metric in metrics:
                for scores in (row.scores, controls.other_image, controls.prior_alone):
                    score = scores and scores[metric]
                    cells.append(format_score(score.mean, metric) if score else "unavailable")
            found = round(controls.identified * controls.candidates)
            lines.append((*cells, f"{found} of {controls.candidates} by {controls.distance}"))
    if not lines:
        return
    whose = ("", ", other original", ", prior alone")
    heads = [METRICS[metric].title + what for metric in metrics for what in whose]
    yield TextTable(
        "Scores that owe nothing to the image's own features: those of an answer against another image's original, and "
        "of the same search on features that tell nothing (prior alone). Last, how many answers are nearest to their "
        "own original; guessing finds one",
        ("features", "answer", *heads, "own original found"),
        tuple(lines),
    )


def _paragraphs(bounds: Sequence[Bound], metrics: Sequence[str]) -> Iterable[str]:
    refined = [bound.refined for bound in bounds if bound.refined]
    estimates = [bound.estimate for bound in bounds if bound.estimate]
    yield (
        "A decoder's low score may be the decoder's weakness as much as the layer's loss. The other images were found "
        "from the same features, so their scores are a lower bound on what the features keep: the measured bound."
    )
    if refined:
        passes = " or ".join(str(steps) for steps in sorted({row.inversion.steps for row in refined}))
        yield (
            f"The most consistent image was changed until its features were those of the original, in {passes} passes "
            "through the encoder. It shows what they know, and fills in what they do not, which can cost PSNR."
        )
    if estimates:
        yield (
            "The best estimate is the image of least expected error. It shows what the features know; what they do not "
            "is averaged, not invented."
        )
    yield (
        "The feature distance is |f − f0|² / |f0|² between the features of an answer and of the original. A decoder "
        "whose image has other features has not told what it was given."
    )
    gaps = {}
    for metric in metrics:
        means = [statistics.fmean(gap.values()) for bound in bounds if (gap := bound.gap_to_decoder(metric))]
        if means:
            told = extent(means, lambda mean, metric=metric: format_score(mean, metric, signed=True))
            gaps[metric] = f"{told}{METRICS[metric].unit} {METRICS[metric].title}"
    if gaps:
        yield f"From the decoders to the measured bound: {', '.join(gaps.values())}."
    if refined and estimates:
        yield (
            f"In the rows “{GAP_LABEL}” the bound is the most consistent image for LPIPS and the best estimate for the "
            "other scores."
        )
    if worse := "; ".join(_worse(bounds, metrics)):
        taught = (tuning_image_indices(row.data.validation, row.config.estimate.images) for row in estimates)
        text = (
            f"Below the decoder in the mean: {worse}. There the search found nothing that the decoder does not show, "
            "whose own score is the higher bound."
        )
        if learned := sorted({len(images) for images in taught} - {0}):
            text += f" The best estimates learned from {' or '.join(map(str, learned))} validation images."
        yield text


def _worse(bounds: Sequence[Bound], metrics: Sequence[str]) -> Iterable[str]:
    """Yield each metric with the layers whose bound is worse than its decoder in the digits of the table."""
    for metric in metrics:
        facts, behind = METRICS[metric], []
        for bound, name in zip(bounds, _names(bounds), strict=True):
            gaps = bound.gap_to_decoder(metric)
            gap = round(statistics.fmean(gaps.values()), facts.digits) if gaps else 0
            if facts.sign * gap < 0:
                behind.append(f"{name} ({bound.decoder_label})")
        if behind:
            yield f"{facts.title} for {', '.join(behind)}"


def _names(bounds: Sequence[Bound]) -> list[str]:
    """Return for each bound the encoder's short name and the layer, with its weights and seed where they tell apart."""
    rows = [bound.reference for bound in bounds]
    encoders, names = short_encoders(rows), []
    has_seeds = len({row.start.seed for row in rows if row.start}) > 1
    for row in rows:
        what = row.label.partition(" · ")[0] if row.is_fused else f"{encoders[row.encoder]} {row.layer}"
        seed = f", seed {row.start.seed}" if has_seeds and row.start else ""
        names.append(named_features(what, row.weights_label) + seed)
    return names


def mean_text(row: Row, metric: str) -> str:
    """Write a mean and, where the scores of two images or more are known, its interval."""
    if (score := row.scores[metric]) is None:
        return "unavailable"
    text, interval = format_score(score.mean, metric), row.intervals[metric]
    return (
        f"{text} {interval_ends(interval, metric, signed=False)}" if interval and interval.count > 1 else text
    )


def _missed_text(bound: Bound, metric: str) -> str:
    """Write the mean of bound − decoder with its interval; empty where it is not known by image."""
    if not (gaps := bound.gap_to_decoder(metric)):
        return ""
    return interval_text(mean_over_images(list(gaps.values())), metric, signed=True)


def distance_text(distance: float) -> str:
    """Write a feature distance with two significant digits, as the page's `distance`; below 0.0001 as `< 0.0001`."""
    return significant(distance, 2) if distance >= 1e-4 else "< 0.0001"


def print_bounds(inversions: Sequence[Row]) -> None:
    """Print a table of these inversions, and a remark on each that ran past its peak."""
    from rich.table import Table

    table = Table(caption="measured lower bounds on what the features hold", caption_justify="left")
    table.add_column("features", overflow="fold")
    table.add_column("how")
    for column in ("PSNR (dB)", "SSIM", "LPIPS", "feature loss", "passes", "s an image", "images"):
        table.add_column(column, justify="right")
    rows, of = bound_rows(inversions), _which(inversions)
    for row in rows:
        row["how"] += of[row["run"]]
        lpips = "–" if row["lpips"] is None else f"{row['lpips']:.3f}"
        loss = "–" if row["feature_loss"] is None else distance_text(row["feature_loss"])
        table.add_row(
            named_features(row["sources"], row["weights"]), row["how"], f"{row['psnr']:.2f}", f"{row['ssim']:.3f}",
            lpips, loss, str(row["passes"]), f"{row['seconds_per_image']:.2f}", str(row["images"]),
        )  # fmt: skip
    screen = console(160)
    screen.print(table)
    for row in rows:
        passes, peak = row["peak_passes"], row["peak_psnr"]
        if peak is not None and peak - row["psnr"] >= OVERRUN_DB:
            hint = "" if passes else "; the start is the best there is"
            if passes and row["optimizer"] == "lbfgs":  # Adam's learning rate depends on the number of steps
                hint = f". --steps {passes} ends there"
            screen.print(
                f"{named_features(row['sources'], row['weights'])}, {row['how']}: highest after {passes} passes, "
                f"{peak:.2f} dB; later ones fit the features and lead away from the images, "
                f"which only the originals tell{hint}",
                soft_wrap=True,
            )


def _which(inversions: Sequence[Row]) -> dict[str, str]:
    """Return, by run, what tells its decoder from others of the same name and features: the seed, else the run."""
    told = {row.run.name: "" for row in inversions}
    for same in group_by(inversions, lambda row: (features_label(row), row.inversion.start_decoder)).values():
        starts = {row.inversion.start: row.start for row in same}
        seeds = {start.seed for start in starts.values() if start}
        if len(starts) > 1:
            for row in same:
                is_told = row.start and len(seeds) == len(starts)
                told[row.run.name] = (
                    f", seed {row.start.seed}" if is_told else f", from {row.inversion.start[-8:]}"
                )
    return told


def write_bounds(inversions: Sequence[Row], output: Path) -> list[Path]:
    """Write bounds.csv, bounds.json and, for searches, saturation.png and .svg; return their paths."""
    from afterimage.report.figures.curves import saturation
    from afterimage.report.figures.style import render, style

    rows = bound_rows(inversions)
    write_csv(output / "bounds.csv", rows)
    write_json(output / "bounds.json", rows)
    written = [output / "bounds.csv", output / "bounds.json"]
    with style():
        drawings = saturation(Rows((), (), (), inversions=tuple(inversions)))
    for drawing in drawings:
        for suffix, content in zip(("png", "svg"), render(drawing.figure), strict=True):
            written.append(output / f"saturation.{suffix}")
            write_atomic(written[-1], content)
    return written
