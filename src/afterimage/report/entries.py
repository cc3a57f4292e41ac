"""What the page's script and templates know of each row, as plain values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from afterimage.report.album import Picture
from afterimage.report.layout import DIGITS, HIGHER_IS_BETTER
from afterimage.report.rows import METRICS, Row, Rows


def describe_rows(rows: Rows, pictures: Sequence[Picture]) -> list[dict[str, Any]]:
    """An entry for each of `rows.all`, in that order. Numbers are None where they are unavailable.

    `series` and `decoder` place a row in a walk over layers; per-picture scores follow `picture_ids(rows)`;
    rows compare picture by picture only where their `testSet` agrees.
    """
    ids = picture_ids(rows)
    seeds = len({row.seed for row in rows.decoders}) > 1
    names = _short_names([row.encoder for row in rows.decoders])
    test_sets = _test_sets(rows.all, pictures)
    return [
        {**_names(row, names, seeds), **_numbers(row, ids), "testSet": test_set, "fusion": _fusion(row)}
        for row, test_set in zip(rows.all, test_sets, strict=True)
    ]


def picture_ids(rows: Rows) -> list[str]:
    """The test pictures of all rows, in the order of their first appearance."""
    return list(dict.fromkeys(picture["id"] for row in rows.all for picture in row.pictures))


def best_scores(rows: Rows) -> dict[str, str]:
    """The best mean of each metric, as it is printed, among decoders on pretrained weights.

    LPIPS has none where several networks measured it: their distances do not compare.
    """
    best = {}
    for metric in METRICS:
        means = [row.scores[metric].mean for row in rows.decoders if row.scores[metric] and not row.is_random]
        if means and not (metric == "lpips" and len(rows.nets) > 1):
            best[metric] = f"{(max if HIGHER_IS_BETTER[metric] else min)(means):.{DIGITS[metric]}f}"
    return best


def main_net(rows: Rows) -> str:
    """The LPIPS network that measured the most rows; empty where LPIPS is unavailable throughout."""
    nets = Counter(row.lpips_net for row in rows.all if row.scores["lpips"])
    return nets.most_common(1)[0][0] if nets else ""


def grouped(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, list[str]]]:
    """Texts with the names of the rows that share them."""
    groups: dict[str, list[str]] = {}
    for text, name in pairs:
        groups.setdefault(text, []).append(name)
    return list(groups.items())


def _names(row: Row, names: dict[str, str], seeds: bool) -> dict[str, Any]:
    if row.kind == "reference":
        series, short = "Reference lines", str(row.settings.get("reference", row.label)).replace("-", " ")
        return {
            "name": row.label, "reference": True, "random": "", "series": series, "encoder": series,
            "layer": row.label, "short": short, "decoder": "", "shape": "",
        }  # fmt: skip
    encoder = names[row.encoder]
    series = f"{encoder} ({row.weights_label} weights)" if row.is_random else encoder
    decoder = row.decoder_label + (f", seed {row.seed}" if seeds else "")
    return {
        "name": f"{series} · {row.layer} · {decoder}", "reference": False, "random": row.control,
        "series": series, "encoder": encoder, "layer": row.layer, "short": row.layer, "decoder": decoder,
        "shape": " + ".join(row.shapes),
    }  # fmt: skip


def _numbers(row: Row, ids: Sequence[str]) -> dict[str, Any]:
    reference = row.kind == "reference"
    values = {metric: row.values(metric) for metric in METRICS}
    return {
        "parameters": None if reference else row.parameters,
        "seconds": None if reference else row.train_seconds,
        "locations": None if reference else row.locations,
        "net": row.lpips_net,
        "scores": {metric: _score(row, metric) for metric in METRICS},
        "perPicture": {
            m: [None if (v := values[m].get(id)) is None else round(v, 4) for id in ids] for m in METRICS
        },
    }


def _fusion(row: Row) -> list[dict[str, Any]]:
    """Each source's mean weight; empty where the row has no fusion that weighs its sources."""
    pairs = zip(row.sources, row.fusion_weights, strict=True) if row.fusion_weights else ()
    return [{"source": source, "weight": weight} for source, weight in pairs]


def _score(row: Row, metric: str) -> dict[str, Any] | None:
    score = row.scores[metric]
    if score is None:
        return None
    return {"mean": score.mean, "std": score.std, "count": score.count, "margin": score.margin}


def _test_sets(rows: Sequence[Row], pictures: Sequence[Picture]) -> list[str]:
    # The first picture a row saved tells its test set, also where not every row has a digest of its own.
    first: dict[int, str] = {}
    for number, picture in enumerate(pictures):
        for position in picture.reconstructions:
            first.setdefault(position, f"picture {number}")
    return [first.get(i, str(row.data.get("digest") or row.run.name)) for i, row in enumerate(rows)]


def _short_names(encoders: Sequence[str]) -> dict[str, str]:
    """Encoders without their weights' tag, where that stays unambiguous."""
    distinct = list(dict.fromkeys(encoders))
    bare = Counter(name.partition(".")[0] for name in distinct)
    return {name: short if bare[short := name.partition(".")[0]] == 1 else name for name in distinct}
