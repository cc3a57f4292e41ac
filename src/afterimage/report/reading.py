"""Reader of a report's rows, which names what sets rows apart and warns of what does not compare.

A run folder that cannot be read is listed with its error; any other exception is a bug and is not caught.
"""

from __future__ import annotations

import dataclasses
import json
import math
import string
from collections.abc import Iterable, Sequence
from itertools import product
from typing import Any

from afterimage.config import PROTOCOLS, RANDOM_WEIGHTS, AfterimageError, join_names
from afterimage.report.rows import Row, Rows, Unfinished, group_by, natural_sort_key
from afterimage.runs.run import Run


def read_rows(runs: Iterable[Run]) -> Rows:
    """Read every run once. Raises `AfterimageError`, with the state of each run, where none is finished."""
    finished: list[Row] = []
    unfinished = []
    for run in runs:
        try:
            state = run.state
            if state == "done" or (state == "new" and run.has_result):
                finished.append(Row.from_run(run))
                continue
            error = str(run.status.get("error") or "")
        except AfterimageError as damage:
            state, error = "damaged", str(damage)
        unfinished.append(Unfinished(run, state, error))
    if not finished:
        told = join_names(list(map(str, unfinished)), 20, "\n  ")
        raise AfterimageError(f"no finished run to report\n  {told}" if told else "there is no run to report")
    left_out: list[str] = []
    started = list(_with_starts([row for row in finished if not row.is_baseline], left_out))
    decoded = _with_variants(_with_letters(started))
    kinds = group_by(sorted(decoded, key=lambda row: row.order), lambda row: row.kind == "inversion")
    decoders, inversions = (tuple(kinds.get(is_inversion, ())) for is_inversion in (False, True))
    baselines = [row for row in finished if row.is_baseline]
    baselines.sort(key=lambda row: (row.scores["psnr"].mean, natural_sort_key(row.label)))
    shown = decoders if decoders or baselines else inversions
    warnings = (*_warnings([*shown, *baselines]), *left_out)
    return Rows(shown, tuple(baselines), tuple(unfinished), warnings, inversions)


def _with_starts(rows: Sequence[Row], left_out: list[str]) -> Iterable[Row]:
    """Yield rows, inversions with the settings of their start; those from another decoder are named in `left_out`."""
    runs = group_by((row for row in rows if row.training), lambda row: row.run.name)
    for row in rows:
        named = runs.get(row.inversion.start, []) if row.inversion else []
        own = [run for run in named if run.training.decoder_sha256 == row.inversion.start_sha256]
        if own or not named:
            yield dataclasses.replace(row, start=own[0].config) if own else row
            continue
        digests = row.inversion.start_sha256, named[0].training.decoder_sha256
        then, now = (digest[:12] or "unknown" for digest in digests)
        left_out.append(
            f"{row.run.name} is left out: it started from another decoder than the one that {named[0].run.name} has "
            f"now (SHA-256 {then} then, {now} now)."
        )


def _with_letters(rows: Sequence[Row]) -> list[Row]:
    """Assign letters A, B, … to the distinct fusions, so that figures need not spell out their sources."""
    distinct = sorted({(row.sources, row.fusion_text) for row in rows if row.is_fused})
    alphabet = ["", *string.ascii_uppercase]
    letters = dict(zip(distinct, map("".join, product(alphabet, string.ascii_uppercase)), strict=False))
    named = ((row, letters.get((row.sources, row.fusion_text), "")) for row in rows)
    return [dataclasses.replace(row, fusion_letter=letter) for row, letter in named]


def _with_variants(rows: Sequence[Row]) -> list[Row]:
    """Name the settings in which rows of one encoder, weights and decoder differ, such as `parameters=4M`."""

    def alike(row: Row) -> tuple[str, ...]:
        return (
            row.encoder,
            row.fusion_letter,
            row.weights_label,
            row.decoder,
            getattr(row.config, "result_kind", ""),
        )

    named = []
    for members in group_by(rows, alike).values():
        keys = sorted({key for row in members for key in row.distinguishing})
        differing = [k for k in keys if len({str(row.distinguishing.get(k)) for row in members}) > 1]
        # Refinements start from a decoder of their layer; `start` is named only where a layer has several.
        starts = {(row.sources, row.distinguishing.get("start")) for row in members}
        if len(starts) == len({sources for sources, _ in starts}):
            differing = [k for k in differing if k != "start"]
        for row in members:
            found = {key: row.distinguishing[key] for key in differing if key in row.distinguishing}
            parts = (
                f"{key.rpartition('.')[2]}={_short(value if key != 'start' else value[-8:])}"
                for key, value in found.items()
            )
            named.append(dataclasses.replace(row, variant=", ".join(parts)))
    return named


def _warnings(rows: Sequence[Row]) -> Iterable[str]:
    tests = {row.data.test_digest for row in rows}
    counts = sorted({row.scores["psnr"].count for row in rows})
    named = group_by(rows, lambda row: json.dumps(row.settings.get("data"), sort_keys=True, default=str))
    changed = max(len({row.data.digest for row in alike}) for alike in named.values())
    if len(tests) > 1:
        yield f"The rows were measured on {len(tests)} sets of images: their scores do not compare."
    elif len(counts) > 1:
        yield f"The rows were measured on different numbers of images ({counts[0]} to {counts[-1]})."
    elif changed > 1:
        yield f"Rows that name the same data had {changed} sets of images: files changed between them."
    for name in sorted({row.protocol for row in rows} & PROTOCOLS.keys()):
        protocol = PROTOCOLS[name]
        yield (
            f"Figures by the protocol {name}, beside no others: images resized to {protocol.resize} pixels, centre "
            f"crop of {protocol.crop}, layers {' or '.join(protocol.layers)}."
        )
        yield from (
            f"{metric} ({name}) is not measured: {why}."
            for metric, why in protocol.unavailable_metrics.items()
        )
    yield from _uninformed(rows)
    if mixed := _mixed_settings(rows):
        yield f"The rows were not all made with the same settings: {'; '.join(mixed)}."
    for label in dict.fromkeys(w.label for row in rows for w in row.weights if w.is_random):
        yield f"Rows marked {label.upper()} used {RANDOM_WEIGHTS[label]}: a control, not a pretrained network."


def _uninformed(rows: Sequence[Row]) -> Iterable[str]:
    """Yield a warning of decoders whose mean PSNR does not exceed that of the mean-colour baseline."""
    means = [row for row in rows if row.settings.get("baseline") == "mean"]
    floors = {row.data.test_digest: row.scores["psnr"].mean for row in means}
    decoders = [row for row in rows if row.kind == "decoder" and not row.is_random]
    low = [r.label for r in decoders if r.scores["psnr"].mean <= floors.get(r.data.test_digest, -math.inf)]
    if low:
        yield (
            f"{len(low)} decoder row{'s are' if len(low) > 1 else ' is'} not above the mean colour in PSNR "
            f"({join_names(low, 3)}): they learned too little from these images to say what the features hold."
        )


def _mixed_settings(rows: Sequence[Row]) -> list[str]:
    """Return settings of data and recipe in which decoders differ: `recipe.epochs (10, 30)`."""
    every = [row.distinguishing for row in rows if row.kind == "decoder"]
    keys = sorted({key for settings in every for key in settings if key.startswith(("data.", "recipe."))})
    found = ((key, sorted({_short(settings.get(key, "unset")) for settings in every})) for key in keys)
    return [f"{key} ({', '.join(values)})" for key, values in found if len(values) > 1]


def _short(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 10_000:
        return f"{value / 1e6:g}M" if value >= 1_000_000 else f"{value / 1e3:g}K"
    return value if isinstance(value, str) else json.dumps(value, default=str)
