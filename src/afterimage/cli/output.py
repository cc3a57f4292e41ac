"""Results on the terminal."""

from __future__ import annotations

from collections.abc import Mapping

from afterimage.runtime.terminal import console


def score_line(name: str, score: dict | None, status: dict) -> str:
    """`PSNR 24.31 ± 2.80 dB over 100 images`."""
    if score is None:
        return f"{name.upper()} unavailable: {status['reason']}"
    label = f"LPIPS ({status['net']})" if name == "lpips" else name.upper()
    unit = " dB" if name == "psnr" else ""
    digits = 2 if name == "psnr" else 4
    spread = ""
    if score.get("std") is not None:
        spread = f" ± {score['std']:.{digits}f}{unit} over {score['count']} images"
    return f"{label} {score['mean']:.{digits}f}{'' if spread else unit}{spread}"


def image_lines(scores: Mapping[str, float | None], status: dict) -> list[str]:
    """A `score_line` for each score of one image."""
    return [
        score_line(name, None if value is None else {"mean": value}, status) for name, value in scores.items()
    ]


def print_table(runs: list) -> None:
    """The table of results on the terminal."""
    from afterimage.report.read import read_rows
    from afterimage.report.tables import console_table

    console(160).print(console_table(read_rows(runs)))
