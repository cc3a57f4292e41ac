"""Features that are not the image's own, distances, and what runs of controls write."""

import itertools
import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from afterimage.analysis.controls.feature_ablations import distance, fill_channels, sample_features, shuffle
from afterimage.analysis.controls.run import CONTROL_TYPES, _AblationMeasure, run_controls
from afterimage.config import AfterimageError, DataConfig, DecoderConfig, RecipeConfig, RunConfig
from afterimage.config.study import StudyConfig
from afterimage.data.dataset import load_data
from afterimage.evaluation.metrics import Metrics
from afterimage.experiments.queue import train_runs
from afterimage.experiments.study import run_study, with_matched_controls
from afterimage.models.reconstructor import FeatureDecoder, MultiEncoder, Reconstructor
from afterimage.runs.results import LpipsStatus
from afterimage.runs.run import Run
from report_study import write_baseline

MODEL = "test_resnet.r160_in1k"
DATA = DataConfig("procedural:24", test="procedural:5", resize=64, crop=64)
CONFIG = RunConfig(
    (f"{MODEL}:layer1",), "random", decoder=DecoderConfig("linear"), data=DATA, lpips="squeeze"
)


def maps(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 6), st.integers(1, 6))
@settings(max_examples=20, deadline=None)
def test_shuffling_moves_whole_locations(sample_images, channels, height, width):
    features = [maps(sample_images, channels, height, width)]
    (moved,) = shuffle(features, torch.Generator().manual_seed(1))
    assert moved.shape == features[0].shape
    for before, after in zip(features[0].flatten(2), moved.flatten(2), strict=True):
        assert sorted(map(tuple, before.T.tolist())) == sorted(map(tuple, after.T.tolist()))


def test_each_image_is_shuffled_its_own_way():
    features = [maps(1, 3, 8, 8).repeat(2, 1, 1, 1)]
    (moved,) = shuffle(features, torch.Generator().manual_seed(1))
    assert not torch.equal(moved[0], moved[1]) and not torch.equal(moved[0], features[0][0])


def test_level_features_say_nothing_of_the_image():
    (made,) = fill_channels([maps(2, 3, 4, 5)], [torch.tensor([1.0, 2.0, 3.0])])
    assert torch.equal(made, torch.tensor([1.0, 2.0, 3.0])[None, :, None, None].expand(2, 3, 4, 5))


def test_distances_have_their_closed_forms():
    features = [maps(3, 4, 5, 6), maps(3, 2, 2, 2, seed=1)]
    assert distance(features, features).tolist() == [0, 0, 0]
    assert distance(features, [torch.zeros_like(f) for f in features]).tolist() == pytest.approx([1, 1, 1])
    assert distance(features, [3 * f for f in features]).tolist() == pytest.approx([2, 2, 2], rel=1e-5)
    assert distance([torch.zeros(1, 2, 2, 2)], [torch.zeros(1, 2, 2, 2)]).tolist() == [0]


def test_the_identity_decoder_reencodes_at_distance_zero(tmp_path):
    images = load_data(DATA, cache=tmp_path).test.crops(range(4))
    encoders = MultiEncoder(CONFIG.sources, weights="random", image_size=64)
    reconstructor = Reconstructor(encoders, Recall(images[:3]))
    measure = _AblationMeasure(
        reconstructor,
        sample_features(encoders, load_data(DATA, cache=tmp_path).train),
        Metrics("squeeze", size=64),
    )
    features = encoders(images)
    measure.add(["a", "b", "c"], images[:3], images[:3], [f[:3] for f in features], [f[1:] for f in features])
    assert [row["reencoded"] for row in measure.rows] == [0, 0, 0]
    assert all(row["random_pair"] > 0.05 and row["zero_psnr"] == 100 for row in measure.rows)


class Recall(FeatureDecoder):
    """Knows its images whatever the features are: the strongest prior there is."""

    def __init__(self, images):
        torch.nn.Module.__init__(self)
        self.images = torch.nn.Parameter(images)

    def forward(self, features):
        return self.images.detach()


def test_a_sample_has_the_features_mean_and_repeats(tmp_path):
    data = load_data(DATA, cache=tmp_path)
    encoders = MultiEncoder(CONFIG.sources, weights="random", image_size=64)
    (table,), (again,) = sample_features(encoders, data.train), sample_features(encoders, data.train)
    assert torch.equal(table, again)
    (whole,) = encoders(data.train.crops(range(len(data.train))))
    torch.testing.assert_close(table.mean(1), whole.mean((0, 2, 3)), rtol=0.05, atol=0.02)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One finished run, its cache, and the controls measured on it."""
    root = tmp_path_factory.mktemp("controls")
    (run,) = train_runs([CONFIG], root / "runs", cache=root / "cache", accelerator="cpu")
    assert run_controls([run], cache=root / "cache", accelerator="cpu") == []
    return run, root / "cache"


def read(run, part):
    return json.loads(run.file(f"{part}.json").read_text())


def test_controls_come_out_in_their_order(finished):
    run, _ = finished
    facts = read(run, "controls")
    means = {name: scores["psnr"]["mean"] for name, scores in facts["controls"].items()}
    assert means["own"] == pytest.approx(run.result.scores["psnr"].mean, abs=1e-3)
    assert means["own"] > means["colour"] + 1
    assert all(means[name] < means["colour"] for name in ("another", "shuffled", "mean"))
    assert 0 < facts["distances"]["reencoded"] < facts["distances"]["random_pair"]
    assert facts["images"] == 5


def test_error_energy_is_what_the_planes_hold(finished):
    """The spectra obey |r - x|^2 = |x|^2 + |r|^2 - 2 Re(x r*), and places and regions add up to the mean error."""
    run, _ = finished
    facts = read(run, "error_breakdown")
    for spectrum in facts["spectra"].values():
        for x, r, shared, error in zip(*spectrum.values(), strict=True):
            if x is not None:
                assert error == pytest.approx(x + r - 2 * shared, abs=1e-4 * (x + r))
    regions = [facts["regions"][kind] for kind in ("flat", "edge", "texture")]
    assert sum(region["share"] for region in regions) == pytest.approx(1)
    by_region = sum(region["share"] * (region["mse"] or 0) for region in regions)
    place = [v**2 for row in facts["place"] for v in row]
    assert by_region == pytest.approx(sum(place) / len(place), rel=0.03)  # cells of unequal size overlap


def test_fewer_bits_take_less_and_give_less(finished):
    run, _ = finished
    facts = read(run, "rate_distortion")
    points = facts["points"]
    assert [p["bits"] for p in points] == [32, 8, 6, 4, 3, 2, 1]
    sizes = [p["bits_per_pixel"] for p in points]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == len(sizes)
    assert all(a["psnr"] >= b["psnr"] - 0.05 for a, b in itertools.pairwise(points))
    bounds = [p["entropy_bits_per_pixel"] for p in points[1:]]
    assert bounds == sorted(bounds, reverse=True)


def test_what_is_there_for_the_same_decoder_is_kept(finished, tmp_path):
    run, cache = finished
    stamps = {part: run.file(f"{part}.json").stat().st_mtime_ns for part in CONTROL_TYPES}
    path = run.file("error_breakdown.json")
    path.write_text(path.read_text().replace('"format": 1', '"format": 0'))
    assert run_controls([run], cache=cache, accelerator="cpu") == []
    changed = {part for part in CONTROL_TYPES if run.file(f"{part}.json").stat().st_mtime_ns != stamps[part]}
    assert changed == {"error_breakdown"} and read(run, "error_breakdown")["format"] == 1


def test_scores_of_another_lpips_network_are_measured_when_it_is_named(finished):
    run, cache = finished
    for lpips, expected in (("squeeze", set()), ("vgg", {"controls"}), (None, set()), ("vgg", set())):
        stamps = {part: run.file(f"{part}.json").stat().st_mtime_ns for part in CONTROL_TYPES}
        assert run_controls([run], lpips=lpips, cache=cache, accelerator="cpu") == []
        assert {p for p in CONTROL_TYPES if run.file(f"{p}.json").stat().st_mtime_ns != stamps[p]} == expected
    assert read(run, "controls")["lpips"]["net"] == "vgg"


def test_a_run_that_cannot_be_measured_leaves_the_others_alone(finished, tmp_path):
    run, cache = finished
    unfinished = Run.create(tmp_path, replace(CONFIG, seed=7))
    errors = run_controls([unfinished, run], parts=["error_breakdown"], cache=cache, accelerator="cpu")
    assert [str(error) for error in errors] == [
        f"run {unfinished.name} is not finished (state: new): it has no controls"
    ]
    with pytest.raises(AfterimageError, match="unknown part of the controls 'lots'"):
        run_controls([run], parts=["lots"])


def test_one_test_image_has_no_other(finished, tmp_path):
    run, cache = finished
    alone = Run.create(tmp_path, replace(CONFIG, data=replace(DATA, limit_test=1)))
    for name in ("summary.json", "scores.csv", "status.json", "decoder.safetensors"):
        alone.file(name).write_bytes(run.file(name).read_bytes())
    (error,) = run_controls([alone], cache=cache, accelerator="cpu")
    assert "controls need two test images or more, it has 1" in str(error)


def test_rows_without_a_decoder_are_passed_over(tmp_path):
    run = write_baseline(tmp_path, "mean")
    assert run_controls([run], accelerator="cpu") == []
    assert not any(run.file(f"{part}.json").exists() for part in CONTROL_TYPES)


def test_twins(monkeypatch):
    import afterimage.experiments.study as twins

    trained = replace(CONFIG, weights="pretrained", decoder=DecoderConfig("transposed"))
    said = []
    monkeypatch.setattr(
        twins, "Metrics", lambda net: type("M", (), {"lpips_status": LpipsStatus("alex", True)})
    )
    found = with_matched_controls([trained, replace(CONFIG, weights="pretrained"), trained], said.append)
    assert [(c.decoder.name, c.weights, c.recipe.loss) for c in found] == [
        ("transposed", "pretrained", "mse"),
        ("transposed", "random", "mse"),
        ("transposed", "pretrained", "0.5*mse + 0.5*lpips:squeeze"),
        ("linear", "pretrained", "mse"),
        ("linear", "random", "mse"),
    ]
    status = LpipsStatus("alex", reason="no weights")
    monkeypatch.setattr(twins, "Metrics", lambda net: type("M", (), {"lpips_status": status}))
    found = with_matched_controls([trained], lambda what, *_: said.append(what))
    assert len(found) == 2 and said == [
        "WARNING: no controls with a perceptual loss: LPIPS is unavailable: no weights"
    ]
    other = replace(trained, recipe=RecipeConfig(loss="l1"))
    assert [c.recipe.loss for c in with_matched_controls([other])] == ["l1", "l1"]


def test_a_study_with_controls_measures_them_all(tmp_path):
    study = StudyConfig(
        "", CONFIG.sources, (DecoderConfig("linear"),), weights="random", controls=True, data=DATA
    )
    runs, failures = run_study(study, tmp_path / "runs", cache=tmp_path / "cache", accelerator="cpu")
    assert not failures
    decoders = [run for run in runs if run.result.kind == "decoder"]
    assert len(decoders) == 1 < len(runs)
    assert all(
        run.file(f"{part}.json").exists() == (run in decoders) for part in CONTROL_TYPES for run in runs
    )
