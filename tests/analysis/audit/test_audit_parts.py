"""The audit's parts: identification, what a defence costs, the verdict, its figure."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from afterimage.analysis.audit.attackers import attacker_data
from afterimage.analysis.audit.defences.chain import create_defence
from afterimage.analysis.audit.task_utility import CostUnavailable, measure_cost, whole_network
from afterimage.config import DataConfig
from afterimage.config.audit import LimitsConfig
from afterimage.data.dataset import load_data
from afterimage.data.images import ImageSet
from afterimage.evaluation.intervals import interval_dict, share_interval
from afterimage.evaluation.metrics import Metrics
from afterimage.evaluation.reidentification import Gallery, downscale
from afterimage.models.encoders.encoder import Encoder
from afterimage.models.lpips import LPIPS
from afterimage.report.audit import verdict as verdicts
from afterimage.report.audit.page import privacy_utility
from afterimage.report.audit.verdict import INCONCLUSIVE, LEAKS, WITHIN
from afterimage.runs.audit import COMPARISON_SIDE, Attack, AuditResults
from afterimage.runs.results import Attacker, Interval, WorstCase


def sample_images(count, seed=0, size=24):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def test_no_attacker_trains_on_a_smaller_ones_validation_images(tmp_path):
    data = load_data(DataConfig("procedural:80", resize=24, crop=24), cache=tmp_path)
    owned = {count: attacker_data(data, data, count, 0) for count in range(5, 61)}
    for small, large in itertools.combinations(owned, 2):
        assert not {*owned[small].validation.ids} & {*owned[large].train.ids}
        assert {*owned[small].validation.ids} <= {*owned[large].validation.ids}


def test_copies_find_themselves_and_noise_does_not():
    originals = sample_images(40)
    gallery = Gallery(originals)
    assert all(found.all() for found in gallery.identify(originals).values())
    faded = 0.3 * originals + 0.5
    assert gallery.identify(faded)["correlation"].all()
    for found in gallery.identify(sample_images(40, seed=1)).values():
        assert found.mean() < 0.2


@pytest.mark.parametrize("guess", [0.5, 0.0, 1.0])
def test_the_same_answer_for_every_image_finds_one_at_most(guess):
    for found in Gallery(sample_images(60)).identify(torch.full((60, 3, 24, 24), guess)).values():
        assert found.sum() <= 1
    almost = torch.full((60, 3, 24, 24), guess) + 1e-7 * sample_images(60)
    assert Gallery(sample_images(60)).identify(almost)["correlation"].sum() <= 1, "rounding has no direction"


def test_distances_are_those_of_every_pair():
    originals, others = sample_images(5), sample_images(4, seed=1)
    found = Gallery(originals).distances(others)["pixels"]
    expected = (others[:, None] - originals).square().sum((2, 3, 4))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    correlation = np.corrcoef(originals[0].flatten().numpy(), others[1].flatten().numpy())[0, 1]
    measured = Gallery(originals).distances(others)["correlation"][1, 0]
    assert float(measured) == pytest.approx(2 - 2 * correlation, abs=1e-4)


def test_perceptual_distances_are_lpips(weights_folder, monkeypatch):
    monkeypatch.setenv("AFTERIMAGE_WEIGHTS", str(weights_folder))
    originals, others = sample_images(3, size=64), sample_images(3, seed=1, size=64)
    lpips = LPIPS("squeeze")
    found = Gallery(originals, lpips).distances(others)["lpips"]
    for i in range(3):
        expected = lpips(others[i : i + 1].expand(3, -1, -1, -1), originals)
        torch.testing.assert_close(found[i], expected, rtol=1e-3, atol=1e-4)


def test_large_images_are_reduced_and_small_ones_are_not():
    assert downscale(sample_images(1, size=300)).shape[-2:] == (COMPARISON_SIDE, COMPARISON_SIDE)
    small = sample_images(1, size=40)
    assert downscale(small) is small
    wide = torch.rand(1, 3, 224, 448)
    assert downscale(wide).shape[-2:] == (COMPARISON_SIDE, 2 * COMPARISON_SIDE)


@pytest.mark.parametrize(
    ("hits", "total", "low", "high"),
    [(0, 100, 0.0, 0.0362), (1, 100, 0.00025, 0.0545), (5, 10, 0.1871, 0.8129)],
)
def test_intervals_of_shares_are_clopper_and_pearsons(hits, total, low, high):
    found = share_interval(np.arange(total) < hits)
    assert (found.estimate, found.count) == (hits / total, total)
    assert found.low == pytest.approx(low, abs=1e-4) and found.high == pytest.approx(high, abs=1e-4)


class Split(ImageSet):
    """Images that are given."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def crops(self, indices, device="cpu"):
        return self.images[list(indices)].to(device)


TIMM = [
    ("test_resnet.r160_in1k", "layer2"),
    ("test_vit.r160_in1k", "block0"),
    ("test_efficientnet.r160_in1k", "blocks.2"),
]


@pytest.mark.parametrize(("model", "layer"), TIMM)
def test_a_timm_network_goes_on_from_defended_features(model, layer):
    encoder = Encoder(model, layers=[layer], weights="random", image_size=96)
    network = whole_network(encoder)
    images = sample_images(6, size=96)
    seen = []
    plain = network(images, lambda maps: seen.append(maps) or maps)
    torch.testing.assert_close(seen[0], encoder(images)[0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(network(images), plain)
    assert network.kind == "classes" and plain.shape == (6, 1000)
    assert not network.has_bypass(images)
    defences = [
        create_defence(text, *encoder.specs).fit(*encoder(images)) for text in ("none", "int8", "noise:20")
    ]
    none, int8, noise = measure_cost(network, defences, Split(images), batch_size=4)
    assert none["score"]["estimate"] == 1 and none["cosine"]["estimate"] == pytest.approx(1, abs=1e-5)
    assert int8["cosine"]["estimate"] > 0.99 > noise["cosine"]["estimate"]
    spec, prefix = encoder.specs[0], 1 if "vit" in model else 0
    assert none["bytes"] == 4 * (spec.values + prefix * spec.channels)
    assert int8["bytes"] == spec.values + 4 * prefix * spec.channels
    assert any("prefix token" in note for note in none["notes"]) == bool(prefix)


def test_a_network_whose_end_is_missing_has_no_utility(weights_folder):
    encoder = Encoder("resnet18.tv_in1k:layer1", weights=weights_folder, image_size=64)
    with pytest.raises(CostUnavailable, match=r"lacks .*layer4"):
        whole_network(encoder)


def test_a_network_without_its_classifier_is_judged_by_its_embedding(weights_folder):
    encoder = Encoder("mobilenetv2_100:blocks.1", weights=weights_folder, image_size=64)
    network = whole_network(encoder)
    assert network.kind == "embedding" and network(sample_images(2, size=64)).shape == (2, 1280)


def interval(estimate, half=0.02, count=100):
    return Interval(estimate, max(0.0, estimate - half), min(1.0, estimate + half), count)


def row(layer, defence, ssim, found, decoder="linear", images=640):
    shares = {"pixels": interval(found), "correlation": interval(found / 2)}
    return Attack(
        layer, defence, Attacker(decoder, images, "black-box", "", "decoded"), {"ssim": interval(ssim)},
        WorstCase("image", ssim), shares, 100, 0.01, 1.0,
    )  # fmt: skip


def cost(utility, size=1000):
    kind = None if utility is None else "classes"
    return {
        "kind": kind,
        "score": None if utility is None else interval_dict(interval(utility)),
        "bytes": size,
        "notes": [],
    }


ROWS = [
    row("a", "none", 0.8, 0.9), row("a", "none", 0.5, 0.95, "residual"),
    row("a", "noise:1", 0.3, 0.04), row("b", "int8", 0.2, 0.02), row("b", "1bit", 0.2, 0.02),
]  # fmt: skip
COSTS = {
    ("a", "none"): cost(1.0),
    ("a", "noise:1"): cost(0.9),
    ("b", "int8"): cost(0.95),
    ("b", "1bit"): cost(0.5),
}


def judge(rows, blind, costs, limits, failures=()):
    return verdicts.judge(AuditResults({}, rows, blind, costs, failures=list(failures)), limits)


def test_the_strongest_attacker_counts():
    option = judge(ROWS, [], COSTS, LimitsConfig(0.35, 0.05)).options[0]
    assert option.ssim.estimate == 0.8 and option.ssim.attacker.startswith("linear")
    assert option.identification.estimate == 0.95 and option.identification.attacker.startswith("residual")
    assert option.identification.by == "pixels"


def test_the_upper_end_decides():
    verdict = judge(ROWS, [], COSTS, LimitsConfig(0.35, 0.05))
    assert [o.status for o in verdict.options] == [LEAKS, INCONCLUSIVE, WITHIN, WITHIN]
    assert verdict.passed is False and "identification 4% (up to 6.0%)" in verdict.options[1].reasons[0]
    assert verdict.recommended.defence == "int8" and "within the limits" in verdict.reason
    assert (
        judge(ROWS[3:], [], {k: COSTS[k] for k in [("b", "int8")]}, LimitsConfig(0.35, 0.05)).passed is True
    )


def test_an_attacker_with_few_images_hides_no_leak_that_another_shows():
    """Refined attackers have few test images: their wide interval reaches further and shows less."""
    shown = row("a", "none", 0.44, 0.65)
    refined = row("a", "none", 0.44, 0.6, "linear + refined")
    few = {"scores": {"ssim": interval(0.44, 0.08, 20)}, "identification": {"pixels": interval(0.6, 0.2, 20)}}
    refined = replace(refined, **few)
    for rows in ([shown], [shown, refined], [refined, shown]):
        (option,) = judge(rows, [], {("a", "none"): cost(1.0)}, LimitsConfig(0.4, 0.5)).options
        assert option.status == LEAKS
        assert option.ssim.count == option.identification.count == 100
        assert "SSIM 0.440 (at least 0.420) against a limit of 0.4, linear" in option.reasons[0]
        assert "identification 65% (at least 63.0%) against a limit of 0.5, linear" in option.reasons[1]
    (option,) = judge([shown, refined], [], {("a", "none"): cost(1.0)}, LimitsConfig(0.45, 0.7)).options
    assert option.status == INCONCLUSIVE and option.ssim.count == option.identification.count == 20


def test_without_limits_there_is_no_pass():
    verdict = judge(ROWS, [], COSTS, LimitsConfig())
    assert (
        verdict.passed is None
        and verdict.recommended.defence == "int8"
        and "no limits were set" in verdict.reason
    )
    nothing = judge(ROWS, [], {key: cost(None) for key in COSTS}, LimitsConfig())
    assert nothing.recommended is None and "unknown" in nothing.reason


def test_nothing_safe_is_said_with_what_leaks_least():
    verdict = judge(ROWS, [], COSTS, LimitsConfig(max_ssim=0.1))
    assert verdict.recommended is None and "b with int8 leaks least" in verdict.reason


def test_unknown_utility_is_said():
    costs = {**COSTS, ("b", "int8"): cost(None, 100), ("b", "1bit"): cost(None, 10)}
    verdict = judge(ROWS, [], costs, LimitsConfig(0.35, 0.05))
    assert verdict.recommended.defence == "1bit" and "not known" in verdict.reason


def test_an_audit_with_failures_never_passes():
    verdict = judge(
        ROWS[3:4], [], {("b", "int8"): cost(1.0)}, LimitsConfig(0.35, 0.05), ["b: no finite solution"]
    )
    assert verdict.passed is False and "could not be measured: b" in verdict.remarks[0]
    assert judge([], [], {}, LimitsConfig(0.35)).passed is False


def test_limits_that_cannot_be_met_are_remarked_on():
    blind = row("", "", 0.4, 0.01, "no features")
    remarks = judge(ROWS, [blind], COSTS, LimitsConfig(0.35, 0.03)).remarks
    assert "below what is reached without any features" in remarks[0]
    assert "100 test images are too few" in remarks[1] and "0.036" in remarks[1]
    assert judge(ROWS, [row("", "", 0.1, 0.01)], COSTS, LimitsConfig(0.35, 0.05)).remarks == ()


def test_undefended_features_that_tell_nothing_are_doubted():
    """Such as those of a store whose images are in another order."""
    blind = row("", "", 0.3, 0.01, "no features")
    scrambled, sound = row("a", "none", 0.25, 0.01), row("b", "none", 0.25, 0.2)
    remarks = judge([scrambled, sound], [blind], {}, LimitsConfig()).remarks
    assert len(remarks) == 1 and remarks[0].startswith(
        "a, undefended: linear, 640 images, black-box, decoded got no"
    )


def test_what_an_attacker_can_compute_from_the_features_counts():
    """Undefended features hold `pca:8` of them, and `pca:8` holds `pca:8+int8`, but not the other way round."""
    rows = [row("a", "none", 0.2, 0.1), row("a", "pca:8", 0.4, 0.05), row("a", "pca:8+int8", 0.3, 0.3)]
    rows += [row("a", "pca:80", 0.1, 0.1), row("b", "none", 0.9, 0.9)]
    verdict = judge(rows, [], {(one.layer, one.defence): cost(1.0) for one in rows}, LimitsConfig(0.35, 0.5))
    found = {(o.layer, o.defence): o for o in verdict.options}
    assert found["a", "none"].ssim.estimate == 0.4 and found["a", "none"].identification.estimate == 0.3
    assert found["a", "none"].ssim.attacker.endswith(", after pca:8")
    assert found["a", "pca:8"].ssim.estimate == 0.4 and found["a", "pca:8"].identification.estimate == 0.3
    assert found["a", "pca:8"].ssim.attacker.endswith("decoded")
    assert found["a", "pca:8+int8"].ssim.estimate == 0.3 and found["a", "pca:80"].ssim.estimate == 0.1


def test_a_defence_that_nobody_attacked_is_not_passed():
    rows = [row("a", "int8", 0.1, 0.01)]
    costs = {("a", "int8"): cost(1.0), ("a", "shuffle"): cost(1.0)}
    verdict = judge(rows, [], costs, LimitsConfig(0.35, 0.5))
    assert verdict.passed is False and "could not be measured: a, shuffle" in verdict.remarks
    assert judge(rows, [], {("a", "int8"): cost(1.0)}, LimitsConfig(0.35, 0.5)).passed is True


def test_shuffled_features_are_not_recommended():
    rows = [row("a", "shuffle+int8", 0.1, 0.01), row("a", "none", 0.2, 0.02)]
    costs = {("a", "shuffle+int8"): cost(1.0), ("a", "none"): cost(0.9)}
    verdict = judge(rows, [], costs, LimitsConfig(0.35, 0.05))
    assert verdict.passed is True and verdict.recommended.defence == "none" and "jigsaw" in verdict.remarks[0]


@pytest.mark.parametrize("utility", [0.7, None])
def test_the_curve_shows_every_option(utility):
    costs = {key: cost(utility, 100 * (i + 1)) for i, key in enumerate(COSTS)}
    drawing = privacy_utility(
        judge(ROWS, [], costs, LimitsConfig(0.35, 0.05)).options, LimitsConfig(0.35, 0.05), "model"
    )
    for axes in drawing.figure.axes:
        assert len(axes.containers) == 4
        assert axes.get_xscale() == ("log" if utility is None else "linear")
        labels = [label.get_text() for label in (*axes.get_xticklabels(), *axes.get_xticklabels(minor=True))]
        assert not any("$" in label for label in labels)
    assert "the dashed line the limit" in drawing.caption
    assert privacy_utility([], LimitsConfig(), "model") is None


def test_no_metrics_means_no_perceptual_identification(monkeypatch, tmp_path):
    monkeypatch.setenv("AFTERIMAGE_WEIGHTS", str(tmp_path))
    metrics = Metrics("squeeze", size=8)
    assert set(Gallery(sample_images(3), metrics.lpips).identify(sample_images(3))) == {
        "pixels",
        "correlation",
    }
