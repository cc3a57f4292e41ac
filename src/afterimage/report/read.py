"""Run folders become plain rows. What cannot be read is listed with its error, never guessed."""

from __future__ import annotations

import json
import math
import tomllib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from afterimage.config import RANDOM_WEIGHTS, AfterimageError, read_text, unknown
from afterimage.report.rows import METRICS, Row, Rows, Score, Unfinished, natural
from afterimage.report.variants import fusion_letters, mixed_settings, variants
from afterimage.runs.files import DAMAGE, read_json
from afterimage.runs.run import Run, scored_on

KINDS = ("decoder", "inversion", "reference")


def read_rows(runs: Iterable[Run]) -> Rows:
    """Read every run. Raises `AfterimageError` where none is finished, with what is wrong with each."""
    finished, unfinished = [], []
    for run in runs:
        try:
            state, error = _state(run)
            if state == "done":
                finished.append(_read(run))
                continue
        except DAMAGE as damage:
            state, error = "damaged", f"{type(damage).__name__}: {damage}"
            if isinstance(damage, AfterimageError):
                error = str(damage)
        unfinished.append(Unfinished(run, state, error))
    if not finished:
        raise AfterimageError(_nothing(unfinished))
    decoders = [r for r in finished if r.kind != "reference"]
    decoders = variants(fusion_letters(decoders))
    references = sorted((r for r in finished if r.kind == "reference"), key=_reference_order)
    rows = tuple(sorted(decoders, key=lambda r: r.order))
    return Rows(rows, tuple(references), tuple(unfinished), tuple(_warnings([*rows, *references])))


def _nothing(unfinished: Sequence[Unfinished]) -> str:
    if not unfinished:
        return "there is no run to report"
    lines = [": ".join(filter(None, (u.run.name, u.state, u.error))) for u in unfinished[:20]]
    lines += [f"… {len(unfinished) - 20} more"] if len(unfinished) > 20 else []
    return "\n  ".join(["no finished run to report", *lines])


def _state(run: Run) -> tuple[str, str]:
    if not run.file("status.json").exists():
        return ("done" if run.file("summary.json").exists() else "new"), ""
    status = read_json(run.file("status.json"))
    return str(status.get("state", "new")), str(status.get("error") or "")


def _read(run: Run) -> Row:
    path = run.file("summary.json")
    summary = read_json(path)
    for key in ("kind", "label", "scores"):
        if key not in summary:
            raise AfterimageError(f"{path} has no {key!r}")
    if summary["kind"] not in KINDS:
        raise unknown("kind of row", str(summary["kind"]), KINDS)
    lpips, settings = summary.get("lpips") or {}, _settings(run)
    sources = tuple(map(str, summary.get("sources") or ()))
    if summary["kind"] != "reference" and not sources:
        raise AfterimageError(f"{path} names no sources")
    row = Row(
        run=run,
        kind=summary["kind"],
        label=str(summary["label"]),
        sources=sources,
        features=tuple(summary.get("features") or ()),
        decoder=str(summary.get("decoder") or ""),
        fusion=summary.get("fusion") or settings.get("fusion"),
        weights=tuple(summary.get("weights") or ()),
        parameters=_number(path, summary, "parameters"),
        seed=_number(path, summary, "seed"),
        train_seconds=None
        if (seconds := _number(path, summary, "train_seconds")) is None
        else float(seconds),
        lpips_net=str(lpips.get("net") or "unknown net"),
        lpips_reason=str(lpips.get("reason") or "not measured"),
        scores={metric: _score(path, summary["scores"], metric) for metric in METRICS},
        images=tuple(run.scores),
        data=summary.get("data") or {},
        notes=tuple(map(str, summary.get("notes") or ())),
        settings=settings,
        fusion_weights=tuple(map(float, summary.get("fusion_weights") or ())),
    )
    if row.fusion_weights and len(row.fusion_weights) != len(sources):
        raise AfterimageError(
            f"{path}: fusion_weights must have one value for each of {len(sources)} sources"
        )
    digest = row.data.get("digest")
    if digest is not None and not isinstance(digest, str):
        raise AfterimageError(f"{path}: data.digest must be text, got {digest!r:.80}")
    # Whatever tables and figures compute from the files is computed once here, where damage is caught.
    _ = row.shapes, row.reductions, row.grid, row.locations, row.order, row.weights_label
    _ = [row.values(metric) for metric in METRICS]
    return row


def _settings(run: Run) -> dict[str, Any]:
    path = run.file("config.toml")
    try:
        return tomllib.loads(read_text(path)) if path.exists() else {}
    except (RecursionError, ValueError) as error:
        raise AfterimageError(f"cannot read {path}: {error}") from None


def _number(path: object, summary: Mapping[str, Any], key: str) -> Any:
    value = summary.get(key)
    if value is None or (isinstance(value, int | float) and math.isfinite(value)):
        return value
    raise AfterimageError(f"{path}: {key} must be a number, got {value!r}")


def _score(path: object, scores: Mapping[str, Any], metric: str) -> Score | None:
    entry = scores.get(metric)
    if entry is None:
        if metric == "lpips":
            return None
        raise AfterimageError(f"{path} has no scores.{metric}")
    std = entry.get("std")
    score = Score(float(entry["mean"]), None if std is None else float(std), int(entry["count"]))
    if not math.isfinite(score.mean) or not math.isfinite(score.std or 0):
        raise AfterimageError(f"{path}: scores.{metric} is not finite")
    return score


def _reference_order(row: Row) -> tuple[Any, ...]:
    return row.scores["psnr"].mean, natural(row.label)


def _uninformed(rows: Sequence[Row], tests: Sequence[str]) -> Iterable[str]:
    """Decoders whose images are no nearer than those of one who knows nothing but each image's mean colour.

    `tests` names each row's test images.
    """
    lines = {
        test: row.scores["psnr"].mean
        for test, row in zip(tests, rows, strict=True)
        if row.kind == "reference" and row.settings.get("reference") == "mean"
    }
    low = [
        row
        for test, row in zip(tests, rows, strict=True)
        if row.kind == "decoder"
        and not row.is_random
        and row.scores["psnr"].mean <= lines.get(test, -math.inf)
    ]
    if low:
        told = ", ".join(row.label for row in low[:3]) + (", …" if len(low) > 3 else "")
        yield (
            f"{len(low)} decoder row{'s are' if len(low) > 1 else ' is'} not above the mean colour in PSNR ({told}): "
            "they learned too little from these images to say what the features hold."
        )


def _changed(rows: Sequence[Row]) -> int:
    """How many sets of images the same settings came to, at most; 0 where always to one."""
    digests = defaultdict(set)
    for row in rows:
        digests[json.dumps(row.settings.get("data"), sort_keys=True, default=str)].add(row.data.get("digest"))
    most = max((len(found) for found in digests.values()), default=0)
    return most if most > 1 else 0


def _warnings(rows: Sequence[Row]) -> Iterable[str]:
    tests = scored_on([r.data for r in rows])
    counts = sorted({r.scores["psnr"].count for r in rows})
    if len(set(tests)) > 1:
        yield f"The rows were measured on {len(set(tests))} sets of images: their scores do not compare."
    elif len(counts) > 1:
        yield f"The rows were measured on different numbers of images ({counts[0]} to {counts[-1]})."
    elif changed := _changed(rows):
        yield f"Rows that name the same data had {changed} sets of images: files changed between them."
    yield from _uninformed(rows, tests)
    mixed = mixed_settings(rows)
    if mixed:
        yield f"The rows were not all made with the same settings: {'; '.join(mixed)}."
    for label in dict.fromkeys(w["label"] for r in rows for w in r.weights if w["is_random"]):
        yield f"Rows marked {label.upper()} used {RANDOM_WEIGHTS[label]}: a control, not a pretrained network."
