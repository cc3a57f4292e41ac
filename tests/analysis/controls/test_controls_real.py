"""Controls on real weights and photographs come out where theory puts them."""

import itertools
from dataclasses import replace

import pytest

from afterimage.analysis.controls.run import run_controls
from afterimage.config import DataConfig, DecoderConfig, RunConfig
from afterimage.experiments.queue import train_runs
from afterimage.experiments.study import with_matched_controls
from afterimage.report.controls import control_findings
from afterimage.report.reading import read_rows
from afterimage.runs.controls import read_part

pytestmark = pytest.mark.long
SHALLOW = "resnet18.tv_in1k:layer1"
DEEP = "vit_tiny_patch16_224.augreg_in21k_ft_in1k:block11"


@pytest.fixture(scope="module")
def runs(weights_folder, photos_folder, tmp_path_factory):
    """A shallow layer with its random twin, and a deep one, fitted in closed form on a few photographs."""
    root = tmp_path_factory.mktemp("real")
    data = DataConfig(f"folder:{photos_folder}", limit_train=100, limit_validation=10, limit_test=10)
    decoder = DecoderConfig("linear", options={"rows_per_input": 100})
    base = RunConfig((SHALLOW,), str(weights_folder), decoder=decoder, data=data, lpips="squeeze")
    deep = replace(base, sources=(DEEP,), decoder=DecoderConfig("linear", options={"kernel": 1}))
    found = train_runs([*with_matched_controls([base]), deep], root, cache=root / "cache", accelerator="cpu")
    assert run_controls(found, cache=root / "cache", accelerator="cpu") == []
    return dict(zip(("trained", "random", "deep"), found, strict=True))


def controls(run):
    facts, _ = read_part(run, "controls")
    return {name: scores["psnr"].mean for name, scores in facts.controls.items()}, facts.distances


def test_what_is_not_the_images_is_no_better_than_its_mean_colour(runs):
    for run in runs.values():
        psnr, _ = controls(run)
        for name in ("another", "shuffled", "mean", "zero"):
            assert psnr[name] < psnr["colour"] + 0.5, f"{run.name}: {name}"
        assert psnr["own"] > psnr["another"] + 2
    # At the deep layer a decoder fitted on so few images need not make one that the layer takes for the original.
    for run in (runs["trained"], runs["random"]):
        _, distances = controls(run)
        assert distances.reencoded < distances.random_pair


def test_a_shallow_layer_hardly_needs_training_to_keep_the_image(runs):
    (trained, _), (random, _), (deep, _) = (controls(runs[key]) for key in ("trained", "random", "deep"))
    assert abs(trained["own"] - random["own"]) < 4
    assert min(trained["own"], random["own"]) > deep["own"] + 2
    findings = control_findings(read_rows(runs.values()).decoders)
    (against,) = [t for f in findings for t in f.tables if "random weights" in t.title]
    assert [row[0] for row in against.rows] == [SHALLOW]


def test_rate_curves_are_monotone_within_their_intervals(runs):
    for run in runs.values():
        facts, images = read_part(run, "rate_distortion")
        rows = {(p["bits"], p["id"]): p["psnr"] for p in images}
        ids = {p["id"] for p in images}
        sizes = [point.bits_per_pixel for point in facts.points]
        assert sizes == sorted(sizes, reverse=True)
        for more, fewer in itertools.pairwise([point.bits for point in facts.points]):
            drops = [rows[more, i] - rows[fewer, i] for i in ids]
            mean = sum(drops) / len(drops)
            deviation = (sum((d - mean) ** 2 for d in drops) / (len(drops) - 1) / len(drops)) ** 0.5
            assert mean > -2 * deviation - 0.01, f"{run.name}: {fewer} bits beat {more}"


def test_fine_detail_goes_before_coarse(runs):
    facts, _ = read_part(runs["trained"], "error_breakdown")
    for power in facts.spectra.values():
        shares = [e / p for e, p in zip(power.error, power.image, strict=True) if p]
        assert sum(shares[:4]) / 4 < 0.5 < sum(shares[-8:]) / 8
    assert facts.planes["luma"].error > facts.planes["cb"].error
