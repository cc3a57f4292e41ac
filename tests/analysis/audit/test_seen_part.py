"""Pixels that no location sees: an audit says so, and does not pass for them."""

import json
from dataclasses import replace

import pytest
import torch

from afterimage.analysis.audit.run import run_audit
from afterimage.cli.audit import print_verdict
from afterimage.config import Axis, DataConfig, FeatureSpec, RecipeConfig
from afterimage.config.audit import AuditConfig, LimitsConfig
from afterimage.data.images import ImageSet
from afterimage.evaluation.evaluate import (
    VISIBLE_SUFFIX,
    Evaluation,
    crop_to_box,
    evaluate_batches,
    reconstruct_batches,
    summarise,
    visibility_notes,
)
from afterimage.evaluation.metrics import Metrics, psnr, ssim
from afterimage.models.decoders.canvas import visible_box
from afterimage.report.audit import verdict as verdicts
from afterimage.report.audit.page import write_audit
from afterimage.report.audit.verdict import LEAKS, SSIM_SEEN
from afterimage.runs.files import read_csv
from afterimage.runs.results import VisibleRegion
from simulated_runs import feature_map
from test_audit import Decoded
from test_audit_parts import cost, interval, judge, row

DROPPED = "the last 8 rows and columns of 40x40 images are not seen"


@pytest.fixture(scope="module")
def audits(tmp_path_factory):
    """A patch of 16 from the corner on: two a side in crops of 32 pixels, and the same two in crops of 40."""
    root = tmp_path_factory.mktemp("audits")
    found = {}
    for crop in (32, 40):
        config = AuditConfig(
            model="vit_tiny_patch16_224",
            layers=("block0",),
            weights="random",
            defences=("none",),
            attackers=Decoded(),
            data=DataConfig(source="procedural:150", resize=44, crop=crop, test_fraction=0.3),
            recipe=RecipeConfig(batch_size=16),
        )
        found[crop] = run_audit(config, root / str(crop), cache=root / "cache", accelerator="cpu")
    return root, found


def judged(results, limits):
    return verdicts.judge(results, limits)


def test_a_crop_does_not_pass_for_the_pixels_that_are_dropped(audits):
    _, found = audits
    (even,), (row,) = found[32].rows, found[40].rows
    assert even.seen is None and row.seen.rows == row.seen.columns == (0, 32)
    assert row.seen.unseen == DROPPED and row.seen.share == pytest.approx(0.64)
    whole, part = row.scores["ssim"], row.scores_seen["ssim"]
    # What the pixels beside them hide of the leak is in the whole, and not in what is seen.
    assert whole.high < part.low
    assert part.estimate == pytest.approx(even.scores["ssim"].estimate, abs=0.04)
    limit = (whole.high + part.low) / 2
    for crop in (32, 40):
        verdict = judged(found[crop], LimitsConfig(max_ssim=limit))
        assert verdict.passed is False and verdict.options[0].status == LEAKS
    assert verdict.options[0].ssim.by == SSIM_SEEN
    assert f"{SSIM_SEEN} {part.estimate:.3f}" in verdict.options[0].reasons[0]
    assert any(DROPPED in remark and "36.0% of their pixels" in remark for remark in verdict.remarks)
    assert {f"{name}{end}" for name in ("pixels", "correlation") for end in ("", VISIBLE_SUFFIX)} <= set(
        row.identification
    )


def test_everything_written_says_what_is_not_seen(audits, capsys):
    root, found = audits
    limits = LimitsConfig(max_ssim=0.99)
    verdict = judged(found[40], limits)
    write_audit(found[40], verdict, limits, root / "40")
    values = json.loads((root / "40" / "audit.json").read_text())
    assert values["subject"]["seen"]["block0"]["unseen"] == DROPPED
    assert values["rows"][0]["scores_seen"]["psnr"]["count"] == 45
    assert any(DROPPED in remark for remark in values["verdict"]["remarks"])
    page = (root / "40" / "index.html").read_text()
    assert DROPPED in page and f"seen part {values['rows'][0]['scores_seen']['ssim']['estimate']:.3f}" in page
    print_verdict(found[40], verdict)
    out = capsys.readouterr().out
    assert DROPPED in out and "seen part" in out
    rows = read_csv(root / "40" / values["rows"][0]["folder"] / "scores.csv")
    assert {"ssim_seen", "found_by_pixels_seen"} <= set(rows[0])


def test_the_part_that_leaks_more_decides():
    seen = VisibleRegion((0, 32), (0, 32), 0.64, DROPPED)
    blurred = replace(row("a", "none", 0.3, 0.02), seen=seen, scores_seen={"ssim": interval(0.8)})
    verdict = judge([blurred], [], {("a", "none"): cost(1.0)}, LimitsConfig(max_ssim=0.5))
    assert verdict.passed is False and verdict.options[0].ssim.by == SSIM_SEEN
    spread = replace(blurred, scores_seen={"ssim": interval(0.1)})
    (option,) = judge([spread], [], {("a", "none"): cost(1.0)}, LimitsConfig(max_ssim=0.5)).options
    assert option.ssim.by == "SSIM" and option.ssim.estimate == 0.3
    tiny = replace(blurred, scores_seen={"ssim": None})
    assert judge([tiny], [], {("a", "none"): cost(1.0)}, LimitsConfig(max_ssim=0.5)).passed is True


def axis(first, last):
    return Axis(0.0, 8.0, first, last)


def test_what_several_maps_see_together():
    specs = [
        FeatureSpec("a:x", 1, 4, 4, axis(0, 32), axis(4, 40)),
        FeatureSpec("b:x", 1, 4, 4, axis(8, 36), None),
    ]
    assert visible_box(specs[:1], (40, 40)) == ((0, 32), (4, 40))
    assert visible_box(specs, (40, 40)) == ((0, 36), (0, 40))
    assert visible_box([*specs, FeatureSpec("c:x", 1, 4, 4)], (40, 40)) is None


@pytest.mark.parametrize("box", [((0, 32), (4, 40)), ((0, 8), (0, 40))])
def test_scores_of_what_is_seen_are_those_of_that_part(box):
    class Given(ImageSet):
        ids, content, crop = [f"{i}" for i in range(5)], [f"{i}" for i in range(5)], 40

        def __init__(self):
            self.images = torch.rand(5, 3, 40, 40)

        def __len__(self):
            return 5

        def crops(self, indices, **_):
            return self.images[torch.as_tensor(indices)]

    given, noise = Given(), torch.rand(5, 3, 40, 40) * 0.2

    def reconstruct(images):
        return [(images * 0.8 + noise[: len(images)]), images]

    metrics = Metrics(size=8)
    batches = reconstruct_batches(reconstruct, given, batch_size=5)
    results = evaluate_batches(batches, given.ids, metrics, seen=[box, None])
    assert all(isinstance(result, Evaluation) for result in results)
    assert set(results[1].rows[0]) == {"id", "psnr", "ssim", "lpips"}
    outputs = reconstruct(given.images)[0]
    expected = psnr(crop_to_box(outputs, box), crop_to_box(given.images, box))
    assert [r["psnr_seen"] for r in results[0].rows] == pytest.approx(expected.tolist())
    if box[0][1] < 11:
        assert results[0].rows[0]["ssim_seen"] is None
    else:
        alike = ssim(crop_to_box(outputs, box), crop_to_box(given.images, box))
        assert [r["ssim_seen"] for r in results[0].rows] == pytest.approx(alike.tolist())
    unseen = (("a", "the last 8 rows are not seen"), ("b", ""))
    entries = [replace(feature_map(f"{name}:x", 1, 4), unseen=text) for name, text in unseen]
    notes = visibility_notes(entries, box, (40, 40), results[0].rows)
    mean = summarise(results[0].rows, VISIBLE_SUFFIX)["psnr"].mean
    assert notes[0] == "a:x: the last 8 rows are not seen" and f"{mean:.2f} dB" in notes[1]
    assert visibility_notes(entries[1:], None, (40, 40)) == []
