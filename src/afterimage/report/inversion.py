"""What inversions came to, from their run folders: one table of decoder, inversion and refinement, and the curves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from afterimage.report.figures.inversion import PAST, features_of, highest, mean_curve, named_features
from afterimage.runs.files import write_atomic, write_csv, write_json
from afterimage.runs.run import Run, origin
from afterimage.runtime.terminal import console


def limit_rows(folders: Sequence[Run]) -> list[dict[str, Any]]:
    """Rows for decoders, inversions from grey and refinements, in this order for each set of sources."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for folder in folders:
        summary = folder.summary
        rows = groups.setdefault(features_of(summary), [])
        if alone := summary.get("decoder_alone"):
            name = summary["decoder"].removesuffix(" + refined")
            row = _row(folder, summary, "decoder", name, alone["scores"], alone["seconds"], 0, None)
            if not any(_same(row, other) for other in rows):
                rows.append(row)
        way = "refined" if summary["start"] else "inversion"
        facts = summary["scores"], summary["seconds_per_image"], summary["steps"], summary["feature_loss"]
        passes, psnr = highest(mean_curve(folder))
        row = _row(folder, summary, way, summary["decoder"], *facts)
        rows.append(row | {"peak_passes": passes, "peak_psnr": psnr})
    order = ("decoder", "inversion", "refined")
    return [row for rows in groups.values() for row in sorted(rows, key=lambda row: order.index(row["way"]))]


def _row(
    folder: Run, summary: dict[str, Any], way: str, name: str, scores: dict[str, Any], seconds: float,
    passes: int, loss: float | None,
) -> dict[str, Any]:  # fmt: skip
    lpips = scores["lpips"]
    return {
        "sources": " + ".join(summary["sources"]), "weights": origin(summary), "way": way, "how": name,
        "psnr": scores["psnr"]["mean"], "ssim": scores["ssim"]["mean"], "lpips": lpips and lpips["mean"],
        "lpips_net": summary["lpips"]["net"], "feature_loss": loss, "passes": passes,
        "seconds_per_image": round(seconds, 3), "images": scores["psnr"]["count"], "run": folder.name,
        "optimizer": summary.get("optimizer"), "peak_passes": None, "peak_psnr": None,
    }  # fmt: skip


def _same(row: dict[str, Any], other: dict[str, Any]) -> bool:
    """The same decoder on the same images: several refinements may start from it."""
    measured = ("way", "how", "psnr", "ssim", "lpips", "images")
    return all(row[name] == other[name] for name in measured)


def print_limit(folders: Sequence[Run]) -> None:
    """The table of these inversions on the terminal, and of each whether it went on past its peak."""
    from rich.table import Table

    table = Table(caption="measured lower bounds on what the features hold", caption_justify="left")
    table.add_column("features", overflow="fold")
    table.add_column("how")
    for column in ("PSNR (dB)", "SSIM", "LPIPS", "feature loss", "passes", "s an image", "images"):
        table.add_column(column, justify="right")
    rows = limit_rows(folders)
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


def write_limit(folders: Sequence[Run], output: Path) -> list[Path]:
    """limit.csv, limit.json and saturation.png and .svg below `output`; returns their paths."""
    from afterimage.report.figures.inversion import draw_saturation
    from afterimage.report.figures.style import render

    rows = limit_rows(folders)
    paths = [output / name for name in ("limit.csv", "limit.json", "saturation.png", "saturation.svg")]
    write_csv(paths[0], rows)
    write_json(paths[1], rows)
    for path, content in zip(paths[2:], render(draw_saturation(folders).figure), strict=True):
        write_atomic(path, content)
    return paths
